"""Compares our speed with mlx-lm's: the same weights, in one process, alternating step by step.

Windows are filled with random keys and values through the caches' own state. Decoding runs each
side's own greedy loop, from one token id to the next; mlx-lm's loop submits a step before the
previous one is done. A step reads one token and waits for the result.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.cache import StreamCache
from mlx_stream.cache.steps.verify import spare_rows
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.costs import graph_nodes, read_rate, time_step, weight_bytes_read
from mlx_stream.evaluate.mlx_lm import head_of, rotating_caches
from mlx_stream.evaluate.report import Row
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.program.notices import Notify, discard
from mlx_stream.sampling import Sampler, Sampling

SINKS = 4
WARMUP = 2
TOKEN = 7  # any token
# On a slow machine, run only as many pairs as fit in this many seconds, but at least three.
SECONDS_PER_SERIES = 45.0
LEAST_PAIRS = 3
ENDLESS = 2**62
# How many tokens each side decodes per turn: within a turn, each loop overlaps Python work with
# device work across tokens.
TURN = 8

Step = Callable[[], None]
Build = Callable[[], mx.array]


def summary(ours: list[float], theirs: list[float]) -> Row:
    """Summarize alternating timings, in seconds: each pair was measured back to back.

    A ratio is mlx-lm's time over ours: above 1, ours is faster.
    """
    return {
        "pairs": len(ours),
        "ratio_quartiles": quartiles([b / a for a, b in zip(ours, theirs, strict=True)]),
        "ours_ms": quartiles([1e3 * x for x in ours]),
        "mlx_lm_ms": quartiles([1e3 * x for x in theirs]),
    }


def quartiles(values: list[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    return [float(x) for x in statistics.quantiles(values, n=4, method="inclusive")]


def bench(
    model: Model,
    peer: Any,
    windows: list[int],
    pairs: int = 40,
    chunk: int = PREFILL_CHUNK,
    progress: Notify = discard,
) -> Row:
    """Time decoding and prefill with full windows, alternating between ours and mlx-lm's.

    Both caches hold 4 + W tokens, for each W in `windows`. Each side runs `pairs` decode steps and
    an eighth as many prefill chunks. Raises ValueRefused if a number is out of range.
    """
    if pairs < LEAST_PAIRS:
        raise ValueRefused(f"--pairs must be at least {LEAST_PAIRS}, not {pairs}")
    if chunk < 2:
        raise ValueRefused(f"--chunk must be at least 2, not {chunk}")
    read = read_rate(progress)
    results = {}
    for asked in windows:
        _, window = model.resolve_window(SINKS, asked, progress)
        progress(f"window {window}: decoding")
        cache = filled_cache(model, window, spare_rows(None))
        decode = decoding(model, peer, cache, pairs)
        theirs = their_step(model, peer, window, 1)
        step = summary(*in_turn(step_of(model, cache), theirs, pairs))
        progress(f"window {window}: Python time of a step")
        built = costs_of_building(model, peer, window, pairs)
        seconds = decode["ours_ms"][1] / 1e3
        must_read = bandwidth_limit(model, cache, read["bytes_per_second"], seconds)
        progress(f"window {window}: prefill in chunks of {chunk}")
        ours = step_of(model, filled_cache(model, window), chunk)
        theirs = their_step(model, peer, window, chunk)
        prefill = summary(*in_turn(ours, theirs, max(LEAST_PAIRS, pairs // 8))) | {"chunk": chunk}
        times = {"decode": decode, "step": step, "prefill": prefill}
        ratios = {f"{name}_ratio": found["ratio_quartiles"][1] for name, found in times.items()}
        results[str(window)] = ratios | times | {"python": built, "bytes": must_read}
        del cache, ours, theirs
        mx.clear_cache()
    return {"windows": results, "read": read}


def bandwidth_limit(model: Model, cache: StreamCache, rate: float, seconds: float) -> Row:
    """Return what a step must read, and how close its duration comes to the bandwidth limit."""
    weights, rows = weight_bytes_read(model.network), cache.nbytes
    least = (weights + rows) / rate
    share = least / seconds
    return {"weights": weights, "cache": rows, "least_ms": 1e3 * least, "share_of_limit": share}


def decoding(model: Model, peer: Any, cache: StreamCache, pairs: int) -> Row:
    """Time the two loops alternately, TURN tokens at a time; return times per token."""
    step = step_of(model, cache)  # local, because a pending step would change the cache
    theirs = their_loop(model, peer, cache.geometry.window)
    turns = in_turn(lambda: repeat(step, TURN), theirs, max(LEAST_PAIRS, pairs // TURN))
    return summary(*([seconds / TURN for seconds in side] for side in turns))


def repeat(step: Step, count: int) -> None:
    for _ in range(count):
        step()


def in_turn(
    ours: Step, theirs: Step, pairs: int, seconds: float | None = SECONDS_PER_SERIES
) -> tuple[list[float], list[float]]:
    """Run two steps in pairs, alternating which goes first; return the time of each in seconds.

    Stops after `seconds`, unless that is None, but not before the minimum number of pairs.
    """
    repeat(ours, WARMUP)
    repeat(theirs, WARMUP)
    times: dict[Step, list[float]] = {ours: [], theirs: []}
    started = time.perf_counter()
    for pair in range(pairs):
        for step in (ours, theirs) if pair % 2 == 0 else (theirs, ours):
            times[step].append(time_step(step))
        late = seconds is not None and time.perf_counter() - started > seconds
        if late and pair + 1 >= LEAST_PAIRS:
            break
    return times[ours], times[theirs]


def costs_of_building(model: Model, peer: Any, window: int, pairs: int) -> Row:
    """Return the time in ms to build (not evaluate) a decode step's graph, and its node count.

    Each step follows one from the same side. Otherwise the first to allocate would pay for cleaning
    up what the other side's graph freed (1.5 ms, measured with glibc).
    """
    cache = filled_cache(model, window, spare_rows(None))
    builds = {"ours": our_build(model, cache), "mlx_lm": their_build(model, peer, window)}
    for build in [*builds.values()] * WARMUP:
        mx.eval(build())
    times: dict[str, list[float]] = {name: [] for name in builds}
    nodes: dict[str, int] = {}
    for pair in range(pairs):
        for name in builds if pair % 2 == 0 else reversed(builds):
            mx.eval(builds[name]())
            begun = time.perf_counter()
            token = builds[name]()
            times[name].append(1e3 * (time.perf_counter() - begun))
            nodes[name] = nodes.get(name) or graph_nodes(token)
            mx.eval(token)
    ours, theirs = quartiles(times["ours"]), quartiles(times["mlx_lm"])
    return {
        "ours_ms": ours,
        "mlx_lm_ms": theirs,
        "share": ours[1] / theirs[1],
        "ours_nodes": nodes["ours"],
        "mlx_lm_nodes": nodes["mlx_lm"],
        "node_share": nodes["ours"] / nodes["mlx_lm"],
    }


# --- ours ---


def step_of(model: Model, cache: StreamCache, count: int = 1) -> Step:
    """Return a step that reads `count` tokens into a cache and chooses the next.

    If anything else changes the cache, a new step is needed.
    """
    stream, greedy = TokenStream(model, cache), Sampler(Sampling(temperature=0))
    tokens = generate(stream, [TOKEN], greedy, ENDLESS)

    def decode() -> None:
        next(tokens)

    def prefill() -> None:
        greedy.choose(stream.read([TOKEN] * count, count), stream.ids.attended)

    return decode if count == 1 else prefill


def our_build(model: Model, cache: StreamCache) -> Build:
    """Return a function that builds the step that `generate` runs and commits it to the stream."""
    greedy, token = Sampler(Sampling(temperature=0)), mx.array([[TOKEN]], mx.uint32)
    tracing = backend.tracing()

    def build() -> mx.array:
        cache.prepare(1)
        step = cache.plan(1)
        decoded = model.compiled_steps.decode(step, token, tracing, greedy, greedy.random.key)
        cache.commit(step)
        assert decoded.token is not None
        return decoded.token

    return build


def filled_cache(model: Model, window: int, spare: int = 0) -> StreamCache:
    cache = model.new_cache(SINKS, window, spare)
    fill(cache)
    return cache


def fill(cache: StreamCache, clock: int | None = None) -> None:
    """Bring a stream to a full window of random keys and values, past its first wrap.

    `clock`, the rotary clock, determines how far away the next re-anchoring is; it must be at least
    the number of rows in the buffer. Default: as in a stream that has wrapped once.
    """
    state = cache.state()
    length = 2 * cache.geometry.rows if clock is None else clock
    ring = cache.geometry.ring
    state |= {"length": length, "floor": length - ring, "clock": length, "sinks_at": -1}
    for name, value in state.items():
        if isinstance(value, mx.array):
            state[name] = mx.random.normal(value.shape, value.dtype)
    cache.restore(state)


# --- mlx-lm ---


def filled_caches(model: Model, peer: Any, window: int, keep: int = SINKS) -> list[Any]:
    """Return mlx-lm's rotating caches, full and past their first wrap."""
    config, size = model.config, SINKS + window
    shape = (1, config.num_key_value_heads, size, config.head_dim)
    caches = rotating_caches(peer, size, keep)
    for cache in caches:
        keys, values = (mx.random.normal(shape, model.dtype) for _ in range(2))
        cache.state = (keys, values, 2 * size, keep, size, size)
    mx.eval([cache.state[:2] for cache in caches])
    return caches


