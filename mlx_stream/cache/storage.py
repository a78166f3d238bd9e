"""What a stream holds, and how a layer's rows lie in memory: as they are, or quantized.

A buffer has S + R rows. Quantized, the first S (the sinks, a pinned prefix among them) stay as they
are and each later row is quantized by itself, in groups of 64 with scales in 16 bits, before
anything attends to it. So what a token sees does not depend on how the text was split.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import mlx.core as mx

from mlx_stream.cache.geometry import StreamPosition

GROUP_SIZE = 64
BITS = (8, 4)


@dataclass(frozen=True)
class CacheState:
    """What a stream holds between steps, exchanged whole: an interrupt finds the old or the new.

    Attributes:
        keys, values: each layer's rows.
        sinks: the sinks' keys before rotation, (L, K, S, D), apart from K: reading them out of K
            would copy K.
        pending_turn: how far the ring is being turned back...
        layers_turned: ...and in how many layers it is.
    """

    position: StreamPosition
    keys: list["Rows"]
    values: list["Rows"]
    sinks: mx.array
    pending_turn: int = 0
    layers_turned: int = 0


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of which the first S are as they are, and the others quantized.

    Attributes:
        sinks: (1, K, S, D).
        quants: (1, K, R, D x bits / 32) uint32.
        scales, biases: (1, K, R, D / 64), 16 bits.
    """

    sinks: mx.array
    quants: mx.array
    scales: mx.array
    biases: mx.array


Rows = Any  # mx.array or QuantizedRows, as the storage says


class RowStorage(Protocol):
    """What a cache asks of its rows. Segments are (source start, source stop, row).

    Attributes:
        clocks: by how many clocks rows may be stored at a time: by one where they are turned back
            when it is lowered; by two where that would cost precision.
    """

    clocks: ClassVar[int]

    def empty(self) -> Rows:
        """Return a layer's rows, all zero: a NaN in a masked row of V would reach the output."""
        ...

    def read(self, rows: Rows, start: int, stop: int, after: mx.array) -> mx.array:
        """Return some rows as they are attended to: (1, K, stop - start, D).

        What must be unpacked is when `after` is there: nothing else orders the layers of a step,
        and those of many would be unpacked at once.
        """
        ...

    def as_attended(self, new: mx.array, sinks: int) -> mx.array:
        """Return new rows as they will be attended to; the first `sinks` of them are sinks."""
        ...

    def write(self, rows: Rows, new: mx.array, segments: list[tuple[int, int, int]]) -> Rows:
        """Return rows with new ones in their places; `rows` itself stays as it was."""
        ...

    def zero(self, rows: Rows, runs: list[tuple[int, int]]) -> Rows:
        """Return rows with zero in those from each run's first to before its last."""
        ...

    def arrays(self, rows: Rows) -> dict[str, mx.array]:
        """Return the arrays of a layer's rows, by what is added to their name."""
        ...

    def from_arrays(self, arrays: dict[str, mx.array]) -> Rows:
        """Return the rows of which `arrays` are the arrays."""
        ...


@dataclass(frozen=True)
class PlainStorage:
    """Rows as they are: one array (1, K, S + R, D)."""

    clocks: ClassVar[int] = 1

    kv_heads: int
    count: int
    head_dim: int
    dtype: mx.Dtype

    def empty(self) -> mx.array:
        return mx.zeros((1, self.kv_heads, self.count, self.head_dim), self.dtype)

    def read(self, rows: mx.array, start: int, stop: int, after: mx.array) -> mx.array:
        return rows if stop - start == self.count else rows[:, :, start:stop]

    def as_attended(self, new: mx.array, sinks: int) -> mx.array:
        return new

    def write(
        self, rows: mx.array, new: mx.array, segments: list[tuple[int, int, int]]
    ) -> mx.array:
        return write_rows(rows, new, segments)

    def zero(self, rows: mx.array, runs: list[tuple[int, int]]) -> mx.array:
        return zero_rows(rows, runs)

    def arrays(self, rows: mx.array) -> dict[str, mx.array]:
        return {"": rows}

    def from_arrays(self, arrays: dict[str, mx.array]) -> mx.array:
        return arrays[""]


@dataclass(frozen=True)
class QuantizedStorage:
    """S rows as they are, R quantized; D is a multiple of 64."""

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
        # Placed all at once they are a view of the chunk, which would be held as long as they are.
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
        """Return rows with one new one in row `start`, int32 (1,), of the ring."""
        parts = zip((rows.quants, rows.scales, rows.biases), self._pack(new), strict=True)
        return QuantizedRows(
            rows.sinks, *(mx.slice_update(part, fresh, start, axes=(2,)) for part, fresh in parts)
        )

    def arrays(self, rows: QuantizedRows) -> dict[str, mx.array]:
        names = (".sinks", ".quants", ".scales", ".biases")
        return dict(zip(names, (rows.sinks, rows.quants, rows.scales, rows.biases), strict=True))

    def from_arrays(self, arrays: dict[str, mx.array]) -> QuantizedRows:
        return QuantizedRows(
            *(arrays[name] for name in (".sinks", ".quants", ".scales", ".biases"))
        )

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
        # In the model's own dtype: what is attended to must not be rounded once more to 16 bits.
        return mx.dequantize(
            quants,
            scales.astype(self.dtype),
            biases.astype(self.dtype),
            group_size=GROUP_SIZE,
            bits=self.bits,
        )


def stream_bytes(
    kv_heads: int, head_dim: int, itemsize: int, sinks: int, ring: int, bits: int | None
) -> int:
    """Return the bytes of one layer of a stream: S + R rows, and the sinks before rotation."""
    whole = head_dim * itemsize
    # A scale and a bias in 16 bits for each group.
    row = whole if bits is None else head_dim * bits // 8 + head_dim // GROUP_SIZE * 4
    return kv_heads * (2 * (sinks * whole + ring * row) + sinks * whole)


def write_rows(rows: mx.array, new: mx.array, segments: list[tuple[int, int, int]]) -> mx.array:
    rows = copy.copy(rows)  # a second handle of the same buffer: the cache's own stays as it is
    for start, stop, row in segments:
        rows[:, :, row : row + stop - start] = new[:, :, start:stop]
    return rows


def zero_rows(rows: mx.array, runs: list[tuple[int, int]]) -> mx.array:
    rows = copy.copy(rows)
    for start, stop in runs:
        rows[:, :, start:stop] = 0
    return rows
