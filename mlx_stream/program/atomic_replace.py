"""One folder in another's place, in one step where the system can; knows nothing of models."""

import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Linux calls it renameat2 with RENAME_EXCHANGE, macOS renamex_np with RENAME_SWAP; both are 2.
EXCHANGE = 2
HERE = -100  # AT_FDCWD


def replace_folder(new: Path, old: Path) -> None:
    """Give `new` the name of the folder `old`, whose files are removed.

    Where the file system cannot exchange two names there is a moment between two renames: killed
    in it, a process leaves the old folder as `.NAME.*.replaced`, which nothing ever sweeps.

    Raises:
        OSError: it cannot be done; both are where they were.
    """
    if exchange(new, old):
        shutil.rmtree(new, ignore_errors=True)
        return
    aside = old.with_name(f".{old.name}.{secrets.token_hex(4)}.replaced")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return whether this system and file system did."""
    system = system_call()
    return system is not None and system(os.fsencode(one), os.fsencode(other)) == 0


def system_call() -> Callable[[bytes, bytes], int] | None:
    library = ctypes.CDLL(None)
    if hasattr(library, "renamex_np"):
        return lambda one, other: library.renamex_np(one, other, EXCHANGE)
    if hasattr(library, "renameat2"):
        return lambda one, other: library.renameat2(HERE, one, HERE, other, EXCHANGE)
    return None


PARTIAL = ".partial"


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def partial_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder in `parent` for work on `name`; it is removed on the way out, come what may.

    A process that is killed cannot remove its folder, so each call first removes those of the
    dead. Its maker holds a lock on the folder; the system lets go of it when the maker dies, which
    a process id in the name cannot tell: ids are used again, and mean nothing in another container.
    """
    sweep_partial_folders(parent, name)
    folder, lock = make_locked_folder(parent, name)
    try:
        yield folder
    finally:
        # If it was renamed into place there is nothing left under this name.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep_partial_folders(parent: Path, name: str) -> None:
    """Remove the folders that processes now dead left in `parent`, of their work on `name`."""
    for folder in list(parent.iterdir()):
        if not (folder.name.startswith(f".{name}.") and folder.name.endswith(PARTIAL)):
            continue
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or not a folder of ours
            continue
        try:
            if take_lock(lock, without_locks=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def make_locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = parent / f".{name}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        # Between mkdir and here another process may have swept it away: then make another.
        if take_lock(lock, without_locks=True) and folder.exists():
            return folder, lock
        os.close(lock)


def take_lock(file: int, *, without_locks: bool) -> bool:
    """Try to lock an open folder; `without_locks` is the answer where the system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True
