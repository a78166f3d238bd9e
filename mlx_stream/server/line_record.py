"""The turns that a stream has read, as digests, and the search for them; independent of streams."""

from array import array
from collections.abc import Sequence

from mlx_stream.server.conversation import TURN_BYTES


class Record:
    """The turns that a line has read, including evicted ones.

    Attributes:
        digests: `TURN_BYTES` for each turn.
        sizes: the number of tokens in each turn; 0 if it was never read.
        attended: how many of the last turns are attended.
    """

    def __init__(
        self, digests: bytes | bytearray = b"", sizes: Sequence[int] = (), attended: int = 0
    ):
        self.digests, self.sizes, self.attended = bytearray(digests), array("I", sizes), attended

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        return self.digests.__sizeof__() + self.sizes.__sizeof__()

    def copy(self) -> "Record":
        return Record(self.digests, self.sizes, self.attended)

    def add(self, digests: bytes) -> None:
        """Add turns; their sizes are not known yet."""
        self.digests += digests
        self.sizes.extend([0] * (len(digests) // TURN_BYTES))

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` turns."""
        self.attended = max(0, self.attended - (len(self) - count))
        del self.digests[count * TURN_BYTES :], self.sizes[count:]

    def set_attended(self, sizes: Sequence[int]) -> None:
        """Set the sizes of the last turns, which are those attended."""
        self.attended = len(sizes)
        if sizes:
            self.sizes[len(self) - len(sizes) :] = array("I", sizes)

    def find(self, digests: bytes) -> tuple[int, int]:
        """Return where this record contains the longest possible prefix of the given turns.

        Returns:
            The start and end positions; the last ones if there are several. Both are 0 if the
                record does not contain the first turn.
        """
        if self.digests.endswith(digests):
            return len(self) - len(digests) // TURN_BYTES, len(self)
        if self.digests.find(digests[:TURN_BYTES]) < 0:
            return 0, 0
        return find_longest(turns_in(digests), turns_in(self.digests))

    def fits(self, first: int, last: int, window: int) -> bool:
        """Return whether enough of the turns from `first` to `last` is attended.

        Enough means at least half of the tokens that a stream would attend to if it read the newest
        of these turns that fit a window.
        """
        attended = sum(self.sizes[max(first, len(self) - self.attended) : last])
        most = 0
        for size in reversed(self.sizes[first:last]):
            if most and most + size > window:
                break
            most += size
        return attended > 0 and 2 * attended >= min(most, window)


def turns_in(digests: bytes | bytearray) -> list[bytes]:
    return [bytes(digests[at : at + TURN_BYTES]) for at in range(0, len(digests), TURN_BYTES)]


def find_longest(wanted: Sequence[bytes], turns: Sequence[bytes]) -> tuple[int, int]:
    """Return where `turns` last contains the longest possible prefix of `wanted`.

    Uses the Knuth-Morris-Pratt algorithm. For A B C in A B A B D, the prefix is A B, at 2 to 4.
    """
    shorter, best = [0] * len(wanted), (0, 0)  # the longest prefix that is also a suffix

    def extend(count: int, turn: bytes) -> int:
        while count and (count == len(wanted) or wanted[count] != turn):
            count = shorter[count - 1]
        return count + (wanted[count] == turn)

    for at in range(1, len(wanted)):
        shorter[at] = extend(shorter[at - 1], wanted[at])
    count = 0
    for at, turn in enumerate(turns, 1):
        count = extend(count, turn)
        if count and count >= best[1] - best[0]:
            best = at - count, at
    return best
