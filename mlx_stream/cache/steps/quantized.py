"""A single-token step over quantized rows: the new ones are quantized, then it attends to all.

Scores and weighted values are products with packed rows, so a step reads 8 or 4 bits per number and
unpacks no rows. Both are computed in float32: half precision would round the scores, which fused
attention over plain rows does not do.
"""

import mlx.core as mx

from mlx_stream.cache.attention import AttentionShape
from mlx_stream.cache.geometry import NOT_ATTENDED, Geometry
from mlx_stream.cache.positions import Rope
from mlx_stream.cache.steps.sinks import place_sinks
from mlx_stream.cache.storage import CacheState, QuantizedRows, QuantizedStorage


class QuantizedDecodeStep:
    """A single-token step: the token is written to its row, then attends to sinks and ring."""

    count, rows = 1, 1

    def __init__(
        self,
        shape: AttentionShape,
        storage: QuantizedStorage,
        geometry: Geometry,
        state: CacheState,
    ):
        self.shape, self.storage = shape, storage
        self.keys: list[QuantizedRows] = []
        self.values: list[QuantizedRows] = []
        self.new_sinks: list[mx.array] = []
        position = state.position
        token = position.length
        self.old_keys, self.sinks_at = place_sinks(shape, storage, geometry, state, token)
        self.old_values = state.values
        self.is_sink = token < geometry.sinks
        prefix_rows = geometry.prefix_rows(token)
        self.sinks = min(geometry.sinks, prefix_rows)
        self.ring = prefix_rows - self.sinks
        self.position = mx.array([position.clock], mx.int32)
        self.row = geometry.row(token) - (0 if self.is_sink else geometry.sinks)
        self.start = mx.array([self.row], mx.int32)
        mask = geometry.decode_mask(position, prefix_rows)
        self.mask = None if mask is None else mx.array(mask)
        old = geometry.old_clock_mask(position, prefix_rows, token)
        self.old_clock_mask = None if old is None else mx.array(old[self.sinks :])
        self.old_clock_position = mx.array([position.clock + position.clock_offset], mx.int32)

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        shape, split = self.shape, heads.shape[1] - self.shape.kv_heads
        plain = heads[:, : shape.query_heads]
        if self.is_sink:
            self.new_sinks.append(heads[:, shape.query_heads : split])
        rope = shape.ropes[layer]
        turned = rope.rotate(heads[:, :split], self.position)
        keys = self._put(self.old_keys[layer], turned[:, shape.query_heads :])
        values = self._put(self.old_values[layer], heads[:, split:])
        self.keys.append(keys)
        self.values.append(values)
        scores = self._scores(rope, self._group_heads(turned[:, : shape.query_heads]), plain, keys)
        scores = scores * shape.scale(layer)
        if self.mask is not None:
            scores = mx.where(self.mask, scores, NOT_ATTENDED)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return self._weighted_values(weights, values).reshape(plain.shape).astype(heads.dtype)

    def _group_heads(self, queries: mx.array) -> mx.array:
        """Reshape (1, H, 1, D) to (1, K, H / K, D), as float32."""
        shape = (1, self.shape.kv_heads, -1, queries.shape[-1])
        return queries.reshape(shape).astype(mx.float32)

    def _scores(
        self, rope: Rope, queries: mx.array, plain: mx.array, keys: QuantizedRows
    ) -> mx.array:
        """Return the scores (1, K, H / K, sinks + ring) before scaling."""
        parts = []
        if self.sinks:
            sinks = keys.sinks[:, :, : self.sinks].astype(mx.float32)
            parts.append(queries @ sinks.swapaxes(-1, -2))
        if self.ring:
            ring = self.storage.scores(queries, keys, self.ring)
            if self.old_clock_mask is not None:
                further = self._group_heads(rope.rotate(plain, self.old_clock_position))
                older = self.storage.scores(further, keys, self.ring)
                ring = mx.where(self.old_clock_mask, older, ring)
            parts.append(ring)
        return mx.concatenate(parts, axis=-1)

    def _weighted_values(self, weights: mx.array, values: QuantizedRows) -> mx.array:
        parts = []
        if self.sinks:
            sinks = values.sinks[:, :, : self.sinks].astype(mx.float32)
            parts.append(weights[..., : self.sinks] @ sinks)
        if self.ring:
            parts.append(
                self.storage.weighted_values(weights[..., self.sinks :], values, self.ring)
            )
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _put(self, rows: QuantizedRows, new: mx.array) -> QuantizedRows:
        if self.is_sink:
            return self.storage.write(rows, new, [(0, 1, self.row)])
        return self.storage.put(rows, new, self.start)
