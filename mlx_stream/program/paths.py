"""Where this user's conversations, caches and settings are; knows nothing of what is in them."""

import os
import stat
from pathlib import Path

import platformdirs

from mlx_stream.errors import SessionError


def data_folder() -> Path:
    """Return the folder of conversations and their locks, which may not exist yet."""
    if home := os.environ.get("MLX_STREAM_HOME"):
        return Path(home).expanduser() / "sessions"
    return Path(platformdirs.user_data_dir("mlx_stream")) / "sessions"


def cache_folder() -> Path:
    """Return the folder of streams' states, which may not exist yet."""
    if home := os.environ.get("MLX_STREAM_HOME"):
        return Path(home).expanduser() / "snapshots"
    return Path(platformdirs.user_cache_dir("mlx_stream")) / "sessions"


def private(folder: Path) -> Path:
    """Make a folder that only this user may enter, if it is not there, and return it.

    One of our own that others may enter is closed to them; any other is left as it is.

    Raises:
        SessionError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder in (data_folder(), cache_folder()) and folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        reason = error.strerror
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "there is a file in its place"
        raise SessionError(
            f"{folder}: cannot be made a folder of sessions: {reason};"
            " set MLX_STREAM_HOME to another folder"
        ) from error
    return folder


def is_file(path: Path) -> bool:
    """Say whether there is a file, and not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def cache_root() -> Path:
    """Return the folder of what this package fetched itself, which may not exist yet."""
    if home := os.environ.get("MLX_STREAM_HOME"):
        return Path(home).expanduser() / "cache"
    return Path(platformdirs.user_cache_dir("mlx_stream"))
