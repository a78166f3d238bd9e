"""Combines the steps of several streams: their rows go through a model together.

The streams' rows are concatenated, followed by padding. Each stream's own step computes its
attention, so windows, sinks, bits and kinds of steps may differ. If each stream reads one token,
their heads are rotated together; otherwise, each layer would need as many small operations as there
are streams.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx

from mlx_stream.cache.positions import Rope
from mlx_stream.cache.steps.decode import DecodeStep


class BatchStep:
    """One pass of the new tokens of several streams through all layers.

    Args:
        steps: one per stream, none of them padded; see `Cache.plan`.
        padding: how many rows of padding follow the streams' rows.
    """

    def __init__(self, steps: Sequence[Any], padding: int = 0):
        self.steps = steps
        self.count = sum(step.count for step in steps)
        self.rows, self.padding = self.count + padding, padding
        self._ends = [*accumulate(step.count for step in steps)]
        self._one_token_each = not padding and all(
            isinstance(step, DecodeStep) and not step.is_sink for step in steps
        )
        self._rotations: dict[Rope, Callable[[mx.array], mx.array]] = {}

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        """Compute a layer's attention, per stream over its own rows, with zeros for the padding."""
        if self._one_token_each:
            return self._attend_tokens(layer, heads)
        ends = self._ends if self.padding else self._ends[:-1]
        parts = mx.split(heads, ends, axis=2)
        found = [step.attend(layer, part) for step, part in zip(self.steps, parts, strict=False)]
        if self.padding:
            _, query_heads, _, head_dim = found[0].shape
            found.append(mx.zeros((1, query_heads, self.padding, head_dim), heads.dtype))
        return mx.concatenate(found, axis=2)

    def _attend_tokens(self, layer: int, heads: mx.array) -> mx.array:
        """Rotate the streams' tokens together, then let each stream attend."""
        shape = self.steps[0].kind.shape
        tokens = heads.swapaxes(0, 2)
        plain, values = mx.split(tokens, [tokens.shape[1] - shape.kv_heads], axis=1)
        rope = shape.ropes[layer]
        if rope not in self._rotations:
            positions = mx.concatenate([step.arrays["position"] for step in self.steps])
            self._rotations[rope] = rope.token_rotation(positions, plain.shape[1])
        queries, keys = mx.split(self._rotations[rope](plain), [shape.query_heads], axis=1)
        parts = [mx.split(part, self.rows) for part in (queries, keys, values)]
        found = [
            step.attend_rotated(layer, *part)
            for step, *part in zip(self.steps, *parts, strict=True)
        ]
        return mx.concatenate(found).swapaxes(0, 2)
