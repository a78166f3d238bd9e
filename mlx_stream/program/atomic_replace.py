"""Writes a folder completely before it gets its name or replaces another; independent of models."""

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def replace_folder(new: Path, old: Path) -> None:
    """Give `new` the name of the folder `old`, whose files are removed.

    A process that is killed between the two renames leaves the old folder as `.NAME.*.replaced`.

    Raises:
        OSError: a rename failed; both folders are unchanged.
    """
    aside = old.with_name(f".{old.name}.{secrets.token_hex(4)}.replaced")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def partial_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder in `parent` for work on `name`, and always remove it at the end.

    A process that is killed cannot remove its folder, so each call first removes those of dead
    processes. The process that makes a folder holds a lock on it, which the system releases when
    the process dies. A process id in the name would not do: ids are reused, and containers have
    their own.
    """
    sweep_partial_folders(parent, name)
    folder, lock = make_locked_folder(parent, name)
    try:
        yield folder
    finally:
        # If it was renamed into place, nothing is left under this name.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep_partial_folders(parent: Path, name: str) -> None:
    """Remove the folders for work on `name` left in `parent` by processes that have died."""
    for folder in list(parent.glob(f".{glob.escape(name)}.*{PARTIAL}")):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # it no longer exists, or is not one of our folders
            continue
        try:
            if take_lock(lock, without_locks=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def make_locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = parent / f".{name}.{secrets.token_hex(8)}{PARTIAL}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process has removed it: make a new one
            continue
        if take_lock(lock, without_locks=True) and folder.exists():
            return folder, lock
        os.close(lock)


def take_lock(file: int, *, without_locks: bool) -> bool:
    """Try to lock an open folder; return `without_locks` if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return without_locks and not isinstance(error, BlockingIOError)
    return True
