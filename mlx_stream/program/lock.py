"""Locks a file, so that only one process at a time uses a session; independent of its contents.

The system releases the lock when its holder exits, for whatever reason. The file is kept, because
another process that wants the lock may have it open.
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

BUSY = "session {name!r} is open in {holder}: close it there first, or use another name"
# The maximum size in bytes of the holder's note: its process id and when it took the lock.
LONGEST_NOTE = 100


class Lock:
    """A session's lock, held until it is closed or this process ends."""

    def __init__(self, file: int):
        self._file: int | None = file

    @classmethod
    def acquire(cls, path: Path, busy: str = BUSY) -> Self:
        """Lock the file `path`, creating it if it does not exist.

        Args:
            busy: the error message if the file is locked, with placeholders {name} and {holder}.

        Raises:
            SessionError: the lock is held by another process or this one, or cannot be created.
        """
        private(path.parent)
        while True:
            file = -1
            try:
                # O_NONBLOCK: opening a pipe with that name must not block.
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                file = os.open(path, flags, 0o600)
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise SessionError(f"{path}: not a file; rename it")
                os.fchmod(file, 0o600)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its holder may have removed the file, and others may have locked a new one.
                if is_at(file, path):
                    write_note(file)
                    lock, file = cls(file), -1
                    return lock
            except BlockingIOError as error:
                line = busy.format(name=path.stem, holder=holder(file))
                raise SessionError(line) from error
            except OSError as error:
                raise SessionError(
                    f"{path}: cannot be locked: {error.strerror};"
                    " check the folder, or set MLX_STREAM_HOME to another"
                ) from error
            finally:
                if file >= 0:
                    os.close(file)

    def close(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._file is not None:
            # A note left behind is overwritten by the next holder.
            with suppress(OSError):
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def holder_of(path: Path) -> str | None:
    """Return who holds the lock on a file; None if it is not locked."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder(file)
    except OSError:
        return None
    finally:
        os.close(file)
    return None


def is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def write_note(file: int) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    # If the disk is full, the lock is held without a note.
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {now}\n".encode(), 0)


def holder(file: int) -> str:
    """Return who holds a lock, according to the note in its file, which may be missing or wrong."""
    try:
        process, start = os.pread(file, LONGEST_NOTE, 0).decode("ascii").split()
        since, now = datetime.fromisoformat(start).astimezone(), datetime.now().astimezone()
        form = "%H:%M" if since.date() == now.date() else "%Y-%m-%d %H:%M"
        return f"process {int(process)} since {since.strftime(form)}"
    except (OSError, ValueError, OverflowError):
        return "another process"
