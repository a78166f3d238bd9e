"""What was read, in SQLite, before it is fed: nothing twice, nothing lost; knows no model.

A piece of text and the place in its source up to which it reaches are committed together. The
stream's snapshot says the number of the last chunk in it, so after a crash those after it are fed
again, and the source goes on where the last one ends:

    chunks     ... 41 42 43 44        notes.log stands at byte 180,224
    snapshot   ... 41                 fed at the next start: 42 43 44

Old chunks are removed once a snapshot holds them and a window of text has come after them: that
much is kept to build the stream again if the snapshot is lost.
"""

import json
import secrets
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

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
    "trusted_schema = OFF",
    "mmap_size = 0",
    "journal_mode = WAL",
    "synchronous = FULL",
    # On a Mac, synchronous alone stops at the disk's own cache.
    "fullfsync = ON",
    "secure_delete = ON",
    "temp_store = MEMORY",
    # The log is cut back to this after each checkpoint.
    f"journal_size_limit = {4 * 2**20}",
)
# Characters of one chunk at most; what a source gives is cut into such.
LONGEST_CHUNK = 4096
# A heading says the time again after so long.
HEADING_AGAIN = timedelta(minutes=15)
# Notes of a folder that are remembered.
MOST_NOTES = 20_000
PATIENCE = 5.0


@dataclass(frozen=True)
class Chunk:
    """What a source gives at once.

    Attributes:
        source: its name: a path, or "standard input".
        kind: "file", "note", "input" or "asked".
        title: what headings call it.
        data: the bytes, for the count and checksum of what was read.
        text: the same as text.
        place: from where the source goes on, as JSON values.
        apart: a heading comes before it, whatever came last.
    """

    source: str
    kind: str
    title: str
    data: bytes
    text: str
    place: dict[str, Any] = field(default_factory=dict)
    apart: bool = False


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
    """Where a source stands: all bytes ever read of it, and their CRC-32."""

    name: str
    kind: str
    place: dict[str, Any]
    bytes: int
    crc: int


