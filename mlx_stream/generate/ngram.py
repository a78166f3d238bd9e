"""Guesses ids from those that a stream has read, evicted ones included; independent of models.

A guess is what followed the last occurrence of the newest few ids. All storage has a fixed size: a
ring of ids and, for each pattern length, a hash table of where each pattern last ended. An entry
may be wrong (patterns can collide, and the ring overwrites old ids), so it is checked in the ring.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

CAPACITY = 65_536
LENGTHS = (2, 3, 4, 6)  # the lengths of patterns, in ids
ENTRIES = 2**17  # in each table
LONGEST_MATCH = 32


@dataclass(frozen=True)
class NgramDraft:
    """Ids that may come next.

    Attributes:
        matched: how many of the newest ids match those of the earlier occurrence.
    """

    ids: tuple[int, ...] = ()
    matched: int = 0


class NgramLookup:
    """A lookup in the last 65,536 ids of a stream; adding an id and guessing take constant time.

    Worked example: the stream is 5 6 7 8 9 5 6 and the next id is 7. The pattern 5 6 7 occurred
    before, followed by 8 9 5 6, so the guess is 8 9 5 6 7 8 ...: past the end, it repeats.
    """

    def __init__(self, kept: int = CAPACITY):
        self.capacity, self.count = kept, 0
        self._floor = 0  # the number of the oldest id still in the ring
        self._ids = array("I", bytes(4 * kept))
        # `_tables` maps a pattern to 1 + the slot of its last id; `_before` maps a slot to the
        # entry's previous value, so that a rewind restores the tables exactly.
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
        """Remove the newest `count` ids, or all that are still in the ring."""
        for _ in range(min(count, self.count - self._floor)):
            self.count -= 1
            slot = self.count % self.capacity
            for n, entry in self._entries(self._ids[slot]):
                self._tables[n][entry] = self._before[n][slot]
                self._before[n][slot] = 0
            self._ids[slot] = 0

    def restart(self, ids: Sequence[int]) -> None:
        """Forget everything and start from these ids."""
        self.__init__(self.capacity)
        self.read(ids)

    def erase(self) -> None:
        """Do nothing: `rewind` has already erased the ids."""

    def draft(self, next: int, most: int) -> NgramDraft:
        """Guess up to `most` ids after `next`, which has not been added yet."""
        for n, entry in reversed(self._entries(next)):
            slot = self._tables[n][entry]
            if slot:
                end = self.count - 1 - (self.count - slot) % self.capacity
                matched = self._matched(end, next)
                if matched >= n:
                    return NgramDraft(self._following(end, next, most), matched)
        return NgramDraft()

    def _entries(self, newest: int) -> list[tuple[int, int]]:
        """Return each pattern length, and the table index of the pattern ending in `newest`."""
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
        """Return how many ids up to id number `end` match the newest ids followed by `next`."""
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
