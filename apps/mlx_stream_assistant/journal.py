"""Records what was read, in SQLite, before it is fed, so that nothing is lost or fed twice.

Independent of models.

Each piece of text is committed together with the position it reaches in its source. The stream's
snapshot names the last chunk it holds, so after a crash the later ones are fed again, and reading
resumes where the last one ends:

    chunks     ... 41 42 43 44        notes.log has been read up to byte 180,224
    snapshot   ... 41                 fed at the next start: 42 43 44

Old chunks are removed once a snapshot holds them and a full window of text has followed: that much
is kept to rebuild the stream if the snapshot is lost.
"""

import json
import secrets
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mlx_stream.program import sqlite
from mlx_stream.program.paths import private

# "mlxa" in ASCII, stored in the file's header.
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
# The maximum number of characters in a chunk; longer texts are split.
LONGEST_CHUNK = 4096
# After this long, a new heading is written even if the source is the same.
HEADING_AGAIN = timedelta(minutes=15)
# The maximum number of notes from folders to remember.
MOST_NOTES = 20_000


@dataclass(frozen=True)
class Chunk:
    """A piece of text from a source."""

    source: str  # a path, or "standard input"
    kind: str  # "file", "note", "input" or "asked"
    title: str  # the source's name in headings
    data: bytes
    text: str  # the same, decoded
    place: dict[str, Any] = field(default_factory=dict)  # where to continue reading, as JSON values
    apart: bool = False  # always put a heading before it


@dataclass(frozen=True)
class StoredChunk:
    """A piece of the stream: a heading, which may be empty, and text."""

    number: int
    source: str
    head: str
    text: str
    time: str

    @property
    def fed(self) -> str:
        return self.head + self.text


@dataclass(frozen=True)
class SourceRow:
    """How far a source has been read, with the count and CRC-32 of all bytes ever read from it."""

    name: str
    kind: str
    place: dict[str, Any]
    bytes: int
    crc: int


