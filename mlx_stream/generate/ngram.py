"""The ids a stream has read, evicted ones included, and what followed them; knows no model.

A guess is what followed the last occurrence of the newest few ids. Everything has a fixed size: a
ring of ids, and for each length of a pattern a table of where it ended last. A table may be wrong
(two patterns share an entry, or the ring has gone on), so what it says is looked up in the ring.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

CAPACITY = 65_536
LENGTHS = (2, 3, 4, 6)  # of patterns
ENTRIES = 2**17  # of a table
LONGEST_MATCH = 32


@dataclass(frozen=True)
class NgramDraft:
    """Ids that may come next.

    Attributes:
        matched: how many of the newest ids are those before the occurrence it was taken from.
    """

    ids: tuple[int, ...] = ()
    matched: int = 0


class NgramLookup:
    """The last 65,536 ids of a stream; adding one and guessing take the same time for ever.

    Worked example: after 5 6 7 8 9 5 6 the next id being 7, the newest three ids ended at the
    third token before, so the guess is 8 9 5 6 7 8 ...: what is guessed goes on with itself.
    """

    def __init__(self, kept: int = CAPACITY):
        self.capacity, self.count = kept, 0
        self._floor = 0  # the oldest id that is still in the ring
        self._ids = array("I", bytes(4 * kept))
        # By pattern: 1 + the slot of its last id. And by slot: what the entry said before, so that
        # taking ids back leaves the tables as they were.
        self._tables = {n: array("I", bytes(4 * ENTRIES)) for n in LENGTHS}
        self._before = {n: array("I", bytes(4 * kept)) for n in LENGTHS}

    def read(self, ids: Sequence[int]) -> None:
        """Add ids."""
        for id in ids:
            slot = self.count % self.capacity
            for n, entry in self._entries(id):
                table = self._tables[n]
                self._before[n][slot] = table[entry]
                table[entry] = slot + 1
            self._ids[slot] = id
            self.count += 1
            self._floor = max(self._floor, self.count - self.capacity)

    def rewind(self, count: int) -> None:
        """Take back the newest ids, or all that are known."""
        for _ in range(min(count, self.count - self._floor)):
            self.count -= 1
            slot = self.count % self.capacity
            for n, entry in self._entries(self._ids[slot]):
                self._tables[n][entry] = self._before[n][slot]
                self._before[n][slot] = 0
            self._ids[slot] = 0

    def restart(self, ids: Sequence[int]) -> None:
        """Forget everything; begin with these ids."""
        self.__init__(self.capacity)
        self.read(ids)

    def erase(self) -> None:
        """Do nothing: what is taken back is erased at once."""

    def draft(self, next: int, most: int) -> NgramDraft:
        """Guess up to `most` ids that follow `next`, itself not added yet."""
        for n, entry in reversed(self._entries(next)):
            slot = self._tables[n][entry]
            if slot:
                end = self.count - 1 - (self.count - slot) % self.capacity
                matched = self._matched(end, next)
                if matched >= n:
                    return NgramDraft(self._following(end, next, most), matched)
        return NgramDraft()

    def _entries(self, newest: int) -> list[tuple[int, int]]:
        """Return each length and its entry in the table for the pattern that `newest` ends."""
        found, mixed = [], newest
        for back in range(1, LENGTHS[-1]):
            at = self.count - back
            if at < self._floor:
                break
            mixed = (mixed * 0x9E3779B1 + self._ids[at % self.capacity] + 1) & 0xFFFFFFFF
            if back + 1 in self._tables:
                found.append((back + 1, (mixed ^ mixed >> 15) % ENTRIES))
        return found

    def _matched(self, end: int, next: int) -> int:
        """Return how many ids up to the one numbered `end` are the newest ones, `next` the last."""
        matched = 0
        while matched < LONGEST_MATCH and self._floor <= min(end, self.count) - matched:
            newest = self._ids[(self.count - matched) % self.capacity] if matched else next
            if self._ids[(end - matched) % self.capacity] != newest:
                break
            matched += 1
        return matched

    def _following(self, end: int, next: int, most: int) -> tuple[int, ...]:
        following: list[int] = []
        for at in range(end + 1, end + 1 + most):
            if at < self.count:
                following.append(self._ids[at % self.capacity])
            elif at == self.count:
                following.append(next)
            else:
                following.append(following[at - self.count - 1])
        return tuple(following)
