"""One folder in another's place, in one step where the system can; knows nothing of models."""

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

# Linux calls it renameat2 with RENAME_EXCHANGE, macOS renamex_np with RENAME_SWAP; both are 2.
EXCHANGE = 2
HERE = -100  # AT_FDCWD


def put_in_place_of(new: Path, old: Path) -> None:
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
