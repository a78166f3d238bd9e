"""Where this user's conversations, caches and settings are kept; independent of their contents."""

import os
import stat
from pathlib import Path

import platformdirs

from mlx_stream.errors import SessionError


def user_folder(below_home: str, system: str, *below_system: str) -> Path:
    """Return a folder under $MLX_STREAM_HOME if it is set, or else a system folder."""
    if home := os.environ.get("MLX_STREAM_HOME"):
        try:
            return Path(home).expanduser().absolute() / below_home
        except RuntimeError as error:
            raise SessionError(f"MLX_STREAM_HOME={home}: {error}") from error
    return Path(system, *below_system)


def data_folder(name: str = "sessions") -> Path:
    """Return the folder for conversations and their locks, or for another program's data.

    Like all folders here, it may not exist yet.
    """
    return user_folder(name, platformdirs.user_data_dir("mlx_stream"), name)


def cache_folder(name: str = "snapshots") -> Path:
    """Return the folder for saved streams, or for another program's cache."""
    system = platformdirs.user_cache_dir("mlx_stream")
    return user_folder(name, system, "sessions" if name == "snapshots" else name)


def cache_root() -> Path:
    """Return the folder for files that this package itself downloads."""
    return user_folder("cache", platformdirs.user_cache_dir("mlx_stream"))


def private(folder: Path) -> Path:
    """Create a folder that only this user can access, if it does not exist, and return it.

    If others can access one of this program's folders, their access is removed; any other folder is
    left unchanged.

    Raises:
        SessionError: the folder cannot be created.
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
    """Return whether a path is a regular file, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
