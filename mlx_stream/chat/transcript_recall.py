"""Finds exchanges of a saved conversation that have left the window, using a full-text index.

The transcript is authoritative. The index covers the exchanges that have left the window, up to
a given turn, and holds the sum of their turns' checksums; if the sum does not match the
transcript's, the index is rebuilt.
"""

import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from mlx_stream.chat.schema import ANSWERED, StoredTurn
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError, one_line
from mlx_stream.program.notices import Notify, discard
from mlx_stream.program.sqlite import files, reporting_errors
from mlx_stream.recall.find import Hit, find_hits
from mlx_stream.recall.index import WordIndex
from mlx_stream.recall.quote import Passage

T = TypeVar("T")
# How many turns are read from the transcript and indexed at a time.
AT_A_TIME = 1_000


class TranscriptRecall:
    """Finds exchanges of one transcript; see `RecallStore`. Before `attach` it finds none.

    A failure of the index never ends a reply: the index is rebuilt, or else a notice says that
    recall is off.
    """

    def __init__(self, path: Path, notify: Notify = discard):
        self.path, self.notify = path, notify
        self._store: Store | None = None
        self._index: WordIndex | None = None
        self._end = 1  # the first turn still in the window

    def attach(self, store: Store, end: int) -> None:
        """Open the index of a transcript, whose turns before number `end` have left the window."""
        self._store, self._end = store, end
        self._use(lambda store, index: None, None)

    def leave(self, number: int, question: str, reply: str) -> None:
        self._end = max(self._end, number + 1)

        def add(store: Store, index: WordIndex) -> None:
            if number == index.last + 1:
                add_texts(store, index, [(number, indexed(question, reply))], number)
            else:
                add_missing(store, index, self._end)

        self._use(add, None)

    def find(
        self, question: str, previous: str, first: int, end: int, gate: bool = True
    ) -> Sequence[Passage]:
        """Return exchanges for a question; for `gate`, see `find_hits`."""

        def look(store: Store, index: WordIndex) -> list[Passage]:
            hits = find_hits(index, question, previous, first, end, gate)
            return [passage(hit, turn) for hit in hits for turn in store.turns(hit.number, 1)]

        return self._use(look, [])

    def forget(self, number: int) -> None:
        """Rebuild the index if it contains a turn that has changed, or any later turn."""
        if self._use(lambda store, index: number <= index.last, False):
            self._remove()
            self._use(lambda store, index: None, None)

    def close(self) -> None:
        self.close_index()
        self._store = None

    def close_index(self) -> None:
        """Close the index; it is reopened when it is needed."""
        if self._index:
            self._index.close()
        self._index = None

    def _use(self, action: Callable[[Store, WordIndex], T], otherwise: T) -> T:
        """Return the result of an action; if the index fails, rebuild it and try once more."""
        if self._store is None:
            return otherwise
        failure: Exception | None = None
        for _ in range(2):
            try:
                if self._index is None:
                    self._index = open_index(self.path, self._store)
                    add_missing(self._store, self._index, self._end)
                return action(self._store, self._index)
            except (sqlite3.Error, OSError, SessionError) as error:
                failure = error
                with suppress(SessionError):
                    self._remove()
        assert failure
        self._store = None
        self.notify(f"recall is off: {one_line(failure)}")
        return otherwise

    def _remove(self) -> None:
        self.close_index()
        with reporting_errors(self.path, "index"):
            for path in files(self.path):
                path.unlink(missing_ok=True)


def passage(hit: Hit, turn: StoredTurn) -> Passage:
    question, reply = turn.exchange.question, turn.exchange.reply
    return Passage(hit.number, turn.time, question, reply, hit.words, hit.share)


def indexed(question: str, reply: str) -> str:
    """Return the text to index for an exchange."""
    return f"{question}\n{reply}"


def open_index(path: Path, store: Store) -> WordIndex:
    """Open the index of a transcript, or create a new one if it does not match."""
    owner = store.state.header.id
    index = WordIndex.open(path, owner)
    if matches(store, index):
        return index
    index.close()
    return WordIndex.create(path, owner)


def matches(store: Store, index: WordIndex) -> bool:
    """Return whether an index matches its transcript."""
    links = store.checksums(1, index.last)
    return len(links) == index.last and add_checksums("", links) == (index.checksum or "0")


def add_checksums(total: str, links: Sequence[str]) -> str:
    """Return the sum of checksums, each of which covers the number of its turn."""
    return f"{(int(total or '0', 16) + sum(int(link[:16], 16) for link in links)) % 2**64:x}"


def add_missing(store: Store, index: WordIndex, end: int) -> None:
    """Index those turns of a transcript before number `end` that are not indexed yet."""
    while index.last + 1 < end:
        turns = store.turns(index.last + 1, min(AT_A_TIME, end - index.last - 1))
        if not turns:
            return
        texts = [
            (turn.number, indexed(turn.exchange.question, turn.exchange.reply))
            for turn in turns
            if turn.state == ANSWERED
        ]
        add_texts(store, index, texts, turns[-1].number)


def add_texts(store: Store, index: WordIndex, texts: list[tuple[int, str]], last: int) -> None:
    links = store.checksums(index.last + 1, last)
    index.add(texts, last, add_checksums(index.checksum, links))


def compare_index(path: Path, store: Store) -> str:
    """Return a message if an index differs from its transcript; "" if it does not."""
    with tempfile.TemporaryDirectory() as folder, suppress(sqlite3.Error, SessionError, OSError):
        # Opening an index may replace it, so this opens a copy.
        for part in files(path):
            if part.exists():
                shutil.copyfile(part, Path(folder, part.name))
        with closing(WordIndex.open(Path(folder, path.name), store.state.header.id)) as index:
            fresh = WordIndex.in_memory()
            add_missing(store, fresh, index.last + 1)
            if matches(store, index) and fresh.frequencies() == index.frequencies():
                return ""
    return "the recall index differs from the transcript, and will be rebuilt"
