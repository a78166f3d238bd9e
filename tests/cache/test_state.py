"""What a cache holds: its state, even near 2^62, and its memory."""

import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.cache import StreamCache
from mlx_stream.cache import positions as rope_module
from mlx_stream.cache import stream as stream_module
from mlx_stream.cache.steps import decode, prefill
from mlx_stream.cache.steps import sinks as sinks_module
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.token_stream import TokenStream
from tests.fakes.shapes import FAR, Shape, contents, read_random
from tests.long.memory import CACHE_LIMIT, run

# -- state ----------------------------------------------------------------------------------------

FULL = Shape(sinks=3, window=10, spare=2, clock_limit=64)


def of(*sizes: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(sizes, dtype)


CANNOT_BE: list[dict[str, Any]] = [
    *({"length": wrong} for wrong in (-1, 43, 10**30, 40.0, "40", None, mx.array(40))),
    {"length": 2**63, "floor": 2**63 - 5},
    *({"floor": wrong} for wrong in (2, 27, 41, -1, float("nan"))),
    *({"clock": wrong} for wrong in (41, 65, -1, 12, "many")),
    *({"sinks_at": wrong} for wrong in (-2, 65, 2**40)),
    *({"sinks": wrong} for wrong in (of(2, 1, 2, 8), of(2, 1, 3, 8, dtype=mx.float16), 3)),
    *({"keys.0": of(1, 1, 16, 8)}, {"keys.1": of(1, 1, 15, 8, dtype=mx.float16)}),
    *({"keys.1": of(1, 1, 15, 8, dtype=mx.int32)}, {"keys.1": np.zeros((1, 1, 15, 8))}),
    *({"keys.1": of(1, 1, 15)}, {"keys.1": None}, {"values.0": of(1, 2, 15, 8)}),
    *({"values.0": of(2, 1, 15, 8)}, {"values.2": of(1, 1, 15, 8)}, {"name": "x"}),
]


@pytest.mark.parametrize("change", CANNOT_BE, ids=range(len(CANNOT_BE)))
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(change):
    source, target = FULL.cache(), FULL.cache()
    read_random(source, 40)
    read_random(target, 20, seed=1)
    state = source.state()
    assert (state["length"], state["floor"], state["clock"]) == (40, 30, 40)
    before = contents(target)
    for name in state:
        with pytest.raises(ValueRefused, match=name):
            target.restore({n: value for n, value in state.items() if n != name})
    with pytest.raises(ValueRefused, match=r"^not a state of this stream: [^\n]*$"):
        target.restore({**state, **change})
    assert contents(target) == before
    target.restore(state)


OTHERS = {"window": 11, "sinks": 2, "layers": 3, "kv_heads": 2, "head_dim": 16}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_cache_is_refused(name):
    with pytest.raises(ValueRefused):
        replace(FULL, **{name: OTHERS[name]}).cache().restore(FULL.cache().state())


def test_young_states_are_restored_and_impossible_young_ones_refused():
    for length in (0, 1, 2, 3, 4, 12, 13, 14, 16):
        source, target = FULL.cache(), FULL.cache()
        read_random(source, length)
        target.restore(source.state())
        assert contents(target) == contents(source)
    source = FULL.cache()
    read_random(source, 2)
    for change in ({"floor": 2}, {"floor": 4}, {"clock": 1}, {"length": 3}):
        with pytest.raises(ValueRefused):
            FULL.cache().restore({**source.state(), **change})


def test_giving_a_state_out_twice_writes_nothing(monkeypatch):
    cache = FULL.cache()
    read_random(cache, 40)
    first = cache.state()
    assert all(a is b for a, b in zip(first.values(), cache.state().values(), strict=True))


# -- a stream that has read close to 2^62 tokens -----------------------------------------------


def continue_from(model, cache: StreamCache, chunks: list[int]) -> np.ndarray:
    """Read random ids in chunks of these sizes; return all logits."""
    stream = TokenStream(model, cache)
    random = np.random.default_rng(5)
    logits = []
    for count in chunks:
        ids = random.integers(0, model.config.vocab_size, count).tolist()
        for hidden in stream.steps(ids, chunk=count):
            logits.append(np.array(model.network.logits(hidden)[0]))
    return np.concatenate(logits)


def spy_on_arrays(monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    """Record the largest integer that the cache and the rotation pass to MLX."""

    class Spy:
        def __getattr__(self, name: str):
            return getattr(mx, name)

        @staticmethod
        def array(value, *args, **kwargs):
            if not isinstance(value, mx.array) and np.asarray(value).dtype.kind in "iub":
                seen.append(max(abs(int(number)) for number in np.ravel(value)))
            return mx.array(value, *args, **kwargs)

    for module in (stream_module, decode, prefill, sinks_module, rope_module):
        monkeypatch.setattr(module, "mx", Spy())


@pytest.mark.parametrize(
    ("sinks", "window", "spare", "clock_limit"),
    [(4, 20, 0, 0), (4, 20, 3, 0), (0, 9, 2, 0), (2, 33, 0, 2**14), (4, 300, 5, 0)],
)
def test_a_stream_near_2_to_62_is_bit_identical(
    tiny_model, monkeypatch, sinks, window, spare, clock_limit
):
    model = tiny_model()

    def new_cache() -> StreamCache:
        return StreamCache(model.attention, sinks, window, spare, clock_limit=clock_limit)

    cache = new_cache()
    continue_from(model, cache, [window, 7, 1, sinks + 2 * spare + 30])
    state = cache.state()
    ring = window + spare
    shift = FAR // ring * ring
    far = new_cache()
    far.restore({**state, "length": state["length"] + shift, "floor": state["floor"] + shift})
    chunks = [1, 1, 17, 64, 1, 1, 1, 8, 100, 1, 2, 200, *[1] * 40]
    seen: list[int] = []
    spy_on_arrays(monkeypatch, seen)
    expected = continue_from(model, cache, chunks)
    near = max(seen)
    seen.clear()
    got = continue_from(model, far, chunks)
    assert np.array_equal(got, expected)
    assert len(seen) > len(chunks)
    assert far.length == cache.length + shift > FAR - ring
    assert far.position.clock == cache.position.clock
    rows = cache.geometry.rows
    assert near == max(seen) < max(2**14, 2 * rows) + 512
    for one, other in zip(cache.arrays(), far.arrays(), strict=True):
        assert mx.array_equal(one, other).item()


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_a_cache_takes_the_bytes_it_says(dtype):
    shape = Shape(sinks=4, window=1_000, spare=12, kv_heads=3, head_dim=16, layers=5, dtype=dtype)
    gc.collect()
    before = mx.get_active_memory()
    cache = shape.cache()
    expected = 5 * dtype.size * 3 * 16 * (2 * (4 + 1_012) + 4)
    assert cache.nbytes == expected
    # The allocator rounds each of the 11 arrays up to its pages.
    assert expected <= mx.get_active_memory() - before < expected + 12 * 16_384


@pytest.mark.parametrize("limit", [0, CACHE_LIMIT], ids=["no cache", "4 MB of cache"])
def test_memory_does_not_grow_with_the_stream(limit):
    found = run(4_000, limit)
    assert found["flat"], found


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("sinks", [0, 4])
def test_a_decode_step_writes_in_place(tiny_model, sinks, bits):
    model = tiny_model(num_hidden_layers=8, max_position_embeddings=8_192, head_dim=64)
    cache = model.new_cache(sinks=sinks, window=4_096, kv_bits=bits)
    length = 10_000
    cache.restore(
        cache.state() | {"length": length, "floor": length - 4_096, "clock": length, "sinks_at": -1}
    )
    stream = TokenStream(model, cache)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for token in range(32):
        mx.eval(stream.read([token]))
    rise = mx.get_peak_memory() - before
    one = sum(array.nbytes for array in cache.storage.arrays(cache.current.keys[0]).values())
    # The scores over quantized rows, in float32, are in memory too.
    assert rise < one * (0.8 if bits else 0.5), (
        f"{rise} bytes; a layer's K is {one}, all {cache.nbytes}"
    )
    assert abs(mx.get_active_memory() - before) <= 16_384  # hidden states, logits


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_chunk_that_was_read_is_let_go(tiny_model, kv_heads, bits):
    model = tiny_model(
        num_hidden_layers=4, hidden_size=256, head_dim=64, num_key_value_heads=kv_heads
    )
    cache = model.new_cache(4, 200, kv_bits=bits)
    stream = TokenStream(model, cache)
    mx.eval(cache.arrays())
    gc.collect()
    before = mx.get_active_memory()
    stream.read([*range(3, 131)])
    gc.collect()
    hidden_states, a_layers_chunk = 128 * 256 * 4, 128 * 64 * 4 * kv_heads
    assert mx.get_active_memory() - before < hidden_states + a_layers_chunk
