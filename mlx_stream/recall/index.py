"""Indexes the words of numbered texts with SQLite's full-text search; independent of questions.

The index holds neither texts nor word positions, so it takes up a quarter of the space of the
texts. It is a cache: the caller rebuilds it if anything looks wrong.
"""

import os
import sqlite3
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Self

from mlx_stream.program.paths import is_file, private
from mlx_stream.program.sqlite import LONGEST_ROW, connect, files, reporting_errors
from mlx_stream.recall.words import indexed_text

TABLES = (
    "CREATE VIRTUAL TABLE words USING "
    "fts5(text, content='', columnsize=0, detail=none, tokenize='porter unicode61')",
    "CREATE TABLE state (owner TEXT, last INTEGER, count INTEGER, checksum TEXT)",
)
SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"
WITH_WORD = (
    "SELECT rowid FROM words WHERE words MATCH ? AND rowid >= ? AND rowid < ? "
    "ORDER BY rowid DESC LIMIT ?"
)
# For a common word, only the newest texts are found: this many, or one in `ONE_IN` of all if that
# is more.
MOST_FOUND = 1_000
ONE_IN = 200


class WordIndex:
    """An open index. Only one process at a time may have it open.

    Attributes:
        last: the number up to which texts have been added; 0 if none have been.
        count: the number of texts.
        checksum: the one last passed to `add`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, owner: str):
        self.path, self.connection = path, connection
        connection.set_progress_handler(None, 0)  # its schema has been checked
        row = connection.execute("SELECT * FROM state LIMIT 2").fetchall()
        ((found, self.last, self.count, self.checksum),) = row
        if found != owner or not 0 <= self.count <= self.last:
            raise ValueError(f"the index belongs to {found!r:.40}")

    @classmethod
    def open(cls, path: Path, owner: str) -> Self:
        """Open the index in a file, or create an empty one if the file is not a usable index.

        Args:
            owner: identifies what is indexed; an index with a different owner is not used.

        Raises:
            SessionError: a new file cannot be written.
        """
        if is_file(path) and path.stat().st_uid == os.getuid():
            try:
                if path.stat().st_mode & 0o077:
                    path.chmod(0o600)
                connection = connect(path, LONGEST_ROW)
                try:
                    if frozenset(connection.execute(SCHEMA)) != index_schema():
                        raise ValueError("its tables are not those of a recall index")
                    return cls(path, connection, owner)
                except BaseException:
                    connection.close()
                    raise
            except (OSError, sqlite3.Error, ValueError, TypeError):
                pass  # it is rebuilt
        return cls.create(path, owner)

    @classmethod
    def in_memory(cls) -> Self:
        """Create an index in memory, without a file."""
        return cls.begin(sqlite3.connect(":memory:", isolation_level=None), Path(), "")

    @classmethod
    def create(cls, path: Path, owner: str) -> Self:
        """Create an empty index, replacing any existing one.

        Raises:
            SessionError: the index cannot be written.
        """
        private(path.parent)
        with reporting_errors(path, "index"):
            for old in files(path):
                old.unlink(missing_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            connection = connect(path, LONGEST_ROW)
            # The index can be rebuilt, so it may lose the newest texts in a power failure.
            for setting in ("journal_mode = WAL", "synchronous = NORMAL"):
                connection.execute(f"PRAGMA {setting}").fetchall()
            return cls.begin(connection, path, owner)

    @classmethod
    def begin(cls, connection: sqlite3.Connection, path: Path, owner: str) -> Self:
        """Create the tables in an empty database."""
        connection.execute("BEGIN IMMEDIATE")
        for statement in TABLES:
            connection.execute(statement)
        connection.execute("INSERT INTO state VALUES (?, 0, 0, '')", (owner,))
        connection.execute("COMMIT")
        return cls(path, connection, owner)

    def add(self, texts: Iterable[tuple[int, str]], last: int, checksum: str) -> None:
        """Add texts in order: all of them, or none if this raises.

        Args:
            last: the new `last`. The numbers of the texts are above the old `last` and at most the
                new one.
        """
        count = self.count
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            for number, text in texts:
                row = number, indexed_text(text)
                self.connection.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", row)
                count += 1
            update = "UPDATE state SET last = ?, count = ?, checksum = ?"
            self.connection.execute(update, (last, count, checksum))
            self.connection.execute("COMMIT")
        except BaseException:
            self.connection.rollback()
            raise
        self.last, self.count, self.checksum = last, count, checksum

    def numbers(self, word: str, first: int, end: int) -> list[int]:
        """Return the numbers of texts with a word, from `first` up to but not including `end`.

        For a common word, only the newest are returned.
        """
        found = self.connection.execute(WITH_WORD, self._with_word(word, first, end))
        return [number for (number,) in found]

    def number_of_texts(self, word: str, first: int, end: int) -> int:
        """Return how many numbers `numbers` would return, in a third of the time."""
        count = f"SELECT count(*) FROM ({WITH_WORD})"
        ((found,),) = self.connection.execute(count, self._with_word(word, first, end))
        return found

    def _with_word(self, word: str, first: int, end: int) -> tuple[str, int, int, int]:
        return f'"{word}"', first, end, max(MOST_FOUND, self.count // ONE_IN)

    def frequencies(self) -> list[tuple[str, int]]:
        """Return every word, as it is indexed, and the number of texts that contain it."""
        table = (
            "CREATE VIRTUAL TABLE IF NOT EXISTS temp.vocabulary USING fts5vocab(main, words, row)"
        )
        self.connection.execute(table)
        return self.connection.execute("SELECT term, doc FROM temp.vocabulary").fetchall()

    def close(self) -> None:
        self.connection.close()


@cache
def index_schema() -> frozenset[tuple[str, ...]]:
    """Return the schema that this version of SQLite derives from `TABLES`."""
    connection = sqlite3.connect(":memory:")
    try:
        for statement in TABLES:
            connection.execute(statement)
        return frozenset(connection.execute(SCHEMA))
    finally:
        connection.close()
