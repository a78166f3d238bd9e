"""The steps of several streams as one: their rows go through a model together.

The rows of the streams stand one after another, and padding behind them. Each stream's own step
does its attention, so windows, sinks, bits and kinds of steps may differ.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx


class BatchStep:
    """One pass of the new tokens of several streams through all layers.

    Args:
        steps: one of each stream, none padded; see `Cache.plan`.
        padding: rows behind theirs.
    """

    def __init__(self, steps: Sequence[Any], padding: int = 0):
        self.steps = steps
        self.count = sum(step.count for step in steps)
        self.rows, self.padding = self.count + padding, padding
        self._ends = [*accumulate(step.count for step in steps)]

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        """Compute a layer's attention: each stream's of its own rows; zeros for the padding."""
        ends = self._ends if self.padding else self._ends[:-1]
        parts = mx.split(heads, ends, axis=2)
        found = [step.attend(layer, part) for step, part in zip(self.steps, parts, strict=False)]
        if self.padding:
            _, query_heads, _, head_dim = found[0].shape
            found.append(mx.zeros((1, query_heads, self.padding, head_dim), heads.dtype))
        return mx.concatenate(found, axis=2)
