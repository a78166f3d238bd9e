"""Computes rows, clocks and masks with integers and numpy only; independent of MLX.

Token t < S is in row t, a later one in row S + (t - S) mod R. Worked example: with 2 sinks and a
ring of 3, after token 6 the rows hold tokens 0, 1, 5, 6, 4. Token numbers may be as large as 2^62;
the arrays made here hold only ages and rows, which do not grow.
"""

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

# The allowed lengths of a step. The rest of a prompt is padded to one of these, so that arrays come
# in few sizes and the allocator's cache of freed buffers stays small.
STEP_LENGTHS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Until the ring is full, a step attends only to its first rows: this many, doubled as needed.
FIRST_EXTENT = 256
# A chunk's step is not traced, so it can use more sizes: this far apart at first, then spaced by
# 1/8 to 1/4 of the size.
EXTENT_STEP = 128
# Rows of a chunk that attend together. Smaller blocks need more products; in larger ones, more
# columns are masked for most rows.
BLOCK = 64

# "Not attended" in an additive mask: finite, so that no row can become NaN.
NOT_ATTENDED = -1e30


@dataclass(frozen=True)
class StreamPosition:
    """The position of a stream.

    Attributes:
        length: the number of tokens read; the next token is t = length.
        floor: the lowest token in the ring that may still be attended (S until the ring wraps).
        clock: the rotary position of the next token.
        sinks_at: the position of the sinks' rows in the buffers; -1 if unknown.
        clock_epoch: the first token stored under the current clock.
        clock_offset: how far the clock was lowered at that point. Quantized rows stored earlier
            keep their old positions, because rotating them back would cost precision.
    """

    length: int
    floor: int
    clock: int
    sinks_at: int = 0
    clock_epoch: int = 0
    clock_offset: int = 0


@dataclass(frozen=True)
class Geometry:
    """The fixed dimensions of a stream: S sinks, a window of W tokens, X spare rows."""

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
        """Return o for a token: the oldest token it attends to that is not a sink."""
        return max(position.floor, token - self.window + 1)

    def ring_count(self, position: StreamPosition) -> int:
        """Return how many tokens in the ring the newest token attends to."""
        return max(0, position.length - self.oldest(position, position.length - 1))

    def room(self, position: StreamPosition) -> int:
        """Return how many more tokens can be read before o must move."""
        return max(0, position.floor + self.window - position.length)

    def sinks_clock(self, position: StreamPosition, token: int) -> int:
        """Return the clock position of sink 0 for a token: the sinks end directly before o."""
        base = position.length - position.clock
        return self.oldest(position, token) - base - self.sinks

    def advance(self, position: StreamPosition, count: int, sinks_at: int) -> StreamPosition:
        """Return the position after `count` more tokens, with the sinks' rows at `sinks_at`."""
        length = position.length + count
        # A token more than R back has been overwritten, and a rewind cannot bring it back.
        floor = max(position.floor, length - self.ring)
        # Not with `replace`, which would take 2% of a step's Python time.
        return StreamPosition(
            length,
            floor,
            position.clock + count,
            sinks_at,
            position.clock_epoch,
            position.clock_offset,
        )

    def rewind(self, position: StreamPosition, count: int) -> StreamPosition:
        """Return the position after rolling back the newest `count` tokens."""
        length = position.length - count
        epoch = min(position.clock_epoch, length)
        return replace(position, length=length, clock=position.clock - count, clock_epoch=epoch)

    def lower_clock(self, position: StreamPosition) -> StreamPosition:
        """Return the position with the clock lowered so that the lowest token is at position S."""
        offset = position.clock - position.length + position.floor - self.sinks
        clock = position.clock - offset
        return replace(
            position, clock=clock, sinks_at=-1, clock_epoch=position.length, clock_offset=offset
        )

    def prefix_rows(self, last: int) -> int:
        """Return how many leading rows hold all tokens up to `last`, rounded up to a fixed size."""
        prefix_rows = FIRST_EXTENT
        while prefix_rows <= last and prefix_rows < self.rows:
            prefix_rows *= 2
        return min(prefix_rows, self.rows)

    def chunk_prefix_rows(self, last: int) -> int:
        """Like `prefix_rows` in finer steps, because each row is multiplied by a whole chunk."""
        step = EXTENT_STEP
        while 8 * step <= last:
            step *= 2
        return min((last // step + 1) * step, self.rows)

    def segments(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Return where new tokens go: (source start, source stop, row), split at the wrap.

        If there are more than R ring tokens, only the last R are stored.
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
        """Return the runs of rows that are not in `attended`, as (first, one past the last).

        Worked example: with 8 rows, of which 0, 1, 5, 6 and 4 are attended: (2, 4) and (7, 8).
        """
        edges = np.zeros(self.rows + 2, np.int8)
        edges[1:-1] = 1
        edges[np.array([*attended], int) + 1] = 0
        changes = np.diff(edges)
        starts, stops = (np.flatnonzero(changes == by).tolist() for by in (1, -1))
        return list(zip(starts, stops, strict=True))

    def decode_mask(self, position: StreamPosition, prefix_rows: int) -> np.ndarray | None:
        """Return which rows the next token will attend to once it is stored: (prefix_rows,) bool.

        Returns None if it attends to all of them.
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
        # Ages count back from the first new token; a negative reach means that only new tokens from
        # -reach on are attended.
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
        """Return the blocks of rows into which a chunk is split when the window is full.

        The columns are the last W - 1 old tokens, oldest first, then the sinks, then the new
        tokens. In this order, the columns of each block are contiguous.
        """
        return [self._block(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]

    def _block(self, start: int, stop: int) -> "Block":
        old, sinks = self.window - 1, self.sinks
        first = min(start, old)  # row t attends to the old tokens from index t on
        token = np.arange(start, stop)[:, None]
        new = np.arange(stop)[None]
        mask = np.ones((stop - start, old - first + sinks + stop), bool)
        mask[:, : old - first] = np.arange(first, old) >= token
        mask[:, old - first + sinks :] = (new <= token) & (new > token - self.window)
        return Block(start, stop, first, old - first, mask)

    def old_clock_mask(
        self, position: StreamPosition, prefix_rows: int, newest: int
    ) -> np.ndarray | None:
        """Return which rows hold tokens stored before the clock was lowered: (prefix_rows,) bool.

        Returns None if `newest` attends to no such row. Rows that are not attended may have either
        value.

        Args:
            newest: the last token stored.
        """
        if position.clock_epoch <= self.oldest(position, newest):
            return None
        old = np.zeros(prefix_rows, bool)
        old[self.sinks :] = self.ages(newest, prefix_rows) > newest - position.clock_epoch
        return old

    def ages(self, newest: int, prefix_rows: int) -> np.ndarray:
        """Return each ring row's age: how many tokens before `newest` it was written."""
        slot = (newest - self.sinks) % self.ring
        return (slot - np.arange(max(0, prefix_rows - self.sinks))) % self.ring


@dataclass(frozen=True)
class Block:
    """A block of a chunk's rows, and the columns that any of them attends to.

    Attributes:
        start, stop: the rows.
        first: the first column; the block has `sinks_at` columns of the ring, then the sinks.
        mask: (stop - start, columns) bool.
    """

    start: int
    stop: int
    first: int
    sinks_at: int
    mask: np.ndarray


def pad_length(count: int) -> int:
    """Return the shortest step length that fits `count` tokens."""
    return STEP_LENGTHS[bisect_left(STEP_LENGTHS, count)]
