"""Caches of many shapes, each compared with the slow reference, and what to feed them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from mlx_stream.cache import AttentionShape, Cache, StreamCache
from mlx_stream.cache.positions import Rope
from mlx_stream.cache.steps.verify import VerifyStep
from mlx_stream.models.fingerprint import raw_bytes
from mlx_stream.rope import RopeConfig
from tests.reference import SlowAttention, rope_inv_freq

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAR = 2**62


@dataclass(frozen=True)
class Shape:
    """The parameters of a cache under test.

    Layer i rotates the share `parts[i]` of each head; the parts repeat.
    """

    sinks: int = 2
    window: int = 5
    spare: int = 0
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 8
    layers: int = 2
    clock_limit: int = 0
    yarn: bool = False
    parts: tuple[float, ...] = (1.0,)
    dtype: mx.Dtype = mx.float32
    bits: int | None = None

    def rope(self, part: float) -> Rope:
        if not self.yarn:
            return Rope(RopeConfig(partial_rotary_factor=part), self.head_dim)
        magnitude = rope_inv_freq(self.raw())[1]
        config = RopeConfig(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            attention_factor=magnitude,
            partial_rotary_factor=part,
        )
        return Rope(config, self.head_dim)

    def raw(self) -> dict:
        return {"head_dim": self.head_dim} | ({"rope_scaling": YARN} if self.yarn else {})

    def part(self, layer: int) -> float:
        return self.parts[layer % len(self.parts)]

    def attention(self) -> AttentionShape:
        query_heads = self.kv_heads * self.group
        ropes = {part: self.rope(part) for part in self.parts}
        by_layer = tuple(ropes[self.part(layer)] for layer in range(self.layers))
        return AttentionShape(query_heads, self.kv_heads, self.head_dim, by_layer)

    def cache(self) -> StreamCache:
        cache = StreamCache(
            self.attention(),
            self.sinks,
            self.window,
            self.spare,
            self.dtype,
            self.clock_limit,
            self.bits,
        )
        if self.bits:  # lower than the default, so that the clock is lowered more often
            cache.clock_limit = max(self.clock_limit, 2 * cache.geometry.rows + 8)
        return cache

    def slow(self) -> list[SlowAttention]:
        return [
            SlowAttention(
                self.sinks,
                self.window,
                inv_freq,
                self.head_dim**-0.5,
                self.spare,
                magnitude,
            )
            for inv_freq, magnitude in map(self.frequencies, range(self.layers))
        ]

    def frequencies(self, layer: int) -> tuple[np.ndarray, float]:
        """Return a layer's frequencies and the cache's factor: 1 unless whole heads rotate."""
        part = self.part(layer)
        if part == 0:
            return np.zeros(0), 1.0
        inv_freq, magnitude = rope_inv_freq({**self.raw(), "partial_rotary_factor": part})
        return inv_freq, magnitude if part == 1 else 1.0


# The rotated part of each head: all of it; all, but none in the second layer; half; half and none
# in turn.
PARTS = [(1.0,), (1.0,), (1.0, 0.0), (0.5,), (0.5, 0.0)]


shapes = st.builds(
    Shape,
    sinks=st.integers(0, 6),
    window=st.integers(1, 24),
    spare=st.integers(0, 8),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 16]),
    layers=st.integers(1, 2),
    clock_limit=st.sampled_from([0, 0, 60, 150, 2**14]),
    yarn=st.booleans(),
    parts=st.sampled_from(PARTS),
)


quantized_shapes = st.builds(
    Shape,
    sinks=st.integers(0, 6),
    window=st.integers(1, 24),
    spare=st.integers(0, 8),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([64, 128]),
    layers=st.just(1),
    clock_limit=st.sampled_from([0, 0, 150, 2**14]),
    yarn=st.booleans(),
    parts=st.sampled_from([(1.0,), (0.5,), (0.0,)]),
    bits=st.sampled_from([4, 8]),
)


class Twins:
    """A cache and the slow reference, fed the same random queries, keys and values."""

    def __init__(self, shape: Shape, tolerance: float = 2e-4):
        self.shape, self.tolerance = shape, tolerance
        self.cache, self.slow = shape.cache(), shape.slow()
        self.random = np.random.default_rng(0)

    def heads(self, rows: int) -> mx.array:
        shape = self.shape
        count = shape.kv_heads * (shape.group + 2)
        heads = 1.5 * self.random.standard_normal((1, count, rows, shape.head_dim))
        return mx.array(heads.astype(np.float32)).astype(shape.dtype)

    def read(self, count: int, compare: Callable[[int], bool] = lambda token: True) -> None:
        """Read tokens in as few steps as the cache allows; compare every row of every layer."""
        while count:
            taken = self.cache.max_step(count)
            assert 1 <= taken <= count
            self._take(next_step(self.cache, taken), taken, compare)
            count -= taken

    def verify(self, count: int) -> None:
        """Read tokens in one step that can be rolled back; compare every row of every layer."""
        step = next_step(self.cache, count, verify=True)
        assert isinstance(step, VerifyStep) == (count > 1)
        self._take(step, count, lambda token: True)

    def _take(self, step: Any, count: int, compare: Callable[[int], bool]) -> None:
        assert step.count == count <= step.rows
        heads = [self.heads(step.rows) for _ in range(self.shape.layers)]
        seen = [self.seen(layer, new) for layer, new in enumerate(heads)]
        outs = [step.attend(layer, new) for layer, new in enumerate(heads)]
        self.cache.commit(step)
        mx.eval(outs, self.cache.arrays())
        for slow, new, out in zip(self.slow, seen, outs, strict=True):
            self.compare(slow, new, out, count, compare)

    def rewind(self, count: int) -> None:
        for one in (self.cache, *self.slow):
            one.rewind(count)

    def evict(self, count: int) -> None:
        for one in (self.cache, *self.slow) if count else ():
            one.evict(count)

    def seen(self, layer: int, heads: mx.array) -> mx.array:
        """Return queries, keys and values as they are attended to: rounded to the ring's bits."""
        cache, rope = self.cache, self.cache.shape.ropes[layer]
        if self.shape.bits is None:
            return heads
        queries, rest = cache.shape.query_heads, cache.shape.query_heads + cache.shape.kv_heads
        clock, sinks = cache.position.clock, max(0, self.shape.sinks - cache.length)
        turned = rope.rotate(heads[:, :rest], mx.array([clock], mx.int32))[:, queries:]
        keys = cache.storage.as_attended(turned, sinks)
        rows = [
            rope.rotate_all(keys[:, :, row : row + 1], clock + row, backwards=True)
            for row in range(heads.shape[2])
        ]
        values = cache.storage.as_attended(heads[:, rest:], sinks)
        return mx.concatenate([heads[:, :queries], mx.concatenate(rows, axis=2), values], axis=1)

    def compare(
        self,
        slow: SlowAttention,
        new: mx.array,
        out: mx.array,
        taken: int,
        compare: Callable[[int], bool],
    ) -> None:
        assert out.dtype == self.shape.dtype
        got = np.array(out.astype(mx.float32))[0]
        assert np.isfinite(got).all(), "padded rows included"
        queries, keys, values = self.split(np.array(new.astype(mx.float32))[0])
        for row in range(taken):
            token = slow.n
            expected = slow.step(queries[:, row], keys[:, row], values[:, row])
            if compare(token):
                error = np.abs(got[:, row] - expected).max()
                assert error < self.tolerance, f"token {token}, row {row} of {taken}: {error}"

    def split(self, heads: np.ndarray) -> list[np.ndarray]:
        queries = self.shape.kv_heads * self.shape.group
        return np.split(heads, [queries, queries + self.shape.kv_heads])

    def contents(self) -> list:
        """Return the contents of the cache's state; this erases everything else in both twins."""
        for slow in self.slow:
            slow.erase()
        return contents(self.cache)

    def check_numbers(self) -> None:
        slow, cache = self.slow[0], self.cache
        assert cache.length == slow.n
        assert cache.attended == len(slow.attended())
        assert cache.evicted == slow.n - len(slow.attended())
        assert cache.oldest == slow.oldest
        geometry = cache.geometry
        assert cache.attended_rows() == [geometry.row(token) for token in slow.attended()]
        complete = slow.oldest == slow.sinks
        assert cache.rewindable == (slow.n if complete else slow.n - slow.oldest)
        assert cache.position.clock <= cache.clock_limit
        for array in cache.arrays():
            assert not mx.any(mx.isnan(array)).item()


