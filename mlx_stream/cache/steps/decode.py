"""Single-token steps: a token is written to its row and attends to the buffer in any row order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream.cache.attention import AttentionShape
from mlx_stream.cache.geometry import Geometry
from mlx_stream.cache.positions import Rope
from mlx_stream.cache.steps.sinks import place_sinks
from mlx_stream.cache.storage import CacheState, Rows, RowStorage, write_rows

# Query heads that share a key head attend as rows of one head: MLX's unfused attention then reads
# the keys once for all of them. For up to this many rows, Metal's kernel does the same work either
# way, but from this many keys on, it reads them in two passes only if there are fewer key heads.
MOST_ROWS, TWO_PASSES = 8, 4096


@dataclass(frozen=True)
class DecodeKind:
    """What all steps of one kind have in common, so that they share one trace.

    Attributes:
        sinks: S if the step rewrites the sinks' rows, because o moves with each token; else 0.
        prefix_rows: the number of leading rows to attend to.
        spare: how many of these rows to exclude when the window is full: those written next.
        steady: whether all later steps are of the same kind, because the window is full.
    """

    shape: AttentionShape
    sinks: int
    prefix_rows: int
    spare: int = 0
    steady: bool = False

    def attended_mask(self, row: mx.array) -> mx.array:
        """Return which rows the token in `row`, int32 (1,), attends to: (1, N) bool."""
        ring, columns = self.prefix_rows - self.sinks, np.arange(self.prefix_rows)
        # Add a multiple of the ring size to keep it positive: remainders of negatives vary by
        # backend.
        turns = ring * -(-self.prefix_rows // ring)
        latest = np.where(columns < self.sinks, ring, ring - self.spare - 1)
        ages = mx.remainder(row + mx.array(turns - columns, mx.int32), ring)
        return (ages <= mx.array(latest, mx.int32))[None]


class DecodeStep:
    """A single-token step over unquantized rows.

    Args:
        kind: the properties that do not change from step to step.
        arrays: the arrays that do: `position` and `row` (1,) int32; `keys` and `values` by layer;
            `mask` (1, prefix_rows) bool unless it follows from the kind; if the sinks are
            rewritten, `sinks` (L, K, S, D), not rotated, and `sinks_at` (1,) int32.
        is_sink: whether the token is a sink.
        sinks_at: the position of the sinks' rows after the step.
    """

    count, rows = 1, 1

    def __init__(
        self,
        kind: DecodeKind,
        arrays: dict[str, Any],
        is_sink: bool = False,
        sinks_at: int = -1,
    ):
        self.kind, self.arrays = kind, arrays
        self.is_sink, self.sinks_at = is_sink, sinks_at
        self.rotations: dict[Rope, Callable[[mx.array], mx.array]] = {}
        self.turned_sinks: mx.array | None = None
        self.mask: mx.array | None = arrays.get("mask")
        self.keys: list[Rows] = []
        self.values: list[Rows] = []
        self.new_sinks: list[mx.array] = []

    @classmethod
    def plan(
        cls, shape: AttentionShape, storage: RowStorage, geometry: Geometry, state: CacheState
    ) -> "DecodeStep":
        """Plan the step for a stream's next token."""
        position = state.position
        token = position.length
        is_sink, prefix_rows = token < geometry.sinks, geometry.prefix_rows(token)
        # If o moves with each token, the step itself rotates the sinks. If not, they are already in
        # place, or are put there once.
        oldest = geometry.oldest(position, token)
        full = not is_sink and token - oldest == geometry.window - 1
        steady = full and prefix_rows == geometry.rows
        mask = None if steady else geometry.decode_mask(position, prefix_rows)
        moves = full and geometry.sinks > 0
        arrays: dict[str, Any] = {
            "position": mx.array([position.clock], mx.int32),
            "row": mx.array([geometry.row(token)], mx.int32),
            "values": [*state.values],
        }
        if mask is not None:
            arrays["mask"] = mx.array(mask)[None]
        if moves:
            sinks_at = geometry.sinks_clock(position, token)
            at = mx.array([sinks_at], mx.int32)
            arrays |= {"keys": [*state.keys], "sinks": state.sinks, "sinks_at": at}
        else:
            keys, sinks_at = place_sinks(shape, storage, geometry, state, token)
            arrays["keys"] = [*keys]
        spare = geometry.spare if steady else 0
        kind = DecodeKind(shape, geometry.sinks if moves else 0, prefix_rows, spare, steady)
        return cls(kind, arrays, is_sink, sinks_at)

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        shape = self.kind.shape
        plain, values = mx.split(heads, [heads.shape[1] - shape.kv_heads], axis=1)
        if self.is_sink:
            self.new_sinks.append(plain[:, shape.query_heads :])
        rope = shape.ropes[layer]
        if rope not in self.rotations:
            self.rotations[rope] = rope.token_rotation(self.arrays["position"], plain.shape[1])
        queries, keys = mx.split(self.rotations[rope](plain), [shape.query_heads], axis=1)
        return self.attend_rotated(layer, queries, keys, values)

    def attend_rotated(
        self, layer: int, queries: mx.array, new_keys: mx.array, new_values: mx.array
    ) -> mx.array:
        """Write a token's rotated key and its value, then attend; return (1, H, 1, D).

        Args:
            queries: (1, H, 1, D), rotated.
            new_keys, new_values: (1, K, 1, D).
        """
        kind, arrays = self.kind, self.arrays
        keys, values = arrays["keys"][layer], arrays["values"][layer]
        if kind.sinks:
            if self.turned_sinks is None:
                self.turned_sinks = kind.shape.rotate_layers(arrays["sinks"], arrays["sinks_at"])
            keys = write_rows(keys, self.turned_sinks[layer : layer + 1], [(0, kind.sinks, 0)])
        keys = mx.slice_update(keys, new_keys, arrays["row"], axes=(2,))
        values = mx.slice_update(values, new_values, arrays["row"], axes=(2,))
        self.keys.append(keys)
        self.values.append(values)
        if kind.prefix_rows < keys.shape[2]:
            keys, values = keys[:, :, : kind.prefix_rows], values[:, :, : kind.prefix_rows]
        if kind.spare and self.mask is None:
            self.mask = kind.attended_mask(arrays["row"])
        shape, per_key_head = kind.shape, kind.shape.query_heads // kind.shape.kv_heads
        grouped = 1 < per_key_head <= MOST_ROWS and keys.shape[2] < TWO_PASSES
        if grouped:
            queries = queries.reshape(1, shape.kv_heads, per_key_head, -1)
        out = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=shape.scale(layer), mask=self.mask
        )
        return out.reshape(1, shape.query_heads, 1, -1) if grouped else out

    def finish(self, keys: list[Rows], values: list[Rows]) -> None:
        """Adopt the rows that a trace of this step computed, and release the old ones."""
        self.keys, self.values, self.arrays = keys, values, {}
