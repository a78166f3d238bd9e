"""The state of a stream, and how a layer's rows are stored: plain or quantized.

A buffer has S + R rows. In a quantized buffer the first S rows (the sinks, including a pinned
prefix) stay plain. Each later row is quantized separately, in groups of 64 with 16-bit scales,
before any token attends to it, so the result does not depend on how the text was split.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from mlx_stream.cache.geometry import StreamPosition

GROUP_SIZE = 64
BITS = (8, 4)


@dataclass(frozen=True)
class CacheState:
    """The state of a stream between steps, replaced as a whole, so that interrupts are safe.

    Attributes:
        keys, values: each layer's rows.
        sinks: the sinks' keys before rotation, (L, K, S, D), in a separate array because reading
            them from K would copy K.
        pending_turn: how far the ring is being rotated back.
        layers_turned: the number of layers for which this is done.
    """

    position: StreamPosition
    keys: list["Rows"]
    values: list["Rows"]
    sinks: mx.array
    pending_turn: int = 0
    layers_turned: int = 0


@dataclass(frozen=True)
class QuantizedRows:
    """Rows, with the first S plain and the rest quantized.

    Attributes:
        sinks: (1, K, S, D).
        quants: (1, K, R, D x bits / 32) uint32.
        scales, biases: (1, K, R, D / 64), 16 bits.
    """

    sinks: mx.array
    quants: mx.array
    scales: mx.array
    biases: mx.array


Rows = Any  # mx.array or QuantizedRows, depending on the storage


@dataclass(frozen=True)
class PlainStorage:
    """Plain rows: one array (1, K, S + R, D). Segments are (source start, source stop, row).

    Attributes:
        clocks: how many clocks the positions of stored rows may follow: one, because rows are
            rotated back when the clock is lowered.
    """

    clocks: ClassVar[int] = 1

    kv_heads: int
    count: int
    head_dim: int
    dtype: mx.Dtype

    def empty(self) -> mx.array:
        """Return zeroed rows for a layer: a NaN in a masked row of V would reach the output."""
        return mx.zeros((1, self.kv_heads, self.count, self.head_dim), self.dtype)

    def read(self, rows: mx.array, start: int, stop: int, after: mx.array) -> mx.array:
        """Return some rows in the form used by attention: (1, K, stop - start, D)."""
        return rows if stop - start == self.count else rows[:, :, start:stop]

    def as_attended(self, new: mx.array, sinks: int) -> mx.array:
        """Return new rows in the form attention will see; the first `sinks` rows are sinks."""
        return new

    def write(
        self, rows: mx.array, new: mx.array, segments: list[tuple[int, int, int]]
    ) -> mx.array:
        """Return `rows` with new rows written into it."""
        return write_rows(rows, new, segments)

    def zero(self, rows: mx.array, runs: list[tuple[int, int]]) -> mx.array:
        """Return `rows` with zeros in each run (first, one past the last)."""
        return zero_rows(rows, runs)

    def arrays(self, rows: mx.array) -> dict[str, mx.array]:
        """Return the arrays that hold a layer's rows, keyed by the suffix of their state names."""
        return {"": rows}

    def from_arrays(self, arrays: dict[str, mx.array]) -> mx.array:
        """Return the rows that these arrays hold; the inverse of `arrays`."""
        return arrays[""]


