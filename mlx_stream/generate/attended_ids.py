"""The ids of the tokens a stream attends to, by row as the cache has their keys and values."""

from collections.abc import Sequence
from typing import Protocol

from mlx_stream.cache import Cache


class StreamObserver(Protocol):
    """What is told how a stream goes, to guess how it goes on."""

    def read(self, ids: Sequence[int]) -> None:
        """Ids have been read."""

    def rewind(self, count: int) -> None:
        """The newest have been taken back."""

    def restart(self, ids: Sequence[int]) -> None:
        """The stream is another one, of which these ids are attended."""

    def erase(self) -> None:
        """Keep nothing of what was taken back: the stream's state is given out."""


class AttendedIds:
    """The ids of a stream's tokens, and the observers that are told of them.

    Attributes:
        by_row: as long as the rows that were ever written; what is not attended may be anything.
    """

    def __init__(self, cache: Cache, observers: Sequence[StreamObserver]):
        self.cache, self.observers = cache, observers
        self.by_row: list[int] = []
        self._step: tuple[int, Sequence[int]] = (0, ())

    def expect(self, ids: Sequence[int]) -> None:
        """A step that reads these ids is committed next, unless it is interrupted before."""
        self._step = (self.cache.length, ids)

    def record(self) -> None:
        """Take down the ids of the last step, if it was committed."""
        start, ids = self._step
        if ids and self.cache.length > start:
            for token, id in enumerate(ids, start):
                row = self.cache.row(token)
                self.by_row.extend([0] * (row + 1 - len(self.by_row)))
                self.by_row[row] = id
            for observer in self.observers:
                observer.read(ids)
        self._step = (0, ())

    def attended(self, before: int = 0) -> list[int]:
        """Return the ids the newest token attends to, in the order of the text.

        Args:
            before: of the token that many before the newest, to which its successors do not.
        """
        self.record()
        return [self.by_row[row] for row in self.cache.attended_rows(before)]

    def since(self, place: int) -> list[int]:
        """Return the ids of the tokens from a place in the stream on; they are attended."""
        self.record()
        return [self.by_row[self.cache.row(token)] for token in range(place, self.cache.length)]

    def rewind(self, count: int) -> None:
        """The newest `count` tokens have been taken back."""
        if count:
            for observer in self.observers:
                observer.rewind(count)

    def erase(self) -> None:
        """Keep nothing that is not attended."""
        attended = {row: self.by_row[row] for row in self.cache.attended_rows()}
        self.by_row = [attended.get(row, 0) for row in range(max(attended, default=-1) + 1)]
        for observer in self.observers:
            observer.erase()

    def restore(self, by_row: Sequence[int]) -> None:
        """Continue with the ids of a state that the cache has been given."""
        self.by_row, self._step = [*by_row], (0, ())
        self.restart_observers()

    def restart_observers(self) -> None:
        """Have the observers know no more than what is attended: the rest is not to be kept."""
        ids = self.attended()
        for observer in self.observers:
            observer.restart(ids)
