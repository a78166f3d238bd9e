"""Which row, which clock and which mask: whole numbers and numpy only, no MLX, no keys.

Token t < S is in row t, a later one in row S + (t - S) mod R. Worked example: with 2 sinks and a
ring of 3, after token 6 the rows hold tokens 0, 1, 5, 6, 4. A stream's numbers may be as large as
2^62; every array made here holds ages and rows, which do not grow.
"""

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

# The lengths of a step: a tail of a prompt is padded to one of these, so that arrays come in few
# sizes and the allocator's cache of freed buffers stays small.
STEP_LENGTHS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Before the ring is full only its first rows are attended, in few sizes: this, doubled at need.
FIRST_EXTENT = 256
# Sizes for a chunk, of which no step is traced, are this much apart, later an eighth to a quarter.
EXTENT_STEP = 128
# Rows of a chunk that attend at once: fewer pay for more products, more for columns that only
# some of them see.
BLOCK = 64

# Stands for "not attended" in an additive mask: finite, so that no row can become NaN.
NOT_ATTENDED = -1e30


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream stands.

    Attributes:
        length: tokens read; the next is t = length.
        floor: the lowest token in the ring that may still be attended (S in a young stream).
        clock: rotary position at which the next token will be stored.
        sinks_at: position at which the sinks' rows in the buffers stand; -1 if not known.
        since: the first token that was stored by this clock...
        lag: ...and how much lower the clock is than the one before it, by which earlier tokens were
            stored that are not turned back. Only quantized rows are not: that would cost precision.
    """

    length: int
    floor: int
    clock: int
    sinks_at: int = 0
    clock_epoch: int = 0
    clock_offset: int = 0


@dataclass(frozen=True)
class Geometry:
    """The fixed numbers of a stream: S sinks, W window, X spare rows."""

    sinks: int
    window: int
    spare: int = 0

    @functools.cached_property
    def ring(self) -> int:
        return self.window + self.spare

    @functools.cached_property
    def rows(self) -> int:
        return self.sinks + self.ring

    def row(self, token: int) -> int:
        """Return the row of a token: t itself for sinks, else S + (t - S) mod R."""
        if token < self.sinks:
            return token
        return self.sinks + (token - self.sinks) % self.ring

    def oldest(self, position: StreamPosition, token: int) -> int:
        """Return o for a token: the first attended one that is not a sink (rule 1)."""
        return max(position.floor, token - self.window + 1)

    def ring_count(self, position: StreamPosition) -> int:
        """Return how many ring tokens the newest token attends to."""
        return max(0, position.length - self.oldest(position, position.length - 1))

    def room(self, position: StreamPosition) -> int:
        """Return how many tokens can still be read before o has to move."""
        return max(0, position.floor + self.window - position.length)

    def sinks_clock(self, position: StreamPosition, token: int) -> int:
        """Return the clock at which sink 0 must stand for a token: the sinks end before o."""
        base = position.length - position.clock
        return self.oldest(position, token) - base - self.sinks

    def advance(self, position: StreamPosition, count: int, sinks_at: int) -> StreamPosition:
        """Return the position after `count` more tokens, the sinks' rows standing at `sinks_at`."""
        length = position.length + count
        # What is more than R tokens back has been overwritten and cannot come back by a rewind.
        floor = max(position.floor, length - self.ring)
        # Not by `replace`, which would be a fiftieth of a step's Python.
        return StreamPosition(
            length,
            floor,
            position.clock + count,
            sinks_at,
            position.clock_epoch,
            position.clock_offset,
        )

    def rewind(self, position: StreamPosition, count: int) -> StreamPosition:
        """Return the position once the newest `count` tokens have been taken back."""
        length = position.length - count
        epoch = min(position.clock_epoch, length)
        return replace(position, length=length, clock=position.clock - count, clock_epoch=epoch)

    def lower_clock(self, position: StreamPosition) -> StreamPosition:
        """Return the position with the clock lowered so that the lowest token stands behind S."""
        offset = position.clock - position.length + position.floor - self.sinks
        clock = position.clock - offset
        return replace(
            position, clock=clock, sinks_at=-1, clock_epoch=position.length, clock_offset=offset
        )

    def prefix_rows(self, last: int) -> int:
        """Return how many leading rows hold every token up to `last`."""
        prefix_rows = FIRST_EXTENT
        while prefix_rows <= last and prefix_rows < self.rows:
            prefix_rows *= 2
        return min(prefix_rows, self.rows)

    def chunk_prefix_rows(self, last: int) -> int:
        """Return the same in finer steps: each row of them is attended by all of a chunk's."""
        step = EXTENT_STEP
        while 8 * step <= last:
            step *= 2
        return min((last // step + 1) * step, self.rows)

    def segments(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Return where new tokens go: (source start, source stop, row), none across the wrap.

        Of more than R ring tokens only the last R are stored.
        """
        pieces = []
        into_sinks = min(max(self.sinks - first, 0), count)
        if into_sinks:
            pieces.append((0, into_sinks, first))
        source = max(into_sinks, count - self.ring)
        while source < count:
            row = self.row(first + source)
            stop = min(count, source + self.rows - row)
            pieces.append((source, stop, row))
            source = stop
        return pieces

    def unattended_runs(self, attended: Sequence[int]) -> list[tuple[int, int]]:
        """Return the runs of rows, first and one past the last, that are not among `attended`.

        With rows 0, 1, 5, 6, 4 of 8: (2, 4) and (7, 8).
        """
        edges = np.zeros(self.rows + 2, np.int8)
        edges[1:-1] = 1
        edges[np.array([*attended], int) + 1] = 0
        changes = np.diff(edges)
        starts, stops = (np.flatnonzero(changes == by).tolist() for by in (1, -1))
        return list(zip(starts, stops, strict=True))

    def decode_mask(self, position: StreamPosition, prefix_rows: int) -> np.ndarray | None:
        """Return which rows the next token attends to, itself stored: (prefix_rows,) bool, or None.

        None if that is all of them.
        """
        token = position.length
        attended = token - self.oldest(position, token)
        if prefix_rows == self.rows and token >= self.sinks and attended == self.ring - 1:
            return None
        mask = np.empty(prefix_rows, bool)
        sinks = min(self.sinks, prefix_rows)
        mask[:sinks] = np.arange(sinks) <= token
        mask[sinks:] = self.ages(token, prefix_rows) <= attended
        return mask

    def chunk_mask(self, position: StreamPosition, prefix_rows: int, rows: int) -> np.ndarray:
        """Return what each new row attends to: (T, prefix_rows + T) bool.

        Columns are the buffer's rows as they were before the step, then the new tokens.
        """
        first = position.length
        # Ages are counted back from the first new token; -reach is the oldest new one attended.
        reach = np.minimum(
            min(first - position.floor, self.window), self.window - 1 - np.arange(rows)
        )[:, None]
        mask = np.empty((rows, prefix_rows + rows), bool)
        sinks = min(self.sinks, prefix_rows)
        mask[:, :sinks] = np.arange(sinks) < first
        mask[:, sinks:prefix_rows] = self.ages(first - 1, prefix_rows) + 1 <= reach
        new = np.arange(rows)[None, :]
        is_sink = new < min(max(self.sinks - first, 0), rows)
        mask[:, prefix_rows:] = (new <= new.T) & (is_sink | (new >= -reach))
        return mask

    def blocks(self, rows: int) -> list["Block"]:
        """Return the parts in which a chunk's rows attend, the window being full.

        Columns are the W - 1 newest tokens of before, oldest first, the sinks, and the new tokens:
        so what a part's rows attend to lies side by side.
        """
        return [self._block(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]

    def _block(self, start: int, stop: int) -> "Block":
        old, sinks = self.window - 1, self.sinks
        first = min(start, old)  # row t sees the tokens of before from the t-th on
        token = np.arange(start, stop)[:, None]
        new = np.arange(stop)[None]
        mask = np.ones((stop - start, old - first + sinks + stop), bool)
        mask[:, : old - first] = np.arange(first, old) >= token
        mask[:, old - first + sinks :] = (new <= token) & (new > token - self.window)
        return Block(start, stop, first, old - first, mask)

    def old_clock_mask(
        self, position: StreamPosition, prefix_rows: int, newest: int
    ) -> np.ndarray | None:
        """Return which rows hold tokens stored by the clock before: (prefix_rows,) bool, or None.

        None if no row that `newest` attends to does. What nothing attends to does not matter.

        Args:
            newest: the last token that is stored.
        """
        if position.clock_epoch <= self.oldest(position, newest):
            return None
        old = np.zeros(prefix_rows, bool)
        old[self.sinks :] = self.ages(newest, prefix_rows) > newest - position.clock_epoch
        return old

    def ages(self, newest: int, prefix_rows: int) -> np.ndarray:
        """Return how many tokens before `newest` each ring row was written."""
        slot = (newest - self.sinks) % self.ring
        return (slot - np.arange(max(0, prefix_rows - self.sinks))) % self.ring


@dataclass(frozen=True)
class Block:
    """Some of a chunk's rows, and the columns that one or another of them attends to.

    Attributes:
        start, stop: its rows.
        first: its first column; of the next `sinks_at` are the ring's, then come the sinks.
        mask: (stop - start, columns) bool.
    """

    start: int
    stop: int
    first: int
    sinks_at: int
    mask: np.ndarray


def pad_length(count: int) -> int:
    """Return the smallest step length that holds `count` tokens."""
    return STEP_LENGTHS[bisect_left(STEP_LENGTHS, count)]
