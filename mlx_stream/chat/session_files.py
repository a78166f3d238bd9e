"""Where saved conversations are, by name; independent of their contents."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_stream.errors import SessionError
from mlx_stream.program.paths import cache_folder, data_folder

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
DATABASE = ".db"


@dataclass(frozen=True)
class SessionPaths:
    """The files of one session, which need not exist.

    Attributes:
        database: the transcript, which is authoritative.
        snapshot: the stream's state; it can be recomputed.
        index: the words of the turns that have left the window; it can be rebuilt.
        lock: held by the process that has the session open.
    """

    database: Path
    snapshot: Path
    index: Path
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
        index=cache_folder() / f"{name}.recall",
        lock=data / f"{name}.lock",
    )


def session_names() -> list[str]:
    """Return the names of all sessions in alphabetical order.

    Raises:
        SessionError: the folder cannot be read.
    """
    folder = data_folder()
    try:
        with os.scandir(folder) as entries:  # there may be thousands
            files = [one.name for one in entries if one.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SessionError(
            f"{folder}: cannot be read: {error.strerror}; check its permissions, or set "
            "MLX_STREAM_HOME to another folder"
        ) from error
    names = (name.removesuffix(DATABASE) for name in files if name.endswith(DATABASE))
    return sorted(filter(NAME.fullmatch, names))