def their_step(model: Model, peer: Any, window: int, count: int) -> Step:
    """Return mlx-lm's step: a decode step fetches its token, as mlx-lm's own loop does."""
    caches, head = filled_caches(model, peer, window), head_of(peer)
    token: Any = TOKEN

    def decode() -> None:
        nonlocal token
        logits = peer(mx.array([[token]]), cache=caches)[:, -1]
        token = mx.argmax(logits, axis=-1).item()

    def prefill() -> None:
        hidden = peer.model(mx.array([[TOKEN] * count]), cache=caches)[:, -1:]
        mx.eval(mx.argmax(head(hidden), axis=-1), [cache.state[:2] for cache in caches])

    return decode if count == 1 else prefill


def their_loop(model: Model, peer: Any, window: int) -> Step:
    """Return a function that runs one turn of mlx-lm's own greedy generation."""
    from mlx_lm.generate import generate_step, generation_stream

    caches = filled_caches(model, peer, window)
    tokens = generate_step(mx.array([TOKEN]), peer, max_tokens=-1, prompt_cache=caches)

    def turn() -> None:
        for _ in range(TURN):
            next(tokens)
        with mx.stream(generation_stream):
            mx.synchronize()  # a token already started counts toward this turn

    return turn


def their_build(model: Model, peer: Any, window: int) -> Build:
    caches = filled_caches(model, peer, window)
    return lambda: mx.argmax(peer(mx.array([[TOKEN]]), cache=caches)[:, -1], axis=-1)