def next_step(cache: Cache, count: int, verify: bool = False) -> Any:
    """Plan the step of the next `count` tokens, after preparing the cache for it."""
    cache.prepare(count)
    return cache.plan(count, verify)


def contents(cache: StreamCache) -> list:
    """Return what `state()` holds, copied, to compare with `==`."""
    copies = []
    for name, value in cache.state().items():
        if isinstance(value, int):
            copies.append((name, value))
        else:
            copies.append((name, bytes_of(value)))
    return copies


def bytes_of(array: mx.array) -> bytes:
    return bytes(raw_bytes(array)) if array.size else b""


def everything(cache: StreamCache) -> list:
    """Return a copy of all that a cache holds, unattended rows included, without changing it."""
    current, arrays = cache.current, map(bytes_of, cache.arrays())
    return [current.position, current.pending_turn, current.layers_turned, *arrays]


def check_erased(cache: StreamCache) -> None:
    """Check that every attended row is nonzero and every other row is zero."""
    geometry, attended = cache.geometry, set(cache.attended_rows())
    rows = np.array([row in attended for row in range(geometry.rows)])
    for layer in (*cache.current.keys, *cache.current.values):
        read = cache.storage.read(layer, 0, geometry.rows, cache.current.sinks)
        whole = mx.concatenate([read], axis=2)
        found = np.abs(np.array(whole.astype(mx.float32))).max(axis=(0, 1, 3)) > 0
        assert (found == rows).all()
        for array in cache.storage.arrays(layer).values():
            offset = 0 if array.shape[2] in (geometry.rows, geometry.sinks) else geometry.sinks
            for row in set(range(geometry.rows)) - attended:
                if 0 <= row - offset < array.shape[2]:
                    assert not mx.any(array[:, :, row - offset]).item()
    assert not mx.any(cache.current.sinks[:, :, min(cache.length, geometry.sinks) :]).item()


def read_random(cache: StreamCache, count: int, seed: int = 0, chunk: int = 512) -> None:
    random = np.random.default_rng(seed)
    heads = cache.shape.query_heads + 2 * cache.shape.kv_heads
    while count:
        step = next_step(cache, cache.max_step(min(count, chunk)))
        for layer in range(cache.shape.layers):
            shape = (1, heads, step.rows, cache.shape.head_dim)
            step.attend(layer, mx.array(random.standard_normal(shape).astype(np.float32)))
        cache.commit(step)
        mx.eval(cache.arrays())
        count -= step.count
