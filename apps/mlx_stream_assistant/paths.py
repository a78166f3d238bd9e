"""Where an assistant's files are, and that one process at a time uses them; knows no contents."""

import fcntl
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mlx_stream.errors import MlxStreamError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", re.ASCII)


class AssistantError(MlxStreamError):
    """Something about the assistant that its user can put right."""


@dataclass(frozen=True)
class AssistantPaths:
    """The files of one assistant, of which any may not exist.

    Attributes:
        journal: what was read, which is what counts.
        snapshot: the stream's state, which can be computed again from the journal.
        lock: held by the process that runs.
        socket: on which that process is asked.
        log: where a process started by the system says what it has to say.
    """

    journal: Path
    snapshot: Path
    lock: Path
    socket: Path
    log: Path


def assistant_paths(name: str) -> AssistantPaths:
    """Return where an assistant's files are.

    Raises:
        AssistantError: it cannot be a name, or MLX_STREAM_HOME no folder's.
    """
    if not NAME.fullmatch(name):
        raise AssistantError(
            f"{name[:80]!r} cannot be an assistant's name; expected 1 to 32 letters (a-z, A-Z), "
            "digits, '-', '_' and '.', and neither '.' nor '-' first"
        )
    if home := os.environ.get("MLX_STREAM_HOME"):
        try:
            data = cache = Path(home).expanduser().absolute() / "assistant"
        except RuntimeError as error:
            raise AssistantError(f"MLX_STREAM_HOME={home}: {error}") from error
    else:
        data = Path(platformdirs.user_data_dir("mlx_stream")) / "assistant"
        cache = Path(platformdirs.user_cache_dir("mlx_stream")) / "assistant"
    return AssistantPaths(
        journal=data / f"{name}.db",
        snapshot=cache / f"{name}.safetensors",
        lock=data / f"{name}.lock",
        socket=data / f"{name}.sock",
        log=data / f"{name}.log",
    )


def private(folder: Path) -> Path:
    """Make a folder that only this user may enter, if it is not there, and return it.

    Raises:
        AssistantError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise AssistantError(
            f"{folder}: cannot be made a folder of the assistant: {error.strerror}; "
            "set MLX_STREAM_HOME to another folder"
        ) from error
    return folder


def lock(path: Path) -> int:
    """Take an assistant's lock until this process ends, however it ends; return its descriptor.

    Raises:
        AssistantError: another process holds it, or it cannot be made.
    """
    private(path.parent)
    try:
        # O_NONBLOCK: a pipe of that name must not make us wait.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise AssistantError(f"{path}: not a file; move it away")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise AssistantError(
                f"the assistant {path.stem!r} is running already: stop it first, "
                "or give this one another --name"
            ) from None
    except OSError as error:
        raise AssistantError(
            f"{path}: cannot be locked: {error.strerror}; "
            "check the folder, or set MLX_STREAM_HOME to another"
        ) from error
    return file
