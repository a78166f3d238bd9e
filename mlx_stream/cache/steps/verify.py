"""A step of a few tokens that can be rolled back: all are written to the ring, then all attend.

With R = W + X and at most X + 1 tokens per step, the step overwrites no row that any of its tokens
attends to, and all but the first can be rolled back without loss. Worked example, S = 2, W = 3,
X = 2, tokens 7, 8, 9 after token 6 (rows 2 to 6 are the ring):

    before   [ 0  1 | 2  3  4  5  6 ]        7, 8, 9 go to the rows of 2, 3, 4
    after    [ 0  1 | 7  8  9  5  6 ]        7 attends to 5, 6, 7; 8 to 6, 7, 8; 9 to 7, 8, 9

A chunk instead concatenates the old buffer and its own rows. For a few tokens, that copy of all
keys and values costs more than the computation.
"""

import mlx.core as mx
import numpy as np

from mlx_stream.cache.attention import AttentionShape
from mlx_stream.cache.geometry import NOT_ATTENDED, Geometry, StreamPosition
from mlx_stream.cache.steps.sinks import place_sinks
from mlx_stream.cache.storage import CacheState, PlainStorage

# Metal's fused attention takes up to 8 rows of queries, and up to 32 in total over the heads that
# share a key.
MOST_ROWS = 8
SPARE = MOST_ROWS - 1  # rows beyond the window: a step's first token is never rolled back
MOST_GROUPED_ROWS = 32


def longest_verified(shape: AttentionShape, geometry: Geometry, position: StreamPosition) -> int:
    """Return the length of the longest step that can be rolled back to its first token, at least 1.

    The limits are the spare rows, the rows that Metal's fused attention takes, and, as in any step,
    the room before the oldest token must be evicted.
    """
    if position.length < geometry.sinks:
        return 1
    longest = min(
        MOST_ROWS,
        MOST_GROUPED_ROWS // (shape.query_heads // shape.kv_heads),
        geometry.spare + 1,
        geometry.window + 1,  # only attended tokens can be rolled back
        geometry.room(position) or MOST_ROWS,
    )
    return max(1, longest)


def spare_rows(bits: int | None) -> int:
    """Return X for a stream that generates text: quantized rows cannot be rolled back."""
    return SPARE if bits is None else 0


class VerifyStep:
    """The step of T <= X + 1 tokens beyond the sinks: all are written, and then all attend.

    Each token has its own o. If o moves within the step, the sinks' rows are right for the first
    token only, and an additive mask corrects the other tokens' scores. The mask holds the exact
    scores, computed from queries rotated to the constant position S + W - 1, minus the rows'
    scores. The difference is small, so half precision rounds it no more than it rounds queries and
    keys.
    """

    def __init__(
        self,
        shape: AttentionShape,
        storage: PlainStorage,
        geometry: Geometry,
        state: CacheState,
        count: int,
    ):
        self.shape, self.count, self.rows = shape, count, count
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []
        self.new_sinks: list[mx.array] = []
        position = state.position
        first = position.length
        self.moves = geometry.room(position) == 0 and geometry.sinks > 0
        self.old_keys, self.sinks_at = place_sinks(shape, storage, geometry, state, first)
        self.old_values = state.values
        self.prefix_rows = geometry.prefix_rows(first + count - 1)
        self.position = mx.array([position.clock], mx.int32)
        self.pieces = [
            (start, stop, mx.array([row], mx.int32))
            for start, stop, row in geometry.segments(first, count)
        ]
        self.mask = mx.array(attended_rows(geometry, position, self.prefix_rows, count))
        if self.moves:
            self.far = geometry.window - 1 + geometry.sinks
            self._prepare_sinks(state.sinks.astype(mx.float32))

    def _prepare_sinks(self, sink_keys: mx.array) -> None:
        rotate, sinks = self.shape.rotate_layers, sink_keys.shape[2]
        # Rotated again, because reading the buffer's own rows here would copy the buffer.
        placed = rotate(sink_keys, mx.array([self.sinks_at], mx.int32))
        first = rotate(sink_keys, mx.array([0], mx.int32))
        # (L, K, 2D, S): multiplying the concatenated queries and far queries by this gives the
        # difference.
        self.sink_difference = mx.concatenate([-placed, first], axis=-1).swapaxes(-1, -2)
        ring = mx.where(self.mask[:, sinks:], mx.array(0.0), mx.array(NOT_ATTENDED))
        self.ring_mask = mx.broadcast_to(ring, (1, self.shape.query_heads, *ring.shape))

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        shape, split = self.shape, heads.shape[1] - self.shape.kv_heads
        turned = shape.ropes[layer].rotate(heads[:, :split], self.position)
        queries = turned[:, : shape.query_heads]
        keys = self._put(self.old_keys[layer], turned[:, shape.query_heads :])
        values = self._put(self.old_values[layer], heads[:, split:])
        self.keys.append(keys)
        self.values.append(values)
        mask = self.mask
        if self.moves:
            mask = self._correct_sinks(layer, heads[:, : shape.query_heads], queries)
        if self.prefix_rows < keys.shape[2]:
            keys, values = keys[:, :, : self.prefix_rows], values[:, :, : self.prefix_rows]
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=shape.scale(layer), mask=mask
        )

    def _correct_sinks(self, layer: int, plain: mx.array, queries: mx.array) -> mx.array:
        """Return an additive mask (1, H, T, N) that corrects the sinks' scores."""
        shape = self.shape
        far = shape.ropes[layer].rotate_all(plain, self.far)
        both = mx.concatenate([queries, far], axis=-1).astype(mx.float32) * shape.scale(layer)
        grouped = both.reshape(1, shape.kv_heads, -1, both.shape[-1])
        scores = grouped @ self.sink_difference[layer : layer + 1]
        scores = scores.reshape(1, shape.query_heads, self.rows, -1)
        return mx.concatenate([scores, self.ring_mask], axis=-1).astype(queries.dtype)

    def _put(self, rows: mx.array, new: mx.array) -> mx.array:
        for start, stop, row in self.pieces:
            rows = mx.slice_update(rows, new[:, :, start:stop], row, axes=(2,))
        return rows


def attended_rows(
    geometry: Geometry, position: StreamPosition, prefix_rows: int, count: int
) -> np.ndarray:
    """Return what each of `count` tokens beyond the sinks attends to, once all are stored.

    The mask is (T, prefix_rows) bool; its columns are the buffer's rows.
    """
    newest = position.length + count - 1
    mask = np.ones((count, prefix_rows), bool)
    ages = geometry.ages(newest, prefix_rows)
    for row in range(count):
        token = position.length + row
        oldest = newest - geometry.oldest(position, token)
        mask[row, geometry.sinks :] = (newest - token <= ages) & (ages <= oldest)
    return mask
