"""SQLite as our programs use it: a private, crash-safe file; independent of conversations.

Files are untrusted: nothing is selected from a file until its schema has been verified as ours, no
value may be longer than the file, and any error that SQLite reports is shown to the user as one
line.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_stream.errors import SessionError

PRAGMAS = (
    "trusted_schema = OFF",
    "cell_size_check = ON",
    # Truncating a file while it is mapped would kill the process.
    "mmap_size = 0",
    "synchronous = FULL",
    # On a Mac, synchronous alone only writes to the disk's own cache.
    "fullfsync = ON",
    # Removed text is overwritten, and no text is written to a temporary file.
    "secure_delete = ON",
    "temp_store = MEMORY",
)
# The suffixes of the files that SQLite keeps next to a database.
BESIDE = ("-wal", "-shm", "-journal")
# The maximum size in bytes of a row to write; a row that is read is no larger than its file.
LONGEST_ROW = 256 * 2**20
# Room for our own schema and for the short values of a file that is still empty.
SHORTEST_LIMIT = 2**16
# The maximum number of SQLite steps per statement while opening. Ours take a few hundred; a forged
# schema can have pages that form a loop.
OPENING_STEPS = 200_000
# Seconds to wait for another program that has locked the file.
PATIENCE = 2.0

FULL = "the disk is full: free some space, then try again"
LOCKED = "another program is using it: close it there, then try again"
UNWRITABLE = "it cannot be written: check the permissions of {path}"
ADVICE = {
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_READONLY: UNWRITABLE,
    sqlite3.SQLITE_PERM: UNWRITABLE,
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check the permissions of {path} and its folder",
    sqlite3.SQLITE_BUSY: LOCKED,
    sqlite3.SQLITE_LOCKED: LOCKED,
    sqlite3.SQLITE_IOERR: "the disk is full, or cannot be read or written ({error}): free some "
    "space, or check the disk, then try again",
    sqlite3.SQLITE_TOOBIG: "too long to be stored",
}
DAMAGES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_INTERRUPT)


class Damage(ValueError):
    """The data read is not the data that was written."""


def connect(path: Path, longest: int) -> sqlite3.Connection:
    """Open an existing file with no value longer than `longest` bytes, and read its schema."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=PATIENCE,
        isolation_level=None,
        # Only one thread at a time uses it, but not always the same one.
        check_same_thread=False,
    )
    try:
        limit_length(connection, longest)
        connection.set_progress_handler(lambda: 1, OPENING_STEPS)
        for setting in PRAGMAS:
            connection.execute(f"PRAGMA {setting}").close()
    except BaseException:
        connection.close()
        raise
    return connection


def limit_length(connection: sqlite3.Connection, longest: int) -> None:
    """Limit the size of values, in bytes, for reading and writing."""
    longest = min(max(longest, SHORTEST_LIMIT), LONGEST_ROW)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)


def pragma(connection: sqlite3.Connection, text: str) -> Any:
    ((value,),) = connection.execute(f"PRAGMA {text}").fetchall()
    return value


def files(path: Path) -> tuple[Path, ...]:
    """Return all files of a database: the database itself, then those SQLite keeps next to it."""
    return (path, *(path.with_name(path.name + suffix) for suffix in BESIDE))


def partial_path(path: Path) -> Path:
    """Return the path that a database has until it is complete."""
    return path.with_name(f".{path.name}.new")


def bytes_on_disk(path: Path) -> int:
    """Return the total size of a database and its log, in bytes."""
    total = 0
    # The log first: anything that moves out of it in the meantime is then in the database.
    for part in (f"{path}-wal", path):
        with suppress(FileNotFoundError):
            total += os.stat(part).st_size  # noqa: PTH116 (twice as fast, and each read does it)
    return total


# --- errors ---


@contextmanager
def reporting_damage() -> Iterator[None]:
    """Report anything wrong with a value as damage to its file."""
    try:
        yield
    except (ValueError, TypeError, sqlite3.DataError) as error:
        raise Damage(str(error)) from error


@contextmanager
def reporting_errors(path: Path, kind: str = "session") -> Iterator[None]:
    """Report any database error to the user in one line.

    Args:
        kind: the user's word for the database; the file's name follows it.
    """
    try:
        yield
    except (OSError, OverflowError, TypeError, ValueError, sqlite3.Error) as error:
        raise SessionError(f"{kind} {path.stem!r}: {explain_error(error, path)}") from error


def explain_error(error: Exception, path: Path) -> str:
    # SQLite quotes data that it cannot read, which may be anything.
    text = "".join(c if c.isprintable() else " " for c in str(error)[:200])
    text = " ".join(text.split()) or type(error).__name__
    code = getattr(error, "sqlite_errorcode", None)
    # The low byte is the kind of error; the others give details.
    kind = None if code is None else code & 0xFF
    # Errors about text that is not UTF-8 have no code.
    undecodable = isinstance(error, sqlite3.OperationalError) and code is None
    if isinstance(error, Damage) or kind in DAMAGES or undecodable:
        return f"damaged: {text}; restore {path} from a backup, or use another name"
    if kind in ADVICE:
        return ADVICE[kind].format(path=path, error=text)
    if isinstance(error, OSError):
        return f"{path}: {error.strerror}; check the disk and the folder's permissions"
    return text
