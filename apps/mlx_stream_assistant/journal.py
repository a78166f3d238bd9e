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
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mlx_stream_assistant.journal_file import JournalFile

# Characters of one chunk at most; what a source gives is cut into such.
LONGEST_CHUNK = 4096
# A heading says the time again after so long.
HEADING_AGAIN = timedelta(minutes=15)
# Notes of a folder that are remembered.
MOST_NOTES = 20_000


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
        self.path, self._file = path, JournalFile(path)
        try:
            with self._file.reading():
                self.id: str = self._file.value("SELECT id FROM about")
                self.last: int = self._file.value("SELECT coalesce(max(number), 0) FROM chunks")
        except BaseException:
            self._file.close()
            raise

    # --- what was read ---

    def append(self, arrival: Chunk) -> None:
        """Write what arrived, and where its source stands; when this returns it is on disk.

        Raises:
            AssistantError: it could not be written: the disk is full, for instance.
        """
        now = datetime.now().astimezone()
        time = now.isoformat(timespec="seconds")
        texts = cut(arrival.text, LONGEST_CHUNK)
        with self._file.reading():
            with self._file.transaction():
                heads = [heading(self._last_chunk(), arrival, now), *[""] * len(texts)]
                rows = [
                    (self.last + at, arrival.source, head, text, time)
                    for at, (head, text) in enumerate(zip(heads, texts, strict=False), 1)
                ]
                self._file.connection.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?)", rows)
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
        self._file.connection.execute("REPLACE INTO sources VALUES (?, ?, ?, ?, ?)", row)
        more = (len(arrival.data),)
        self._file.connection.execute("UPDATE about SET bytes = bytes + ?", more)
        # REPLACE gives a new rowid: the lowest were not heard of for longest.
        notes = "SELECT rowid FROM sources WHERE kind = 'note' ORDER BY rowid DESC"
        delete = f"DELETE FROM sources WHERE rowid IN ({notes} LIMIT -1 OFFSET ?)"
        self._file.connection.execute(delete, (MOST_NOTES,))

    def chunks(self, after: int) -> Iterator[StoredChunk]:
        """Yield the chunks of numbers above `after`, also those that come meanwhile."""
        number = after
        while True:
            with self._file.reading():
                query = "SELECT * FROM chunks WHERE number > ? ORDER BY number LIMIT 16"
                rows = self._file.connection.execute(query, (number,)).fetchall()
            if not rows:
                return
            for row in rows:
                yield StoredChunk(*row)
            number = rows[-1][0]

    @property
    def first(self) -> int:
        """The number of the oldest chunk that is kept, or of the next one if none is."""
        with self._file.reading():
            return self._file.value("SELECT min(number) FROM chunks") or self.last + 1

    def prune(self, through: int, keep: int) -> None:
        """Remove chunks up to `through`, which a snapshot holds, but for the last characters.

        Args:
            keep: how many characters stay, at least.
        """
        with self._file.transaction():
            query = "SELECT number, length(text) FROM chunks WHERE number <= ? ORDER BY number DESC"
            kept, oldest = 0, through
            for number, length in self._file.connection.execute(query, (through,)):
                oldest = number
                kept += length
                if kept >= keep:
                    break
            self._file.connection.execute("DELETE FROM chunks WHERE number < ?", (oldest,))

    # --- the sources ---

    def source(self, name: str) -> SourceRow | None:
        with self._file.reading():
            return self._source(name)

    def sources(self, kind: str | None = None) -> list[SourceRow]:
        """Return all sources ever read, or those of a kind, the one heard of last at the end."""
        with self._file.reading():
            query = "SELECT * FROM sources WHERE kind = coalesce(?, kind) ORDER BY rowid"
            return [source_of(row) for row in self._file.connection.execute(query, (kind,))]

    def _source(self, name: str) -> SourceRow | None:
        query = "SELECT * FROM sources WHERE name = ?"
        row = self._file.connection.execute(query, (name,)).fetchone()
        return None if row is None else source_of(row)

    # --- notes ---

    @property
    def bytes(self) -> int:
        """The bytes ever read, of all sources."""
        with self._file.reading():
            return self._file.value("SELECT bytes FROM about")

    def bytes_through(self, number: int) -> int:
        """Return the bytes ever read up to a chunk: all but those of the chunks behind it."""
        with self._file.reading():
            later = "SELECT total(length(CAST(text AS BLOB))) FROM chunks WHERE number > ?"
            query = f"SELECT bytes - ({later}) FROM about"
            return int(self._file.connection.execute(query, (number,)).fetchone()[0])

    @property
    def last_note_chunk(self) -> tuple[int, float]:
        """Those read before the last note, and when it was written (seconds since 1970, or 0)."""
        with self._file.reading():
            return self._file.connection.execute("SELECT noted, noted_at FROM about").fetchone()

    @property
    def writing(self) -> dict[str, Any] | None:
        """The note that is being written; None if none is."""
        with self._file.reading():
            text = self._file.value("SELECT writing FROM about")
            return None if text is None else json.loads(text)

    def begin_note(self, note: dict[str, Any], noted: int, at: float) -> None:
        """Remember a note until it is said to be in its file."""
        with self._file.transaction():
            row = (json.dumps(note), noted, at)
            self._file.connection.execute(
                "UPDATE about SET writing = ?, noted = ?, noted_at = ?", row
            )

    def end_note(self) -> None:
        with self._file.transaction():
            self._file.connection.execute("UPDATE about SET writing = NULL")

    def close(self) -> None:
        """Close the file; it may be closed twice."""
        self._file.close()

    def _last_chunk(self) -> StoredChunk | None:
        query = "SELECT * FROM chunks ORDER BY number DESC LIMIT 1"
        row = self._file.connection.execute(query).fetchone()
        return None if row is None else StoredChunk(*row)


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
