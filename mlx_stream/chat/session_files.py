"""Where saved conversations are, by name; knows nothing of what is in their files."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_stream.errors import SessionError
from mlx_stream.program.paths import cache_folder, data_folder, is_file

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
DATABASE = ".db"


@dataclass(frozen=True)
class SessionPaths:
    """The files of one session, of which any may not exist.

    Attributes:
        database: the conversation, which is what counts.
        snapshot: the stream's state, which can be computed again.
        lock: held by the process that has the session open.
    """

    database: Path
    snapshot: Path
    lock: Path

    @property
    def quarantine(self) -> Path:
        """Where a snapshot goes that cannot be used."""
        return self.snapshot.with_name(f"{self.snapshot.name}.unusable")


def check_name(name: str) -> str:
    """Return a session's name if it can be one.

    Raises:
        SessionError: it cannot.
    """
    if not NAME.fullmatch(name):
        raise SessionError(
            f"{name[:80]!r} cannot be a session's name; expected 1 to 64 letters (a-z, A-Z),"
            " digits, '-', '_' and '.', and neither '.' nor '-' first"
        )
    return name


def session_paths(name: str) -> SessionPaths:
    """Return where a session's files are.

    Raises:
        SessionError: it cannot be a name.
    """
    check_name(name)
    data = data_folder()
    return SessionPaths(
        database=data / f"{name}{DATABASE}",
        snapshot=cache_folder() / f"{name}.safetensors",
        lock=data / f"{name}.lock",
    )


def session_names() -> list[str]:
    """List the sessions there are, in the order of the alphabet.

    Raises:
        SessionError: the folder cannot be read.
    """
    folder = data_folder()
    try:
        found = [path for path in folder.iterdir() if path.suffix == DATABASE]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SessionError(
            f"{folder}: cannot be read: {error.strerror}; check it, or set MLX_STREAM_HOME to "
            "another folder"
        ) from error
    return sorted(path.stem for path in found if NAME.fullmatch(path.stem) and is_file(path))


def latest_session() -> str | None:
    """Return the session that was written to last; None if there is none."""
    return max(
        session_names(), key=lambda name: last_written(session_paths(name).database), default=None
    )


def last_written(database: Path) -> int:
    """Return when a session was last written to, in nanoseconds; 0 if it is gone."""
    times = [0]
    # What is new is written beside the database first.
    for path in (database, database.with_name(f"{database.name}-wal")):
        with suppress(OSError):
            times.append(path.lstat().st_mtime_ns)
    return max(times)
