"""Checks of streams: positions, chunks, in-place updates, single tracing, seeds, saved streams.

Windows are small, so that each one soon wraps around; their contents are random.
"""

import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_stream.cache import StreamCache
from mlx_stream.cache.positions import Rope
from mlx_stream.evaluate.bench import fill
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import ReadRequest, Want
from mlx_stream.generate.shared_step import run_together
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.selftest import reference
from mlx_stream.selftest.kernels import (
    ALLOWED,
    CheckOutcome,
    distance,
    kinds_of_rotation,
    plain,
    random,
    within,
    worst,
)

SINKS, WINDOW = 4, 24
AROUND_THE_LIMIT = 60  # tokens read before and after the clock is lowered
LARGE = 2_048
STEPS = 32
# The change that a different summation order may cause, relative to the spread (RMS) of logits.
SPREAD = {mx.float32: 1e-2, mx.float16: 3e-2, mx.bfloat16: 2e-1}


def places(model: Model) -> CheckOutcome:
    """Read tokens one by one and in chunks while the clock is lowered; compare each layer kind."""
    off = max(places_of_layer(model, rope) for rope in kinds_of_rotation(model))
    return within(off, ALLOWED[model.dtype])


def places_of_layer(model: Model, rope: Rope) -> float:
    """Return the largest difference between one layer's attention and numpy's."""
    one_layer = replace(model.attention, ropes=(rope,))
    cache = StreamCache(one_layer, SINKS, WINDOW, dtype=model.dtype)
    slow = reference.SlowStream(SINKS, WINDOW, cache.shape.scale(0), rope.frequencies)
    begin_at(cache, model, slow, cache.clock_limit - AROUND_THE_LIMIT)
    end, off, lowered = cache.clock_limit + AROUND_THE_LIMIT, 0.0, False
    counts = itertools.cycle((1, 1, 5, 1, 16, 30))
    while cache.length < end:
        first, clock = cache.length, cache.position.clock
        count = cache.max_step(next(counts))
        cache.prepare(count)
        step = cache.plan(count)
        heads = mx.concatenate([heads_of(model, first + i) for i in range(step.rows)], axis=2)
        found = plain(step.attend(0, heads))[:, :count]
        cache.commit(step)
        mx.eval(cache.arrays())
        lowered = lowered or cache.position.clock < clock
        expected = [slow.read(first + i, *parts(model, first + i)) for i in range(count)]
        off = max(off, worst(found, np.concatenate(expected, axis=1)))
    assert lowered, "the clock should have been lowered"
    return off


def heads_of(model: Model, token: int) -> mx.array:
    """Return a token's queries, keys and values: (1, H + 2K, 1, D)."""
    config = model.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return random(model, 1, heads, 1, config.head_dim, seed=token)


