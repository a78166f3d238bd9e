"""A chunk of tokens, which attends to the old buffer and to itself and is then written."""

import mlx.core as mx

from mlx_stream.cache.attention import AttentionShape
from mlx_stream.cache.geometry import NOT_ATTENDED, Geometry, pad_length
from mlx_stream.cache.steps.sinks import place_sinks
from mlx_stream.cache.storage import CacheState, Rows, RowStorage


class PrefillStep:
    """A step of several tokens, padded to one of a few lengths unless `pad` is false.

    Each row has its own o. If o does not move within the chunk, the sinks' rows in the buffer are
    correct for every row. If it does, every row is at the constant distance S + W - 1 from sink 0:
    the scores of queries rotated to that position enter the fused attention through an additive
    mask, with the sink keys set to zero (as fast as a plain mask on the CPU backend). The rows then
    attend in blocks, each only to the columns that its rows need.
    """

    def __init__(
        self,
        shape: AttentionShape,
        storage: RowStorage,
        geometry: Geometry,
        state: CacheState,
        count: int,
        pad: bool = True,
    ):
        self.shape, self.storage, self.geometry = shape, storage, geometry
        self.count, self.rows = count, pad_length(count) if pad else count
        self.keys: list[Rows] = []
        self.values: list[Rows] = []
        self.new_sinks: list[mx.array] = []
        position = state.position
        first = position.length
        self.moves = geometry.room(position) == 0 and geometry.sinks > 0
        self.old_keys, self.old_values = state.keys, state.values
        self.sinks_at = position.sinks_at
        if not self.moves:
            self.old_keys, self.sinks_at = place_sinks(
                shape, storage, geometry, state, first + count - 1
            )
        self.prefix_rows = geometry.chunk_prefix_rows(first - 1) if first else 0
        self.position = mx.array([position.clock], mx.int32)
        self.segments = geometry.segments(first, count)
        self.into_sinks = min(max(geometry.sinks - first, 0), self.rows)
        self.captured_sinks = min(count, geometry.sinks - first)
        self.clock_offset = position.clock_offset
        old_clock_mask = geometry.old_clock_mask(position, self.prefix_rows, first - 1)
        self.old_clock_mask = None if old_clock_mask is None else mx.array(old_clock_mask)[:, None]
        if self.moves:
            self._prepare_sinks(state.sinks, first)
        else:
            self.mask = mx.array(geometry.chunk_mask(position, self.prefix_rows, self.rows))

    def _prepare_sinks(self, sinks: mx.array, first: int) -> None:
        geometry, old = self.geometry, self.geometry.window - 1
        self.far = old + geometry.sinks
        self.sink_keys = self.shape.rotate_layers(sinks, mx.array([0], mx.int32))
        self.ring_segments = geometry.segments(first - old, old)
        self.blocks = geometry.blocks(self.rows)
        self.masks = []
        for block in self.blocks:
            mask = mx.where(mx.array(block.mask), mx.array(0.0), mx.array(NOT_ATTENDED))
            self.masks.append(mx.broadcast_to(mask, (1, self.shape.query_heads, *mask.shape)))

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        shape, split = self.shape, heads.shape[1] - self.shape.kv_heads
        turned = shape.ropes[layer].rotate(heads[:, :split], self.position)
        queries, new_keys = turned[:, : shape.query_heads], turned[:, shape.query_heads :]
        new_values = heads[:, split:]
        if self.captured_sinks > 0:
            self.new_sinks.append(heads[:, shape.query_heads : split, : self.captured_sinks])
        seen_keys, seen_values = (
            self.storage.as_attended(new, self.into_sinks) for new in (new_keys, new_values)
        )
        if self.moves:
            out = self._attend_moving(
                layer, heads[:, : shape.query_heads], queries, seen_keys, seen_values
            )
        else:
            if self.prefix_rows:
                keys, values = self._buffer(layer, 0, heads)
                seen_keys = mx.concatenate([keys, seen_keys], axis=2)
                seen_values = mx.concatenate([values, seen_values], axis=2)
            out = mx.fast.scaled_dot_product_attention(
                queries, seen_keys, seen_values, scale=shape.scale(layer), mask=self.mask
            )
        self.keys.append(self.storage.write(self.old_keys[layer], new_keys, self.segments))
        self.values.append(self.storage.write(self.old_values[layer], new_values, self.segments))
        return out

    def _attend_moving(
        self,
        layer: int,
        plain: mx.array,
        queries: mx.array,
        new_keys: mx.array,
        new_values: mx.array,
    ) -> mx.array:
        shape, sinks, scale = self.shape, self.geometry.sinks, self.shape.scale(layer)
        sink_keys = self.sink_keys[layer : layer + 1]
        sink_values = self.storage.read(self.old_values[layer], 0, sinks, plain)
        ring_keys, ring_values = self._buffer(layer, sinks, plain)
        # The scores in the mask are float32 in any model: half precision would round the sinks'
        # scores, which are the largest, far more than those of the ring.
        far = shape.ropes[layer].rotate_all(plain, self.far).astype(mx.float32)
        grouped = far.reshape(1, shape.kv_heads, -1, far.shape[-1])
        scores = (grouped * scale) @ sink_keys.astype(mx.float32).swapaxes(-1, -2)
        scores = scores.reshape(1, shape.query_heads, self.rows, sinks)
        queries = queries.astype(mx.float32)
        keys = self._columns(ring_keys, mx.zeros_like(sink_keys), new_keys)
        values = self._columns(ring_values, sink_values, new_values)
        parts = []
        for index, block in enumerate(self.blocks):
            # The ring's part is the same for every layer. Only the sinks' columns are written, in
            # place, once the previous layer has used its own.
            mask, at = mx.array(self.masks[index]), block.sinks_at
            mask[..., at : at + sinks] = scores[:, :, block.start : block.stop]
            self.masks[index] = mask
            seen = slice(block.first, block.first + mask.shape[-1])
            parts.append(
                mx.fast.scaled_dot_product_attention(
                    queries[:, :, block.start : block.stop],
                    keys[:, :, seen],
                    values[:, :, seen],
                    scale=scale,
                    mask=mask,
                )
            )
        return mx.concatenate(parts, axis=2).astype(plain.dtype)

    def _columns(self, ring: mx.array, sinks: mx.array, new: mx.array) -> mx.array:
        """Return the blocks' columns in float32: ring (oldest first), sinks, new rows."""
        first = self.geometry.sinks
        old = [ring[:, :, row - first : row - first + b - a] for a, b, row in self.ring_segments]
        return mx.concatenate([*old, sinks, new], axis=2).astype(mx.float32)

    def _buffer(self, layer: int, start: int, new: mx.array) -> tuple[mx.array, mx.array]:
        """Return the old keys and values from row `start` on."""
        keys = self.storage.read(self.old_keys[layer], start, self.prefix_rows, new)
        if self.old_clock_mask is not None:
            turned = self.shape.ropes[layer].rotate_all(keys, self.clock_offset, backwards=True)
            keys = mx.where(self.old_clock_mask[start:], turned, keys)
        return keys, self.storage.read(self.old_values[layer], start, self.prefix_rows, new)