@dataclass(frozen=True)
class QuantizedStorage:
    """S plain rows and R quantized ones, with the methods of `PlainStorage`; D is a multiple of 64.

    Rows follow two clocks, because rotating them back when the clock is lowered would cost
    precision.
    """

    clocks: ClassVar[int] = 2

    kv_heads: int
    sinks: int
    ring: int
    head_dim: int
    dtype: mx.Dtype
    bits: int

    @property
    def scale_dtype(self) -> mx.Dtype:
        return self.dtype if self.dtype.size == 2 else mx.float16

    def empty(self) -> QuantizedRows:
        shape = (1, self.kv_heads, self.ring)
        groups = (*shape, self.head_dim // GROUP_SIZE)
        return QuantizedRows(
            mx.zeros((1, self.kv_heads, self.sinks, self.head_dim), self.dtype),
            mx.zeros((*shape, self.head_dim * self.bits // 32), mx.uint32),
            mx.zeros(groups, self.scale_dtype),
            mx.zeros(groups, self.scale_dtype),
        )

    def read(self, rows: QuantizedRows, start: int, stop: int, after: mx.array) -> mx.array:
        """Return some rows, which are unpacked only after `after` has been computed.

        Nothing else orders the layers of a step, so otherwise many would be unpacked at once.
        """
        parts = []
        if start < self.sinks:
            parts.append(rows.sinks[:, :, start : min(stop, self.sinks)])
        if stop > self.sinks:
            window = slice(max(start - self.sinks, 0), stop - self.sinks)
            quants, scales, biases = (
                part[:, :, window] for part in (rows.quants, rows.scales, rows.biases)
            )
            (quants,) = mx.depends([quants], [after])
            parts.append(self._unpack(quants, scales, biases))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def as_attended(self, new: mx.array, sinks: int) -> mx.array:
        if sinks >= new.shape[2]:
            return new
        seen = self._unpack(*self._pack(new[:, :, sinks:]))
        return mx.concatenate([new[:, :, :sinks], seen], axis=2) if sinks else seen

    def write(
        self, rows: QuantizedRows, new: mx.array, segments: list[tuple[int, int, int]]
    ) -> QuantizedRows:
        into_sinks = [piece for piece in segments if piece[2] < self.sinks]
        into_ring = [(a, b, row - self.sinks) for a, b, row in segments if row >= self.sinks]
        # Sinks written all at once would be a view of the chunk and keep it in memory.
        parts = [
            mx.contiguous(write_rows(rows.sinks, new, into_sinks)) if into_sinks else rows.sinks
        ]
        packed = self._pack(new) if into_ring else (new, new, new)
        for part, fresh in zip((rows.quants, rows.scales, rows.biases), packed, strict=True):
            parts.append(write_rows(part, fresh, into_ring))
        return QuantizedRows(*parts)

    def zero(self, rows: QuantizedRows, runs: list[tuple[int, int]]) -> QuantizedRows:
        sinks = [(a, min(b, self.sinks)) for a, b in runs if a < self.sinks]
        ring = [(max(a - self.sinks, 0), b - self.sinks) for a, b in runs if b > self.sinks]
        parts = (zero_rows(part, ring) for part in (rows.quants, rows.scales, rows.biases))
        return QuantizedRows(zero_rows(rows.sinks, sinks), *parts)

    def put(self, rows: QuantizedRows, new: mx.array, start: mx.array) -> QuantizedRows:
        """Return a copy of `rows` with a new row in the ring at `start`, an int32 array (1,)."""
        parts = zip((rows.quants, rows.scales, rows.biases), self._pack(new), strict=True)
        return QuantizedRows(
            rows.sinks, *(mx.slice_update(part, fresh, start, axes=(2,)) for part, fresh in parts)
        )

    def arrays(self, rows: QuantizedRows) -> dict[str, mx.array]:
        return {f".{name}": array for name, array in vars(rows).items()}

    def from_arrays(self, arrays: dict[str, mx.array]) -> QuantizedRows:
        return QuantizedRows(**{name[1:]: array for name, array in arrays.items()})

    def scores(self, queries: mx.array, rows: QuantizedRows, ring_rows: int) -> mx.array:
        """Return queries (1, K, T, D) times the ring's keys: (1, K, T, ring_rows)."""
        return self._product(queries, rows, ring_rows, transpose=True)

    def weighted_values(self, weights: mx.array, rows: QuantizedRows, ring_rows: int) -> mx.array:
        """Return weights (1, K, T, ring_rows) times the ring's values: (1, K, T, D)."""
        return self._product(weights, rows, ring_rows, transpose=False)

    def _product(
        self, x: mx.array, rows: QuantizedRows, ring_rows: int, transpose: bool
    ) -> mx.array:
        parts = (rows.quants, rows.scales, rows.biases)
        if ring_rows < self.ring:
            parts = tuple(part[:, :, :ring_rows] for part in parts)
        return mx.quantized_matmul(
            x, *parts, transpose=transpose, group_size=GROUP_SIZE, bits=self.bits
        )

    def _pack(self, rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return mx.quantize(rows.astype(self.scale_dtype), group_size=GROUP_SIZE, bits=self.bits)

    def _unpack(self, quants: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        # In the model's dtype, so that the rows are not rounded to 16 bits a second time.
        return mx.dequantize(
            quants,
            scales.astype(self.dtype),
            biases.astype(self.dtype),
            group_size=GROUP_SIZE,
            bits=self.bits,
        )


RowStorage = PlainStorage | QuantizedStorage


def stream_bytes(
    kv_heads: int, head_dim: int, itemsize: int, sinks: int, ring: int, bits: int | None
) -> int:
    """Return the size in bytes of one layer of a stream: S + R rows, and the unrotated sinks."""
    whole = head_dim * itemsize
    # Each group has a 16-bit scale and a 16-bit bias.
    row = whole if bits is None else head_dim * bits // 8 + head_dim // GROUP_SIZE * 4
    return kv_heads * (2 * (sinks * whole + ring * row) + sinks * whole)


def write_rows(rows: mx.array, new: mx.array, segments: list[tuple[int, int, int]]) -> mx.array:
    rows = copy.copy(rows)  # a second handle to the buffer, so that the cache's is unchanged
    for start, stop, row in segments:
        rows[:, :, row : row + stop - start] = new[:, :, start:stop]
    return rows


def zero_rows(rows: mx.array, runs: list[tuple[int, int]]) -> mx.array:
    rows = copy.copy(rows)
    for start, stop in runs:
        rows[:, :, start:stop] = 0
    return rows
