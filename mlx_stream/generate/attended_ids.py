"""The ids of the tokens that a stream attends to, by row of the cache."""

from collections.abc import Sequence
from typing import Protocol

from mlx_stream.cache import Cache


class StreamObserver(Protocol):
    """Follows what a stream reads, in order to predict what it will read next."""

    def read(self, ids: Sequence[int]) -> None:
        """Add ids that the stream has read."""

    def rewind(self, count: int) -> None:
        """Remove the newest `count` ids."""

    def restart(self, ids: Sequence[int]) -> None:
        """Forget everything and start from the attended ids of another stream."""

    def erase(self) -> None:
        """Remove every trace of ids that were rolled back."""


class AttendedIds:
    """Records the ids of a stream's tokens and passes them to observers.

    Attributes:
        by_row: the id in each row written so far; rows that are not attended to may hold any id.
    """

    def __init__(self, cache: Cache, observers: Sequence[StreamObserver]):
        self.cache, self.observers = cache, observers
        self.by_row: list[int] = []
        self._step: tuple[int, Sequence[int]] = (0, ())

    def expect(self, ids: Sequence[int]) -> None:
        """Announce the ids of the next step, which an interrupt may keep from being committed."""
        self._step = (self.cache.length, ids)

    def record(self) -> None:
        """Record the ids of the last step if it was committed."""
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
        """Return the ids that the newest token attends to, in text order.

        Args:
            before: use the token this many before the newest one instead.
        """
        self.record()
        return [self.by_row[row] for row in self.cache.attended_rows(before)]

    def since(self, place: int) -> list[int]:
        """Return the ids from a position in the stream to its end; all must be attended to."""
        self.record()
        return [self.by_row[self.cache.row(token)] for token in range(place, self.cache.length)]

    def rewind(self, count: int) -> None:
        """Tell the observers that the newest `count` tokens were rolled back."""
        if count:
            for observer in self.observers:
                observer.rewind(count)

    def erase(self) -> None:
        """Erase the ids that are not attended to, here and in the observers."""
        attended = {row: self.by_row[row] for row in self.cache.attended_rows()}
        self.by_row = [attended.get(row, 0) for row in range(max(attended, default=-1) + 1)]
        for observer in self.observers:
            observer.erase()

    def restore(self, by_row: Sequence[int]) -> None:
        """Replace the ids after the cache has been restored."""
        self.by_row, self._step = [*by_row], (0, ())
        self.restart_observers()

    def restart_observers(self) -> None:
        """Restart the observers from the attended ids, so that they forget the rest."""
        ids = self.attended()
        for observer in self.observers:
            observer.restart(ids)
