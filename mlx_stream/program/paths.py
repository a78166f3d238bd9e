"""Where this user's conversations, caches and settings are; independent of their contents."""

import os
import stat
from pathlib import Path

import platformdirs

from mlx_stream.errors import SessionError


def user_folder(below_home: str, system: str, *below_system: str) -> Path:
    """Return a folder below $MLX_STREAM_HOME, or else one of the system's."""
    if home := os.environ.get("MLX_STREAM_HOME"):
        try:
            return Path(home).expanduser().absolute() / below_home
        except RuntimeError as error:
            raise SessionError(f"MLX_STREAM_HOME={home}: {error}") from error
    return Path(system, *below_system)


def data_folder(name: str = "sessions") -> Path:
    """Return the folder of conversations and their locks, or of another program's data.

    Like all folders here, it may not exist yet.
    """
    return user_folder(name, platformdirs.user_data_dir("mlx_stream"), name)


def cache_folder(name: str = "snapshots") -> Path:
    """Return the folder of streams' states, or of another program's cache."""
    system = platformdirs.user_cache_dir("mlx_stream")
    return user_folder(name, system, "sessions" if name == "snapshots" else name)


def cache_root() -> Path:
    """Return the folder of what this package itself fetched."""
    return user_folder("cache", platformdirs.user_cache_dir("mlx_stream"))


def private(folder: Path) -> Path:
    """Make a folder that only this user may enter, if it is not there, and return it.

    A folder of this program that is open to others is closed to them; any other is left as it is.

    Raises:
        SessionError: the folder cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours = (data_folder(folder.name), cache_folder(folder.name), cache_folder())
        if folder in ours and folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        reason = error.strerror
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "there is a file in its place"
        raise SessionError(
            f"{folder}: cannot create this folder: {reason}; set MLX_STREAM_HOME to another"
        ) from error
    return folder


def is_file(path: Path) -> bool:
    """Return whether there is a file, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
