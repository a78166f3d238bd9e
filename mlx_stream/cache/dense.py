"""Attention to everything, in a buffer that grows: the yardstick a stream is compared with."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_stream.cache.positions import Rope
from mlx_stream.errors import ValueRefused

GROWTH = 256  # rows added at a time, at least
LONGEST_STEP = 512


class DenseCache:
    """Keep every token of a text; positions are places in the text.

    Takes the model's shape as `StreamCache` does. For comparison only: memory and the time of a
    step grow with the text, and the model's trained context is no limit here.
    """

    def __init__(
        self,
        layers: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        rope: Rope,
        dtype: mx.Dtype = mx.float32,
    ):
        self.query_heads, self.kv_heads = query_heads, kv_heads
        self.rope = rope
        self.scale = head_dim**-0.5 * rope.magnitude**2
        self.length = 0
        empty = mx.zeros((1, kv_heads, 0, head_dim), dtype)
        self.keys: list[mx.array] = [empty] * layers
        self.values: list[mx.array] = [empty] * layers

    @property
    def attended(self) -> int:
        return self.length

    @property
    def evicted(self) -> int:
        return 0

    @property
    def rewindable(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    def row(self, token: int) -> int:
        return token

    def attended_rows(self, before: int = 0) -> list[int]:
        return list(range(self.length - before))

    def attended_next(self) -> np.ndarray:
        return np.ones(self.length, bool)

    def version(self) -> None:
        return None  # a comparison need not be fast

    def max_step(self, waiting: int) -> int:
        return min(waiting, LONGEST_STEP)

    def begin(self, count: int) -> "DenseStep":
        return DenseStep(self, count)

    def commit(self, step: "DenseStep") -> None:
        self.keys, self.values = step.keys, step.values
        self.length += step.count

    def rewind(self, count: int) -> None:
        if not 0 <= count <= self.length:
            raise ValueRefused(f"{count} tokens cannot be taken back: {self.length} were read")
        self.length -= count

    def evict(self, count: int) -> None:
        if count:
            raise ValueRefused("a dense cache attends to everything: nothing can be evicted")

    def erase(self) -> None:
        """Do nothing: all that is given out is attended."""

    def state(self) -> dict[str, mx.array | int]:
        state: dict[str, mx.array | int] = {"length": self.length}
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            state[f"keys.{layer}"] = keys[:, :, : self.length]
            state[f"values.{layer}"] = values[:, :, : self.length]
        return state

    def restore(self, state: dict[str, mx.array | int]) -> None:
        length = state.get("length")
        if not isinstance(length, int) or state.keys() != self.state().keys():
            raise ValueRefused("not a state of this cache")
        _, heads, _, head_dim = self.keys[0].shape
        arrays = {
            name: value
            for name, value in state.items()
            if isinstance(value, mx.array) and value.shape == (1, heads, length, head_dim)
        }
        if len(arrays) != 2 * len(self.keys):
            raise ValueRefused("not a state of this cache: an array has the wrong shape")
        layers = range(len(self.keys))
        self.keys = [arrays[f"keys.{layer}"] for layer in layers]
        self.values = [arrays[f"values.{layer}"] for layer in layers]
        self.length = length


@dataclass
class DenseStep:
    """New tokens: written behind the others, then each attends to all up to itself."""

    cache: DenseCache
    count: int
    keys: list[mx.array] = field(default_factory=list)
    values: list[mx.array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self.count
        self.position = mx.array([self.cache.length], mx.int32)

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        cache, split = self.cache, heads.shape[1] - self.cache.kv_heads
        turned = cache.rope.rotate(heads[:, :split], self.position)
        keys = self._append(cache.keys[layer], turned[:, cache.query_heads :])
        values = self._append(cache.values[layer], heads[:, split:])
        self.keys.append(keys)
        self.values.append(values)
        end = cache.length + self.count
        return mx.fast.scaled_dot_product_attention(
            turned[:, : cache.query_heads],
            keys[:, :, :end],
            values[:, :, :end],
            scale=cache.scale,
            mask="causal" if self.count > 1 else None,
        )

    def _append(self, buffer: mx.array, new: mx.array) -> mx.array:
        start, end = self.cache.length, self.cache.length + self.count
        _, heads, rows, head_dim = buffer.shape
        if end > rows:
            more = mx.zeros((1, heads, max(GROWTH, self.count, rows // 2), head_dim), buffer.dtype)
            buffer = mx.concatenate([buffer[:, :, :start], more], axis=2)
        buffer = mx.array(buffer)
        buffer[:, :, start:end] = new
        return buffer

    def finish(self, keys: list[mx.array], values: list[mx.array]) -> None:
        self.keys, self.values = keys, values
