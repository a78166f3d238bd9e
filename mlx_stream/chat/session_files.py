"""Where saved conversations are, by name; knows nothing about the contents of their files."""

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
    """The files of one session, which need not exist.

    Attributes:
        database: the transcript, which is authoritative.
        snapshot: the stream's state, which can be computed again.
        lock: held by the process that has the session open.
    """

    database: Path
    snapshot: Path
    lock: Path


def session_paths(name: str) -> SessionPaths:
    """Return the paths of a session's files.

    Raises:
        SessionError: the name is not valid.
    """
    if not NAME.fullmatch(name):
        raise SessionError(
            f"{name[:80]!r} is not a valid session name; expected 1 to 64 letters (a-z, A-Z),"
            " digits, '-', '_' and '.', starting with a letter, a digit or '_'"
        )
    data = data_folder()
    return SessionPaths(
        database=data / f"{name}{DATABASE}",
        snapshot=cache_folder() / f"{name}.safetensors",
        lock=data / f"{name}.lock",
    )


def session_names() -> list[str]:
    """Return the names of all sessions in alphabetical order.

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
            f"{folder}: cannot be read: {error.strerror}; check its permissions, or set "
            "MLX_STREAM_HOME to another folder"
        ) from error
    return sorted(path.stem for path in found if NAME.fullmatch(path.stem) and is_file(path))


def latest_session() -> str | None:
    """Return the name of the session that was written to last, or None."""
    return max(
        session_names(), key=lambda name: last_written(session_paths(name).database), default=None
    )


def last_written(database: Path) -> int:
    """Return when a session was last written to, in nanoseconds; 0 if it does not exist."""
    times = [0]
    # SQLite writes to the log first.
    for path in (database, database.with_name(f"{database.name}-wal")):
        with suppress(OSError):
            times.append(path.lstat().st_mtime_ns)
    return max(times)
