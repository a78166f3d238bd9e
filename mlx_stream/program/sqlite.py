"""SQLite as our programs use it: a private, crash-safe file; independent of conversations.

A file is untrusted: nothing is selected from it until its schema has been verified as ours, no
value is longer than the file, and any error that SQLite reports is shown to the user as one line.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_stream.errors import SessionError

PRAGMAS = (
    "trusted_schema = OFF",
    "cell_size_check = ON",
    # A file that is cut short while it is mapped would kill the process.
    "mmap_size = 0",
    "synchronous = FULL",
    # On a Mac, synchronous alone stops at the disk's own cache.
    "fullfsync = ON",
    # Removed text is overwritten, and no text is written to a temporary file.
    "secure_delete = ON",
    "temp_store = MEMORY",
)
# What SQLite adds to the names of the files beside a database.
BESIDE = ("-wal", "-shm", "-journal")
# The most bytes of a row that is written; a row that is read has at most the bytes of its file.
LONGEST_ROW = 256 * 2**20
# Room for our own schema and for the short values of a file that is still empty.
SHORTEST_LIMIT = 2**16
# The most steps of SQLite for one statement on opening. Ours take a few hundred; a forged schema
# can have pages that lead back to themselves.
OPENING_STEPS = 200_000
# Seconds to wait for another program that has locked the file.
PATIENCE = 2.0

FULL = "the disk is full: make room, then try again"
LOCKED = "another program is using it: close it there, then try again"
UNWRITABLE = "it cannot be written: check the permissions of {path}"
ADVICE = {
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_READONLY: UNWRITABLE,
    sqlite3.SQLITE_PERM: UNWRITABLE,
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check the permissions of {path} and its folder",
    sqlite3.SQLITE_BUSY: LOCKED,
    sqlite3.SQLITE_LOCKED: LOCKED,
    sqlite3.SQLITE_IOERR: "the disk is full, or cannot be read or written ({error}): make room, "
    "or check it, then try again",
    sqlite3.SQLITE_TOOBIG: "too long to be stored",
}
DAMAGES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_INTERRUPT)


class Damage(ValueError):
    """The data read is not the data that was written."""


def connect(path: Path, longest: int) -> sqlite3.Connection:
    """Open a file that is there, with no value longer than `longest` bytes; reads its schema."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=PATIENCE,
        isolation_level=None,
        # One thread at a time uses it, but not always the same one.
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
    """Limit the bytes of a value, read or written."""
    longest = min(max(longest, SHORTEST_LIMIT), LONGEST_ROW)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)


def pragma(connection: sqlite3.Connection, text: str) -> Any:
    ((value,),) = connection.execute(f"PRAGMA {text}").fetchall()
    return value


def files(path: Path) -> tuple[Path, ...]:
    """Return every file a database may have: itself first, then what SQLite writes beside it."""
    return (path, *(path.with_name(path.name + suffix) for suffix in BESIDE))


def partial_path(path: Path) -> Path:
    """Return where a database is until it is complete."""
    return path.with_name(f".{path.name}.new")


def bytes_on_disk(path: Path) -> int:
    """Return the bytes of a database and of its log."""
    total = 0
    # The log first: whatever moves out of it in between is in the database by then.
    for part in (files(path)[1], path):
        with suppress(FileNotFoundError):
            total += part.stat().st_size
    return total


# --- errors ---


@contextmanager
def reporting_damage() -> Iterator[None]:
    """Report whatever is wrong with a value as damage to its file."""
    try:
        yield
    except (ValueError, TypeError, sqlite3.DataError) as error:
        raise Damage(str(error)) from error


@contextmanager
def reporting_errors(path: Path, kind: str = "session") -> Iterator[None]:
    """Report what goes wrong with a database in one line for its user.

    Args:
        kind: what its user calls it; the file's name follows.
    """
    try:
        yield
    except (OSError, OverflowError, TypeError, ValueError, sqlite3.Error) as error:
        raise SessionError(f"{kind} {path.stem!r}: {explain_error(error, path)}") from error


def explain_error(error: Exception, path: Path) -> str:
    # SQLite quotes what it cannot read, and that may be anything.
    text = "".join(c if c.isprintable() else " " for c in str(error)[:200])
    text = " ".join(text.split()) or type(error).__name__
    code = getattr(error, "sqlite_errorcode", None)
    # The low byte is the kind of error; the others give details.
    kind = None if code is None else code & 0xFF
    # Text that is not UTF-8 comes without a code.
    undecodable = isinstance(error, sqlite3.OperationalError) and code is None
    if isinstance(error, Damage) or kind in DAMAGES or undecodable:
        return f"damaged: {text}; restore {path} from a backup, or use another name"
    if kind in ADVICE:
        return ADVICE[kind].format(path=path, error=text)
    if isinstance(error, OSError):
        return f"{path}: {error.strerror}; check the disk and the folder's permissions"
    return text
