"""Attention to every token, in a growing buffer: the baseline that a stream is compared with."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream.cache.attention import AttentionShape
from mlx_stream.errors import ValueRefused

GROWTH = 256  # the minimum number of rows added at a time
LONGEST_STEP = 512


class DenseCache:
    """Keep every token of a text; a token's position is its index in the text.

    For comparison only: memory and time per step grow with the text, and a text may be longer than
    the model's trained context.
    """

    max_verify = 1

    def __init__(self, shape: AttentionShape, dtype: mx.Dtype = mx.float32):
        self.shape = shape
        self.length = 0
        empty = mx.zeros((1, shape.kv_heads, 0, shape.head_dim), dtype)
        self.keys: list[mx.array] = [empty] * shape.layers
        self.values: list[mx.array] = [empty] * shape.layers

    @property
    def attended(self) -> int:
        return self.length

    @property
    def evicted(self) -> int:
        return 0

    @property
    def rewindable(self) -> int:
        return self.length

    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    def row(self, token: int) -> int:
        return token

    def attended_rows(self, before: int = 0) -> list[int]:
        return list(range(self.length - before))

    def attended_next(self) -> np.ndarray:
        return np.ones(self.length, bool)

    @property
    def version(self) -> object:
        return self.keys

    def max_step(self, waiting: int) -> int:
        return min(waiting, LONGEST_STEP)

    def is_ready(self, count: int) -> bool:
        return True

    def prepare(self, count: int) -> None:
        """Do nothing: positions never need to change."""

    def plan(self, count: int, verify: bool = False, pad: bool = True) -> "DenseStep":
        if verify and count > self.max_verify:
            raise ValueRefused("a dense cache cannot verify guesses")
        return DenseStep(self.shape, self.keys, self.values, self.length, count)

    def commit(self, step: "DenseStep") -> None:
        self.keys, self.values = step.keys, step.values
        self.length += step.count

    def rewind(self, count: int) -> None:
        if not 0 <= count <= self.length:
            raise ValueRefused(f"cannot roll back {count} tokens: only {self.length} were read")
        self.length -= count
        self.keys = [*self.keys]  # a new version

    def release(self) -> None:
        self.keys, self.values = [], []

    def erase(self) -> None:
        """Do nothing: `state` contains only attended rows."""

    def state(self) -> dict[str, mx.array | int]:
        state: dict[str, mx.array | int] = {"length": self.length}
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            state[f"keys.{layer}"] = keys[:, :, : self.length]
            state[f"values.{layer}"] = values[:, :, : self.length]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self.length = state["length"]
        self.keys = [state[f"keys.{layer}"] for layer in range(self.shape.layers)]
        self.values = [state[f"values.{layer}"] for layer in range(self.shape.layers)]


class DenseStep:
    """Append new tokens, then let each attend to all tokens up to and including itself."""

    def __init__(
        self,
        shape: AttentionShape,
        keys: list[mx.array],
        values: list[mx.array],
        length: int,
        count: int,
    ):
        self.shape, self.length = shape, length
        self.count = self.rows = count
        self.old_keys, self.old_values = keys, values
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []
        self.position = mx.array([length], mx.int32)

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        shape, split = self.shape, heads.shape[1] - self.shape.kv_heads
        turned = shape.ropes[layer].rotate(heads[:, :split], self.position)
        keys = self._append(self.old_keys[layer], turned[:, shape.query_heads :])
        values = self._append(self.old_values[layer], heads[:, split:])
        self.keys.append(keys)
        self.values.append(values)
        end = self.length + self.count
        return mx.fast.scaled_dot_product_attention(
            turned[:, : shape.query_heads],
            keys[:, :, :end],
            values[:, :, :end],
            scale=shape.scale(layer),
            mask="causal" if self.count > 1 else None,
        )

    def _append(self, buffer: mx.array, new: mx.array) -> mx.array:
        start, end = self.length, self.length + self.count
        _, heads, rows, head_dim = buffer.shape
        if end > rows:
            more = mx.zeros((1, heads, max(GROWTH, self.count, rows // 2), head_dim), buffer.dtype)
            buffer = mx.concatenate([buffer[:, :, :start], more], axis=2)
        buffer = mx.array(buffer)
        buffer[:, :, start:end] = new
        return buffer
