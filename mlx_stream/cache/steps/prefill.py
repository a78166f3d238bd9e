"""A chunk of several tokens: it attends to the buffer as it was and to itself, then is written."""

from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_stream.cache.geometry import NOT_ATTENDED, pad_length
from mlx_stream.cache.storage import Rows

if TYPE_CHECKING:
    from mlx_stream.cache.stream import StreamCache


class PrefillStep:
    """Several tokens: they attend to the buffer as it was and to themselves, then are written.

    Each row has its own o. If o does not move within the chunk, the sinks' rows on the clock are
    right for every row. If it does, every row sees the sinks from the constant place C - 1: the
    scores of a second rotation of the queries enter the fused attention through an additive mask,
    over sink keys set to zero (measured on the CPU backend: as fast as a plain mask). Rows then
    attend in blocks, each to no more columns than its own rows see.
    """

    def __init__(self, cache: "StreamCache", count: int):
        self.cache, self.count, self.rows = cache, count, pad_length(count)
        self.keys: list[Rows] = []
        self.values: list[Rows] = []
        self.new_sinks: list[mx.array] = []
        geometry, first = cache.geometry, cache.length
        self.moves = geometry.room(cache.position) == 0 and geometry.sinks > 0
        if not self.moves:
            cache.place_sinks(first + count - 1)
        self.prefix_rows = geometry.chunk_prefix_rows(first - 1) if first else 0
        self.position = mx.array([cache.position.clock], mx.int32)
        self.segments = geometry.segments(first, count)
        self.into_sinks = min(max(geometry.sinks - first, 0), self.rows)
        old_clock_mask = geometry.old_clock_mask(cache.position, self.prefix_rows, first - 1)
        self.old_clock_mask = None if old_clock_mask is None else mx.array(old_clock_mask)[:, None]
        if self.moves:
            self._prepare_sinks()
        else:
            self.mask = mx.array(geometry.chunk_mask(cache.position, self.prefix_rows, self.rows))

    def _prepare_sinks(self) -> None:
        cache, geometry = self.cache, self.cache.geometry
        old = geometry.window - 1
        self.far = old + geometry.sinks
        self.sink_keys = cache.rope.rotate(cache.sinks, mx.array([0], mx.int32))
        self.old = geometry.segments(cache.length - old, old)
        self.blocks = geometry.blocks(self.rows)
        self.masks = []
        for block in self.blocks:
            mask = mx.where(mx.array(block.mask), mx.array(0.0), mx.array(NOT_ATTENDED))
            self.masks.append(mx.broadcast_to(mask, (1, cache.query_heads, *mask.shape)))

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        cache, split = self.cache, heads.shape[1] - self.cache.kv_heads
        turned = cache.rope.rotate(heads[:, :split], self.position)
        queries, new_keys = turned[:, : cache.query_heads], turned[:, cache.query_heads :]
        new_values = heads[:, split:]
        self._capture_sinks(heads[:, cache.query_heads : split])
        seen_keys, seen_values = (
            cache.storage.as_attended(new, self.into_sinks) for new in (new_keys, new_values)
        )
        if self.moves:
            out = self._attend_moving(
                layer, heads[:, : cache.query_heads], queries, seen_keys, seen_values
            )
        else:
            if self.prefix_rows:
                keys, values = self._buffer(layer, 0, heads)
                seen_keys = mx.concatenate([keys, seen_keys], axis=2)
                seen_values = mx.concatenate([values, seen_values], axis=2)
            out = mx.fast.scaled_dot_product_attention(
                queries, seen_keys, seen_values, scale=cache.scale, mask=self.mask
            )
        self.keys.append(cache.storage.write(cache.keys[layer], new_keys, self.segments))
        self.values.append(cache.storage.write(cache.values[layer], new_values, self.segments))
        return out

    def _attend_moving(
        self,
        layer: int,
        plain: mx.array,
        queries: mx.array,
        new_keys: mx.array,
        new_values: mx.array,
    ) -> mx.array:
        cache, sinks = self.cache, self.cache.geometry.sinks
        sink_keys = self.sink_keys[layer : layer + 1]
        sink_values = cache.storage.read(cache.values[layer], 0, sinks, plain)
        ring_keys, ring_values = self._buffer(layer, sinks, plain)
        # Scores in the mask are float32 whatever the model's dtype: half precision would round
        # the sinks' scores, the largest there are, far more than those of the ring.
        far = cache.rope.rotate_all(plain, self.far).astype(mx.float32)
        grouped = far.reshape(1, cache.kv_heads, -1, far.shape[-1])
        scores = (grouped * cache.scale) @ sink_keys.astype(mx.float32).swapaxes(-1, -2)
        scores = scores.reshape(1, cache.query_heads, self.rows, sinks)
        queries = queries.astype(mx.float32)
        keys = self._columns(ring_keys, mx.zeros_like(sink_keys), new_keys)
        values = self._columns(ring_values, sink_values, new_values)
        parts = []
        for index, block in enumerate(self.blocks):
            # The ring's part is the same for every layer: only the sinks' columns are written, in
            # place once the layer before has used its own.
            mask, at = mx.array(self.masks[index]), block.sinks_at
            mask[..., at : at + sinks] = scores[:, :, block.start : block.stop]
            self.masks[index] = mask
            seen = slice(block.first, block.first + mask.shape[-1])
            parts.append(
                mx.fast.scaled_dot_product_attention(
                    queries[:, :, block.start : block.stop],
                    keys[:, :, seen],
                    values[:, :, seen],
                    scale=cache.scale,
                    mask=mask,
                )
            )
        return mx.concatenate(parts, axis=2).astype(plain.dtype)

    def _columns(self, ring: mx.array, sinks: mx.array, new: mx.array) -> mx.array:
        """Return what the blocks attend to, float32: the ring from its oldest on, sinks, new."""
        first = self.cache.geometry.sinks
        old = [ring[:, :, row - first : row - first + b - a] for a, b, row in self.old]
        return mx.concatenate([*old, sinks, new], axis=2).astype(mx.float32)

    def _buffer(self, layer: int, start: int, new: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values from row `start` on, as they were before this step."""
        cache = self.cache
        keys = cache.storage.read(cache.keys[layer], start, self.prefix_rows, new)
        if self.old_clock_mask is not None:
            turned = cache.rope.rotate_all(keys, cache.position.clock_offset, backwards=True)
            keys = mx.where(self.old_clock_mask[start:], turned, keys)
        return keys, cache.storage.read(cache.values[layer], start, self.prefix_rows, new)

    def _capture_sinks(self, unrotated: mx.array) -> None:
        read = min(self.count, self.cache.geometry.sinks - self.cache.length)
        if read > 0:
            self.new_sinks.append(unrotated[:, :, :read])