class Journal:
    """The open journal of one assistant; its methods may be called from any thread.

    A method that raises changes nothing. `last` is the number of the last chunk, 0 before the
    first. `id` is random; snapshots include it, so that another journal's snapshot is not used.
    """

    def __init__(self, path: Path):
        """Open a journal, creating it if necessary."""
        private(path.parent)
        self.path, self._lock = path, threading.RLock()
        with self._reading():
            path.touch(0o600)
            path.chmod(0o600)
            self._connection = sqlite.connect(path, sqlite.LONGEST_ROW)
            try:
                self._prepare()
                self.id: str = self._value("SELECT id FROM about")
                self.last: int = self._value("SELECT coalesce(max(number), 0) FROM chunks")
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._connection.close()

    # --- what was read ---

    def append(self, chunk: Chunk) -> None:
        """Write a chunk and its position in the source; when this returns, both are on disk."""
        now = datetime.now().astimezone()
        time = now.isoformat(timespec="seconds")
        texts = cut(chunk.text, LONGEST_CHUNK)
        with self._reading():
            with self._transaction():
                rows = self._rows("SELECT * FROM chunks ORDER BY number DESC LIMIT 1")
                head = heading(StoredChunk(*rows[0]) if rows else None, chunk, now)
                for number, text in enumerate(texts, self.last + 1):
                    row = (number, chunk.source, head, text, time)
                    self._rows("INSERT INTO chunks VALUES (?, ?, ?, ?, ?)", *row)
                    head = ""
                self._update_source(chunk)
            self.last += len(texts)

    def _update_source(self, chunk: Chunk) -> None:
        before, write = self.source(chunk.source), self._rows
        total, crc = (before.bytes, before.crc) if before else (0, 0)
        place, size = json.dumps(chunk.place), len(chunk.data)
        row = (chunk.source, chunk.kind, place, total + size, zlib.crc32(chunk.data, crc))
        write("REPLACE INTO sources VALUES (?, ?, ?, ?, ?)", *row)
        write("UPDATE about SET bytes = bytes + ?", size)
        # REPLACE assigns a new rowid, so the lowest ones belong to the rows changed longest ago.
        notes = "SELECT rowid FROM sources WHERE kind = 'note' ORDER BY rowid DESC"
        write(f"DELETE FROM sources WHERE rowid IN ({notes} LIMIT -1 OFFSET ?)", MOST_NOTES)

    def chunks(self, after: int) -> Iterator[StoredChunk]:
        """Yield the chunks numbered above `after`, including those appended during iteration."""
        query = "SELECT * FROM chunks WHERE number > ? ORDER BY number LIMIT 16"
        while rows := self._rows(query, after):
            yield from (StoredChunk(*row) for row in rows)
            after = rows[-1][0]

    @property
    def first(self) -> int:
        """The number of the oldest chunk that is kept, or of the next chunk if none is kept."""
        return self._value("SELECT min(number) FROM chunks") or self.last + 1

    def prune(self, through: int, keep: int) -> None:
        """Remove chunks up to `through`, the last in a snapshot, but keep this many characters."""
        query = "SELECT number, length(text) FROM chunks WHERE number <= ? ORDER BY number DESC"
        with self._transaction():
            kept, oldest = 0, through
            for number, length in self._rows(query, through):
                oldest = number
                kept += length
                if kept >= keep:
                    break
            self._rows("DELETE FROM chunks WHERE number < ?", oldest)

    # --- the sources ---

    def source(self, name: str) -> SourceRow | None:
        with self._reading():
            rows = self._rows("SELECT * FROM sources WHERE name = ?", name)
            return source_of(rows[0]) if rows else None

    def places(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return how far each source of a kind has been read, by path."""
        with self._reading():
            rows = map(source_of, self._rows("SELECT * FROM sources WHERE kind = ?", kind))
            return {row.name: row.place for row in rows}

    # --- the diary ---

    @property
    def bytes(self) -> int:
        """The total number of bytes ever read from all sources."""
        return self._value("SELECT bytes FROM about")

    def bytes_through(self, number: int) -> int:
        """Return how many bytes were read up to the end of a chunk, excluding later chunks."""
        later = "SELECT total(length(CAST(text AS BLOB))) FROM chunks WHERE number > ?"
        return int(self._value(f"SELECT bytes - ({later}) FROM about", number))

    @property
    def last_note(self) -> tuple[int, float]:
        """The number of bytes read before the last note, and its time in seconds since 1970."""
        ((noted, at),) = self._rows("SELECT noted, noted_at FROM about")
        return noted, at

    @property
    def writing(self) -> dict[str, Any] | None:
        """The note that is being written, or None."""
        with self._reading():
            text = self._value("SELECT writing FROM about")
            return None if text is None else json.loads(text)

    def begin_note(self, note: dict[str, Any], noted: int, at: float) -> None:
        """Store a note until `end_note` confirms that it is in its file."""
        query = "UPDATE about SET writing = ?, noted = ?, noted_at = ?"
        with self._transaction():
            self._rows(query, json.dumps(note), noted, at)

    def end_note(self) -> None:
        with self._transaction():
            self._rows("UPDATE about SET writing = NULL")

    # --- the file ---

    def _prepare(self) -> None:
        # The log is truncated to four megabytes after each checkpoint.
        for setting in ("journal_mode = WAL", f"journal_size_limit = {4 * 2**20}"):
            sqlite.pragma(self._connection, setting)
        if not self._value("SELECT count(*) FROM sqlite_master"):
            with self._transaction():
                for statement in SCHEMA:
                    self._rows(statement)
                row = secrets.token_hex(8)
                self._rows("INSERT INTO about VALUES (1, ?, 0, 0, 0.0, NULL)", row)
        found = [sqlite.pragma(self._connection, key) for key in ("application_id", "user_version")]
        if found != [APPLICATION_ID, VERSION]:
            raise sqlite.Damage("it is not an assistant's journal")
        self._connection.set_progress_handler(None, 0)

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Execute a statement and return its rows."""
        with self._reading():
            return self._connection.execute(query, values).fetchall()

    def _value(self, query: str, *values: Any) -> Any:
        """Return the single value that a query yields."""
        ((value,),) = self._rows(query, *values)
        return value

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep other threads out, and report any database error in one line."""
        with self._lock, sqlite.reporting_errors(self.path, "journal"):
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit everything written in the `with` block, or nothing."""
        with self._reading():
            try:
                self._connection.rollback()
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise


def source_of(row: Sequence[Any]) -> SourceRow:
    name, kind, text, total, crc = row
    place = json.loads(text)
    if not isinstance(place, dict):
        raise ValueError(f"{place!r:.80} is not a position in a source")
    return SourceRow(name, kind, place, total, crc)


def heading(last: StoredChunk | None, chunk: Chunk, now: datetime) -> str:
    """Return a chunk's heading, its source and the time, or "" if the last one still applies.

    >>> heading(None, Chunk("/a/x.log", "file", "x.log", b"", ""), datetime(2026, 11, 27, 14, 5))
    '[x.log, 2026-11-27 14:05]\\n'
    """
    head = f"[{chunk.title}, {now:%Y-%m-%d %H:%M}]\n"
    if last is None:
        return head
    if chunk.source == last.source and not chunk.apart:
        since = now.astimezone() - datetime.fromisoformat(last.time)
        # A heading inside a line would split it.
        if since < HEADING_AGAIN or not last.text.endswith("\n"):
            return ""
    return ("\n" if last.text.endswith("\n") else "\n\n") + head


def cut(text: str, longest: int) -> list[str]:
    """Split text into pieces of at most `longest` characters, after a line or word if possible.

    >>> cut("one two\\nthree four", 9)
    ['one two\\n', 'three ', 'four']
    """
    pieces = []
    while len(text) > longest:
        head = text[:longest]
        at = max(head.rfind("\n"), 0) or max(head.rfind(" "), 0) or longest - 1
        pieces.append(text[: at + 1])
        text = text[at + 1 :]
    return [*pieces, text] if text else pieces
