"""A step is planned and computed separately: the stream does not change until it is committed."""

import gc
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.cache import Cache, DenseCache, StreamCache
from mlx_stream.cache.steps.decode import DecodeStep
from mlx_stream.cache.steps.prefill import PrefillStep
from mlx_stream.cache.steps.quantized import QuantizedDecodeStep
from mlx_stream.cache.steps.verify import VerifyStep
from tests.fakes.shapes import Shape, bytes_of, contents, everything, read_random

PLAIN = Shape(sinks=3, window=20, spare=7, group=2, clock_limit=2**14)
QUANTIZED = Shape(sinks=3, window=20, head_dim=64, bits=8, clock_limit=2**14)
FULL = 40
# The cache's shape, the numbers of tokens read, dropped and to be read next, whether the last are
# guesses, and the type of the step that reads them.
KINDS: dict[str, tuple[Shape, int, int, int, bool, type]] = {
    "a sink": (PLAIN, 1, 0, 1, False, DecodeStep),
    "one token while it fills": (PLAIN, 9, 0, 1, False, DecodeStep),
    "one token of a full window": (PLAIN, FULL, 0, 1, False, DecodeStep),
    "one token after an eviction": (PLAIN, FULL, 8, 1, False, DecodeStep),
    "the first chunk": (PLAIN, 0, 0, 9, False, PrefillStep),
    "a chunk while it fills": (PLAIN, 9, 0, 7, False, PrefillStep),
    "a chunk after an eviction": (PLAIN, FULL, 8, 7, False, PrefillStep),
    "a chunk of a full window": (PLAIN, FULL, 0, 33, False, PrefillStep),
    "a guess while it fills": (PLAIN, 9, 0, 5, True, VerifyStep),
    "a guess after an eviction": (PLAIN, FULL, 8, 5, True, VerifyStep),
    "a guess in a full window": (PLAIN, FULL, 0, 8, True, VerifyStep),
    "a guess of none": (PLAIN, FULL, 0, 1, True, DecodeStep),
    "a quantized sink": (QUANTIZED, 1, 0, 1, False, QuantizedDecodeStep),
    "one quantized token": (QUANTIZED, FULL, 0, 1, False, QuantizedDecodeStep),
    "one quantized token after an eviction": (QUANTIZED, FULL, 8, 1, False, QuantizedDecodeStep),
    "a quantized chunk": (QUANTIZED, FULL, 0, 9, False, PrefillStep),
}


def compute(cache: Cache, shape: Shape, count: int, verify: bool) -> tuple[Any, bytes]:
    """Plan a step and compute it with the same random heads each time; return it and its output."""
    step = cache.plan(count, verify)
    random, heads = np.random.default_rng(4), shape.kv_heads * (shape.group + 2)
    outs = []
    for layer in range(shape.layers):
        new = random.standard_normal((1, heads, step.rows, shape.head_dim)).astype(np.float32)
        outs.append(step.attend(layer, mx.array(new)))
    mx.eval(outs)
    return step, b"".join(map(bytes_of, outs))


def stream(shape: Shape, length: int, evicted: int) -> StreamCache:
    cache = shape.cache()
    read_random(cache, length)
    cache.evict(evicted)
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_an_uncommitted_step_changes_nothing(kind):
    shape, length, evicted, count, verify, expected = KINDS[kind]
    cache, undisturbed = (stream(shape, length, evicted) for _ in range(2))
    for one in (cache, undisturbed):
        one.prepare(count)
    version, before = cache.version, everything(cache)
    dropped, found = compute(cache, shape, count, verify)
    assert type(dropped) is expected and dropped.count == count
    # The dropped step is evaluated too, because one left by an interrupt may have been.
    rows = [*dropped.keys, *dropped.values]
    mx.eval([array for one in rows for array in cache.storage.arrays(one).values()])
    assert cache.version is version
    assert everything(cache) == before
    step, again = compute(cache, shape, count, verify)
    assert again == found, "it can be computed as often as wanted"
    cache.commit(step)
    assert cache.version is not version and cache.length == length + count
    step, other = compute(undisturbed, shape, count, verify)
    undisturbed.commit(step)
    assert other == found
    assert everything(undisturbed) == everything(cache)
    assert contents(undisturbed) == contents(cache)
    gone = weakref.ref(undisturbed)
    del undisturbed, one
    gc.collect()
    assert gone() is None and step.count == count, "a step does not keep its cache"


@pytest.mark.parametrize("count", [1, 9])
def test_an_uncommitted_step_does_not_change_a_dense_cache(count):
    shape = Shape()
    cache = DenseCache(shape.attention())
    step, _ = compute(cache, shape, 7, False)
    cache.commit(step)
    version, before = cache.version, list(map(bytes_of, cache.arrays()))
    step, found = compute(cache, shape, count, False)
    mx.eval(step.keys, step.values)
    assert (cache.version, cache.length) == (version, 7)
    assert list(map(bytes_of, cache.arrays())) == before
    step, again = compute(cache, shape, count, False)
    cache.commit(step)
    assert again == found and cache.version is not version and cache.length == 7 + count


def test_each_change_is_a_version_of_its_own():
    cache = stream(PLAIN, FULL, 0)
    seen = [cache.version]
    for change in (
        lambda: read_random(cache, 1),
        lambda: cache.rewind(1),
        lambda: cache.evict(2),
        lambda: cache.restore(cache.state()),
        cache.release,
    ):
        assert cache.version is seen[-1]
        change()
        assert all(cache.version is not before for before in seen)
        seen.append(cache.version)
