"""The SQLite file of a journal: its schema and transactions; knows nothing of what is in it."""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_stream.program import sqlite
from mlx_stream.program.paths import private

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
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)


class JournalFile:
    """One open file, which threads use in turn."""

    def __init__(self, path: Path):
        """Open a file, or make one."""
        private(path.parent)
        self.path, self._lock = path, threading.RLock()
        with self.reading():
            path.touch()
            path.chmod(0o600)
            self._connection = sqlite.connect(path, sqlite.LONGEST_ROW)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        # The log is cut to four megabytes after each checkpoint.
        for setting in ("journal_mode = WAL", f"journal_size_limit = {4 * 2**20}"):
            sqlite.pragma(self._connection, setting)
        if not self.value("SELECT count(*) FROM sqlite_master"):
            with self.transaction():
                for statement in SCHEMA:
                    self.rows(statement)
                row = secrets.token_hex(8)
                self.rows("INSERT INTO about VALUES (1, ?, 0, 0, 0.0, NULL)", row)
        found = [sqlite.pragma(self._connection, key) for key in ("application_id", "user_version")]
        if found != [APPLICATION_ID, VERSION]:
            raise sqlite.Damage("it is not a journal of the assistant")
        self._connection.set_progress_handler(None, 0)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Execute a statement; return the rows that it gives."""
        with self.reading():
            return self._connection.execute(query, values).fetchall()

    def value(self, query: str, *values: Any) -> Any:
        """Return the one value that a query gives."""
        ((value,),) = self.rows(query, *values)
        return value

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep other threads out, and report errors of the file in one line."""
        with self._lock, sqlite.reporting_errors(self.path, "journal"):
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all of what is done inside, or nothing."""
        with self.reading():
            try:
                self._connection.rollback()
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._connection.close()
