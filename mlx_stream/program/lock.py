"""One process at a time has a session open: a file it locks; knows nothing of what is in it.

The system lets go of the lock when its holder dies, however it dies. The file stays, for whoever
waits for it may have it open.
"""

import fcntl
import os
import stat
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self

from mlx_stream.errors import SessionError
from mlx_stream.program.paths import private

# Written by a holder: process id, and since when, in ISO 8601.
LONGEST_NOTE = 100


class Lock:
    """A session's lock, held until it is closed or this process ends."""

    def __init__(self, file: int):
        self._file: int | None = file

    @classmethod
    def acquire(cls, path: Path) -> Self:
        """Take the lock `path`, a file that is made if it is not there.

        Raises:
            SessionError: another process holds it, or this one already does, or it cannot be made.
        """
        private(path.parent)
        while True:
            file = open_lock(path)
            try:
                take(file, path)
                # Its holder may have removed it meanwhile, and others may have locked the next one.
                if is_at(file, path):
                    write_note(file)
                    return cls(file)
            except OSError as error:
                os.close(file)
                raise cannot(path, error) from error
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def close(self) -> None:
        """Let go of the lock; it may be closed twice."""
        if self._file is not None:
            # A note that stays says nothing: whoever locks the file next writes over it.
            with suppress(OSError):
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_lock(path: Path) -> int:
    # O_NONBLOCK: a pipe of that name must not make us wait.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise cannot(path, error) from error


def take(file: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise SessionError(f"{path}: not a file; move it away")
    os.fchmod(file, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SessionError(
            f"session {path.stem!r} is open in {holder(file)}:"
            " close it there first, or use another name"
        ) from error


def is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def write_note(file: int) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    # On a full disk the lock holds without it.
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {now}\n".encode(), 0)


def holder(file: int) -> str:
    """Say who holds a lock, of the note in it; it may hold none yet, or anything."""
    try:
        process, start = os.pread(file, LONGEST_NOTE, 0).decode("ascii").split()
        since, now = datetime.fromisoformat(start).astimezone(), datetime.now().astimezone()
        form = "%H:%M" if since.date() == now.date() else "%Y-%m-%d %H:%M"
        return f"process {int(process)} since {since.strftime(form)}"
    except (OSError, ValueError, OverflowError):
        return "another process"


def cannot(path: Path, error: OSError) -> SessionError:
    return SessionError(
        f"{path}: cannot be locked: {error.strerror};"
        " check the folder, or set MLX_STREAM_HOME to another"
    )
