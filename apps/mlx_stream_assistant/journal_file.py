"""The SQLite file of a journal: its schema, settings and errors; knows nothing of what is in it."""

import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_stream.program import sqlite
from mlx_stream_assistant.paths import AssistantError, private

# "mlxa", in the header of the file.
APPLICATION_ID = 0x6D6C7861
VERSION = 1
SCHEMA = (
    """CREATE TABLE about (
        row INTEGER PRIMARY KEY CHECK (row = 1),
        id TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        noted INTEGER NOT NULL,
        noted_at REAL NOT NULL,
        writing TEXT
    ) STRICT""",
    """CREATE TABLE sources (
        name TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        place TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        crc INTEGER NOT NULL
    ) STRICT""",
    """CREATE TABLE chunks (
        number INTEGER PRIMARY KEY,
        source TEXT NOT NULL,
        head TEXT NOT NULL,
        text TEXT NOT NULL,
        time TEXT NOT NULL
    ) STRICT""",
)
PRAGMAS = (
    *sqlite.PRAGMAS,
    "journal_mode = WAL",
    # The log is cut back to this after each checkpoint.
    f"journal_size_limit = {4 * 2**20}",
)
PATIENCE = 5.0


class JournalFile:
    """One file, open; threads take turns.

    Attributes:
        connection: used inside `reading` or `transaction` only.
    """

    def __init__(self, path: Path):
        """Open a file, or make one.

        Raises:
            AssistantError: it is damaged, or cannot be opened or made.
        """
        private(path.parent)
        self.path, self._lock = path, threading.RLock()
        with self.reading():
            path.touch(mode=0o600)
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            self.connection = sqlite3.connect(
                path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self.connection.close()
                raise

    def _prepare(self) -> None:
        for setting in PRAGMAS:
            self.connection.execute(f"PRAGMA {setting}").close()
        if not self.value("SELECT count(*) FROM sqlite_master"):
            with self.transaction():
                for statement in SCHEMA:
                    self.connection.execute(statement)
                self.connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self.connection.execute(f"PRAGMA user_version = {VERSION}")
                row = (secrets.token_hex(8),)
                self.connection.execute("INSERT INTO about VALUES (1, ?, 0, 0, 0.0, NULL)", row)
        found = self.value("PRAGMA application_id"), self.value("PRAGMA user_version")
        if found != (APPLICATION_ID, VERSION):
            raise ValueError("it is not a journal of this assistant")

    def value(self, query: str) -> Any:
        """Return the one value that a query gives."""
        (value,) = self.connection.execute(query).fetchone()
        return value

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep other threads out; turn what goes wrong with the file into one line for its user."""
        try:
            with self._lock:
                yield
        except (OSError, TypeError, ValueError, sqlite3.Error) as error:
            raise AssistantError(f"{self.path}: {explain(error)}") from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all of what is done inside, or nothing."""
        with self.reading():
            try:
                self.connection.rollback()
                self.connection.execute("BEGIN IMMEDIATE")
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                self.connection.rollback()
                raise

    def close(self) -> None:
        """Close the file; it may be closed twice."""
        with self._lock:
            self.connection.close()


def explain(error: Exception) -> str:
    if isinstance(error, sqlite3.ProgrammingError):
        return "it is closed: the assistant is stopping"
    # SQLite quotes what it cannot read, and that may be anything.
    text = "".join(c if c.isprintable() else " " for c in str(error)[:200])
    code = getattr(error, "sqlite_errorcode", None)
    kind = None if code is None else code & 0xFF
    if kind in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return f"the disk is full or failing ({text}): make room, or check it"
    if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN):
        return "it cannot be opened or written: check its permissions and its folder's"
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another program is using it: close it there"
    if isinstance(error, OSError):
        return f"{error.strerror}; check the disk and the folder's permissions"
    return f"damaged ({text}): put a backup in its place, or move it away to begin anew"