def parts(model: Model, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a token's queries, keys and values: (H, 1, D), (K, 1, D), (K, 1, D)."""
    queries = model.config.num_attention_heads
    ends = [queries, queries + model.config.num_key_value_heads]
    query, key, value = np.split(plain(heads_of(model, token)), ends)
    return query, key, value


def begin_at(cache: StreamCache, model: Model, slow: reference.SlowStream, length: int) -> None:
    """Put a stream and the reference into the state they have after `length` tokens."""
    geometry = cache.geometry
    oldest = length - geometry.window
    shape = (model.config.num_key_value_heads, geometry.rows, model.config.head_dim)
    keys, values = np.zeros(shape), np.zeros(shape)
    for token in (*range(SINKS), *range(oldest, length)):
        _, key, value = parts(model, token)
        slow.rows[token] = key, value
        row = geometry.row(token)
        keys[:, row : row + 1] = reference.rotate(key, np.array([token]), slow.frequencies)
        values[:, row : row + 1] = value
    sinks = np.concatenate([slow.rows[token][0] for token in range(SINKS)], axis=1)
    state = cache.state()
    state |= {"length": length, "floor": oldest, "clock": length, "sinks_at": -1}
    for name, rows in (("keys.0", keys), ("values.0", values), ("sinks", sinks)):
        state[name] = mx.array(rows[None].astype(np.float32)).astype(model.dtype)
    cache.restore(state)


def chunks(model: Model) -> CheckOutcome:
    """Read more ids than the ring holds, one by one and in chunks, and compare the predictions."""
    ids = some_ids(model, 3 * (SINKS + WINDOW))
    single, *others = (logits(model, ids, chunk) for chunk in (1, 7, PREFILL_CHUNK))
    return within(max(distance(other, single) for other in others), SPREAD[model.dtype])


def shared_step(model: Model) -> CheckOutcome:
    """Decode four streams with wrapped rings, in shared steps and separately, and compare."""
    off, texts = 0.0, [some_ids(model, SINKS + WINDOW + 9 * one)[9 * one :] for one in range(4)]
    kinds = [model.new_cache(SINKS, WINDOW) for _ in range(8)]
    streams = [TokenStream(model, cache) for cache in kinds]
    shared, alone = streams[:4], streams[4:]
    for ids, *pair in zip(texts, shared, alone, strict=True):
        for stream in pair:
            stream.read(ids)
    for token in some_ids(model, STEPS):
        requests = [ReadRequest(stream, [token], Want.LOGITS) for stream in shared]
        for found, stream in zip(run_together(requests), alone, strict=True):
            if isinstance(found, Exception):
                raise found
            assert found.logits is not None
            off = max(off, distance(plain(found.logits[None]), plain(stream.read([token])[None])))
    return within(off, SPREAD[model.dtype])


def some_ids(model: Model, count: int) -> list[int]:
    return np.random.default_rng(5).integers(0, model.config.vocab_size, count).tolist()


def logits(model: Model, ids: list[int], chunk: int) -> np.ndarray:
    """Return the logits after each of the last tokens, computed with a full window."""
    stream = TokenStream(model, model.new_cache(SINKS, WINDOW))
    hidden = mx.concatenate([*stream.steps(ids, chunk)], axis=1)[:, -(SINKS + WINDOW) :]
    return plain(model.network.logits(hidden))


def in_place(model: Model) -> CheckOutcome:
    """Decode with a full window and measure peak memory.

    A step itself needs as much as with a small window, plus the scores of a few layers, which the
    CPU frees late. A copied buffer would add its whole size.
    """
    _, large = model.resolve_window(SINKS, None)
    small, large = WINDOW, min(large, LARGE)
    if large < 4 * small:
        return CheckOutcome(None, f"not applicable: a window of {large} is too small to tell")
    keys = model.new_cache(SINKS, large).current.keys[0]
    assert isinstance(keys, mx.array)
    buffer, attention = keys.nbytes, scores(model, keys)
    if 4 * attention > buffer:
        return CheckOutcome(
            None, "not applicable: with heads this small, the scores are too large to tell"
        )
    beyond = rise(model, large) - rise(model, small) - 3 * attention
    more = f"{max(beyond, 0) / 1e6:.2f} MB more over {STEPS} steps"
    said = f"{more}; a buffer is {buffer / 1e6:.2f} MB"
    return CheckOutcome(beyond < buffer / 2, said)


def rise(model: Model, window: int) -> int:
    """Return how much peak active memory rises over a few steps, in bytes."""
    fill(cache := model.new_cache(SINKS, window))
    tokens = generate(TokenStream(model, cache), [0], greedy(), 2 * STEPS)
    mx.reset_peak_memory()
    before = (
        mx.get_active_memory()
    )  # measured before a step can leave a second copy of a buffer behind
    for _ in range(STEPS):
        next(tokens)
    return mx.get_peak_memory() - before


def scores(model: Model, keys: mx.array) -> int:
    """Return how many bytes the peak rises while one token attends to all rows of a buffer."""
    queries = random(model, 1, model.config.num_attention_heads, 1, model.config.head_dim)
    mx.eval(queries, keys)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=1.0, mask=None))
    return mx.get_peak_memory() - before


def greedy() -> Sampler:
    return Sampler(Sampling(temperature=0))


def traced_once(model: Model) -> CheckOutcome:
    """Decode while the clock is lowered, and count the traces made in the process."""
    cache = model.new_cache(SINKS, WINDOW)
    fill(cache, cache.clock_limit - STEPS // 2)
    tokens = generate(TokenStream(model, cache), [0], greedy(), 2 * STEPS)
    for _ in range(STEPS // 4):
        next(tokens)
    before = model.compiled_steps.count
    if not before:
        return CheckOutcome(None, "not applicable: no step is traced here (see MLX_STREAM_COMPILE)")
    clock = cache.position.clock
    for _ in range(STEPS):
        next(tokens)
    assert cache.position.clock < clock, "the clock should have been lowered"
    more = model.compiled_steps.count - before
    return CheckOutcome(more == 0, f"traced again {more} times in {STEPS} steps")


def seeds(model: Model) -> CheckOutcome:
    """Sample twice with one seed and once with another; draw three seeds, one on another thread."""
    level = mx.zeros(model.config.vocab_size)

    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=seed))
        return [sampler.choose(level, list) for _ in range(STEPS)]

    def unseeded() -> int | None:
        return Sampling().with_seed().seed

    first, again, other = drawn(1), drawn(1), drawn(2)
    with ThreadPoolExecutor(1) as thread:
        unlike = {unseeded(), unseeded(), thread.submit(unseeded).result()}
    faults = {
        "one seed gave two texts": again != first,
        "two seeds gave one text": other == first,
        "every draw was the same": len(set(first)) == 1,
        "two draws without a seed were the same": len(unlike) < 3,
    }
    wrong = [fault for fault, found in faults.items() if found]
    return CheckOutcome(
        not wrong,
        "; ".join(wrong) or f"{STEPS} draws repeat with the same seed and differ otherwise",
    )


def snapshot_restores(model: Model) -> CheckOutcome:
    """Save a stream after its ring has wrapped, restore it from the file, and continue both."""
    ids = some_ids(model, 2 * (SINKS + WINDOW))
    stream = TokenStream(model, model.new_cache(SINKS, WINDOW))
    for _ in stream.steps(ids):
        pass
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream"
        snapshot.save_snapshot(path, stream, "self-test", {})
        state = snapshot.load_snapshot(path).state
    again = TokenStream(model, model.new_cache(SINKS, WINDOW))
    again.restore(state)
    differ = sum(
        not mx.array_equal(stream.read([token]), again.read([token])).item()
        for token in ids[: STEPS // 2]
    )
    return CheckOutcome(differ == 0, f"{differ} of {STEPS // 2} predictions differ")