class Journal:
    """One assistant's journal, open; its methods may be called from any thread.

    A method that raises has changed nothing.

    Attributes:
        id: random; a snapshot names it, so that it is not taken for another journal's.
        last: number of the last chunk; 0 if there was none yet.
    """

    def __init__(self, path: Path):
        """Open a journal, or make one.

        Raises:
            AssistantError: it is damaged, or cannot be opened or made.
        """
        private(path.parent)
        self.path, self._lock = path, threading.RLock()
        with self._refusing():
            path.touch(mode=0o600)
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            self._connection = sqlite3.connect(
                path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        for setting in PRAGMAS:
            self._connection.execute(f"PRAGMA {setting}").close()
        if not self._one("SELECT count(*) FROM sqlite_master"):
            with self._transaction():
                for statement in SCHEMA:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {VERSION}")
                row = (secrets.token_hex(8),)
                self._connection.execute("INSERT INTO about VALUES (1, ?, 0, 0, 0.0, NULL)", row)
        found = self._one("PRAGMA application_id"), self._one("PRAGMA user_version")
        if found != (APPLICATION_ID, VERSION):
            raise ValueError("it is not a journal of this assistant")
        self.id: str = self._one("SELECT id FROM about")
        self.last: int = self._one("SELECT coalesce(max(number), 0) FROM chunks")

    # --- what was read ---

    def append(self, arrival: Chunk) -> None:
        """Write what arrived, and where its source stands; when this returns it is on disk.

        Raises:
            AssistantError: it could not be written: the disk is full, for instance.
        """
        now = datetime.now().astimezone()
        time = now.isoformat(timespec="seconds")
        texts = cut(arrival.text, LONGEST_CHUNK)
        with self._lock:
            with self._transaction():
                heads = [heading(self._last_chunk(), arrival, now), *[""] * len(texts)]
                rows = [
                    (self.last + at, arrival.source, head, text, time)
                    for at, (head, text) in enumerate(zip(heads, texts, strict=False), 1)
                ]
                self._connection.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?)", rows)
                self._stand(arrival)
            self.last += len(texts)

    def _stand(self, arrival: Chunk) -> None:
        before = self._source(arrival.source)
        total, crc = (before.bytes, before.crc) if before else (0, 0)
        row = (
            arrival.source,
            arrival.kind,
            json.dumps(arrival.place),
            total + len(arrival.data),
            zlib.crc32(arrival.data, crc),
        )
        self._connection.execute("REPLACE INTO sources VALUES (?, ?, ?, ?, ?)", row)
        more = (len(arrival.data),)
        self._connection.execute("UPDATE about SET bytes = bytes + ?", more)
        # REPLACE gives a new rowid: the lowest were not heard of for longest.
        notes = "SELECT rowid FROM sources WHERE kind = 'note' ORDER BY rowid DESC"
        delete = f"DELETE FROM sources WHERE rowid IN ({notes} LIMIT -1 OFFSET ?)"
        self._connection.execute(delete, (MOST_NOTES,))

    def chunks(self, after: int) -> Iterator[StoredChunk]:
        """Yield the chunks of numbers above `after`, also those that come meanwhile."""
        number = after
        while True:
            with self._lock, self._refusing():
                query = "SELECT * FROM chunks WHERE number > ? ORDER BY number LIMIT 16"
                rows = self._connection.execute(query, (number,)).fetchall()
            if not rows:
                return
            for row in rows:
                yield StoredChunk(*row)
            number = rows[-1][0]

    @property
    def first(self) -> int:
        """The number of the oldest chunk that is kept, or of the next one if none is."""
        with self._lock, self._refusing():
            return self._one("SELECT min(number) FROM chunks") or self.last + 1

    def prune(self, through: int, keep: int) -> None:
        """Remove chunks up to `through`, which a snapshot holds, but for the last characters.

        Args:
            keep: how many characters stay, at least.
        """
        with self._transaction():
            query = "SELECT number, length(text) FROM chunks WHERE number <= ? ORDER BY number DESC"
            kept, oldest = 0, through
            for number, length in self._connection.execute(query, (through,)):
                oldest = number
                kept += length
                if kept >= keep:
                    break
            self._connection.execute("DELETE FROM chunks WHERE number < ?", (oldest,))

    # --- the sources ---

    def source(self, name: str) -> SourceRow | None:
        with self._lock, self._refusing():
            return self._source(name)

    def sources(self, kind: str | None = None) -> list[SourceRow]:
        """Return all sources ever read, or those of a kind, the one heard of last at the end."""
        with self._lock, self._refusing():
            query = "SELECT * FROM sources WHERE kind = coalesce(?, kind) ORDER BY rowid"
            return [source_of(row) for row in self._connection.execute(query, (kind,))]

    def _source(self, name: str) -> SourceRow | None:
        query = "SELECT * FROM sources WHERE name = ?"
        row = self._connection.execute(query, (name,)).fetchone()
        return None if row is None else source_of(row)

    # --- notes ---

    @property
    def bytes(self) -> int:
        """The bytes ever read, of all sources."""
        with self._lock, self._refusing():
            return self._one("SELECT bytes FROM about")

    def bytes_through(self, number: int) -> int:
        """Return the bytes ever read up to a chunk: all but those of the chunks behind it."""
        with self._lock, self._refusing():
            later = "SELECT total(length(CAST(text AS BLOB))) FROM chunks WHERE number > ?"
            query = f"SELECT bytes - ({later}) FROM about"
            return int(self._connection.execute(query, (number,)).fetchone()[0])

    @property
    def last_note_chunk(self) -> tuple[int, float]:
        """Those read before the last note, and when it was written (seconds since 1970, or 0)."""
        with self._lock, self._refusing():
            return self._connection.execute("SELECT noted, noted_at FROM about").fetchone()

    @property
    def writing(self) -> dict[str, Any] | None:
        """The note that is being written; None if none is."""
        with self._lock, self._refusing():
            text = self._one("SELECT writing FROM about")
            return None if text is None else json.loads(text)

    def begin_note(self, note: dict[str, Any], noted: int, at: float) -> None:
        """Remember a note until it is said to be in its file."""
        with self._transaction():
            row = (json.dumps(note), noted, at)
            self._connection.execute("UPDATE about SET writing = ?, noted = ?, noted_at = ?", row)

    def end_note(self) -> None:
        with self._transaction():
            self._connection.execute("UPDATE about SET writing = NULL")

    def close(self) -> None:
        """Close the file; it may be closed twice."""
        with self._lock:
            self._connection.close()

    # --- SQLite ---

    def _one(self, query: str) -> Any:
        (value,) = self._connection.execute(query).fetchone()
        return value

    def _last_chunk(self) -> StoredChunk | None:
        query = "SELECT * FROM chunks ORDER BY number DESC LIMIT 1"
        row = self._connection.execute(query).fetchone()
        return None if row is None else StoredChunk(*row)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._refusing():
            try:
                self._connection.rollback()
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn what goes wrong with the file into one line for its user."""
        try:
            yield
        except (OSError, TypeError, ValueError, sqlite3.Error) as error:
            raise AssistantError(f"{self.path}: {explain(error)}") from error


def source_of(row: Sequence[Any]) -> SourceRow:
    name, kind, text, total, crc = row
    place = json.loads(text)
    if not isinstance(place, dict):
        raise ValueError(f"{place!r:.80} is no place in a source")
    return SourceRow(name, kind, place, total, crc)


def heading(last: StoredChunk | None, arrival: Chunk, now: datetime) -> str:
    """Return what comes before a text: where it is from, and when, unless that was said.

    >>> heading(None, Chunk("/a/x.log", "file", "x.log", b"", ""), datetime(2026, 11, 27, 14, 5))
    '[x.log, 2026-11-27 14:05]\\n'
    """
    head = f"[{arrival.title}, {now:%Y-%m-%d %H:%M}]\n"
    if last is None:
        return head
    if arrival.source == last.source and not arrival.apart:
        since = now.astimezone() - datetime.fromisoformat(last.time)
        # A heading inside a line would cut it.
        if since < HEADING_AGAIN or not last.text.endswith("\n"):
            return ""
    return ("\n" if last.text.endswith("\n") else "\n\n") + head


def cut(text: str, longest: int) -> list[str]:
    """Cut a text into pieces of at most so many characters, at a line's or word's end if it can.

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
