"""Speed beside mlx-lm's: the same weights, one process, steps in turn; knows no command line.

Windows are filled with random keys and values through the caches' own state. Decoding is each
side's own loop, from a token's id to the next one's, the likeliest; mlx-lm's submits a step before
the last one is done. A step is one token, waited for.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.cache import StreamCache
from mlx_stream.cache.steps.verify import spare_rows
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.costs import (
    ReadRate,
    graph_nodes,
    read_rate,
    weight_bytes_read,
)
from mlx_stream.evaluate.mlx_lm import head_of, rotating_caches
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.load import Model
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.window import PREFILL_CHUNK

SINKS = 4
WARMUP = 2
TOKEN = 7  # what is read, whatever it means
# A slow machine or slow weights: no more pairs than fit this many seconds, but at least three.
SECONDS_PER_SERIES = 45.0
LEAST_PAIRS = 3
ENDLESS = 2**62
# Each decodes so many tokens before it is the other's turn: its own loop overlaps Python with the
# device from one token to the next.
TURN = 8

Step = Callable[[], None]
Build = Callable[[], mx.array]


@dataclass(frozen=True)
class Series:
    """Times of one kind of step, in seconds, taken in turn: pair i ran side by side."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        """mlx-lm's time over ours, of each pair: above 1, ours is faster."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def as_json(self) -> dict[str, Any]:
        return {
            "pairs": len(self.ours),
            "ratio_quartiles": quartiles(self.ratios),
            "ours_ms": quartiles([1e3 * x for x in self.ours]),
            "mlx_lm_ms": quartiles([1e3 * x for x in self.theirs]),
        }


def quartiles(values: list[float]) -> list[float]:
    """Return first quartile, median and third quartile."""
    return [float(x) for x in statistics.quantiles(values, n=4, method="inclusive")]


def bench(
    model: Model,
    peer: Any,
    windows: list[int],
    pairs: int = 40,
    chunk: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time decoding and prefill at full windows, ours and mlx-lm's in turn.

    Returns a result for each window, by its size; and under "read" how fast memory is read here.

    Args:
        windows: W of each comparison; both caches hold 4 + W tokens.
        pairs: decode steps of each, in turns of TURN (prefill: an eighth as many chunks).
        chunk: tokens of a prefill step. Default: what reading a text takes.

    Raises:
        ValueRefused: a number out of range.
    """
    chunk = PREFILL_CHUNK if chunk is None else chunk
    if pairs < LEAST_PAIRS:
        raise ValueRefused(f"--pairs must be at least {LEAST_PAIRS}, not {pairs}")
    if chunk < 2:
        raise ValueRefused(f"--chunk must be at least 2, not {chunk}")
    read = read_rate(progress)
    results = {}
    for asked in windows:
        _, window = model.resolve_window(SINKS, asked, progress)
        progress(f"window {window}: decoding")
        cache = model.new_cache(SINKS, window, spare_rows(None))
        fill(cache)
        decode = decoding(model, peer, cache, pairs)
        alone = in_turn(step_of(model, cache), their_step(model, peer, window, 1), pairs)
        progress(f"window {window}: Python of a step")
        built = costs_of_building(model, peer, window, pairs)
        must_read = bandwidth_limit(model, cache, read, statistics.median(decode.ours))
        progress(f"window {window}: prefill in chunks of {chunk}")
        prefill = in_turn(
            our_step(model, window, chunk),
            their_step(model, peer, window, chunk),
            max(LEAST_PAIRS, pairs // 8),
        )
        results[str(window)] = {
            "decode_ratio": decode.ratio,
            "step_ratio": alone.ratio,
            "prefill_ratio": prefill.ratio,
            "decode": decode.as_json(),
            "step": alone.as_json(),
            "prefill": prefill.as_json() | {"chunk": chunk},
            "python": built,
            "bytes": must_read,
        }
        del cache
        mx.clear_cache()
    return {
        "windows": results,
        "read": {"bytes_per_second": read.bytes_per_second, "operation": read.operation},
    }


def bandwidth_limit(
    model: Model, cache: StreamCache, read: ReadRate, seconds: float
) -> dict[str, float]:
    """Return what a step must read, and how near its time is to reading nothing else."""
    weights, held = weight_bytes_read(model.network), cache.nbytes
    least = (weights + held) / read.bytes_per_second
    share = least / seconds
    return {"weights": weights, "cache": held, "least_ms": 1e3 * least, "share_of_limit": share}


def decoding(model: Model, peer: Any, cache: StreamCache, pairs: int) -> Series:
    """Time each side's own loop, in turns of TURN tokens; the times are of one token."""
    step = step_of(model, cache)

    def ours() -> None:
        for _ in range(TURN):
            step()

    theirs = their_loop(model, peer, cache.geometry.window)
    turns = in_turn(ours, theirs, max(LEAST_PAIRS, pairs // TURN))
    return Series([x / TURN for x in turns.ours], [x / TURN for x in turns.theirs])


def in_turn(
    ours: Step, theirs: Step, pairs: int, seconds: float | None = SECONDS_PER_SERIES
) -> Series:
    """Run two steps in turn, changing which goes first, and time each.

    Ends after so many seconds, unless None, but not before the least number of pairs.
    """
    for _ in range(WARMUP):
        ours()
        theirs()
    times: dict[Step, list[float]] = {ours: [], theirs: []}
    started = time.perf_counter()
    for pair in range(pairs):
        for step in (ours, theirs) if pair % 2 == 0 else (theirs, ours):
            begun = time.perf_counter()
            step()
            times[step].append(time.perf_counter() - begun)
        late = seconds is not None and time.perf_counter() - started > seconds
        if late and pair + 1 >= LEAST_PAIRS:
            break
    return Series(times[ours], times[theirs])


def costs_of_building(model: Model, peer: Any, window: int, pairs: int) -> dict[str, Any]:
    """Return the milliseconds until a decode step's graph stands, not evaluated, and its nodes.

    Each step follows one of the same side: else the first to allocate would pay for tidying up what
    the other side's graph has freed (1.5 ms seen, with glibc).
    """
    cache = model.new_cache(SINKS, window, spare_rows(None))
    fill(cache)
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


def our_step(model: Model, window: int, count: int) -> Step:
    cache = model.new_cache(SINKS, window)
    fill(cache)
    return step_of(model, cache, count)


def step_of(model: Model, cache: StreamCache, count: int = 1) -> Step:
    """Return a step that reads `count` tokens into a cache and chooses the next.

    A cache that is changed otherwise needs a new step.
    """
    stream, greedy = TokenStream(model, cache), Sampler(Sampling(temperature=0))
    if count == 1:
        tokens = generate(stream, [TOKEN], greedy, ENDLESS)
        return lambda: void(next(tokens))
    return lambda: void(greedy.choose(stream.read([TOKEN] * count, count), stream.ids.attended))


def our_build(model: Model, cache: StreamCache) -> Build:
    """Return what builds the step that `generate` takes, and makes it part of the stream."""
    greedy, token = Sampler(Sampling(temperature=0)), mx.array([[TOKEN]], mx.uint32)
    tracing = backend.tracing()

    def build() -> mx.array:
        cache.prepare(1)
        step = cache.plan(1)
        decoded = model.compiled_steps.decode(step, token, tracing, greedy, greedy.key)
        cache.commit(step)
        assert decoded.token is not None
        return decoded.token

    return build


def void(value: object) -> None:
    pass


def fill(cache: StreamCache, clock: int | None = None) -> None:
    """Bring a stream to a full window of random keys and values, past its first wrap.

    Args:
        clock: where the rotary clock stands, at least the rows of the buffer; how far it is from
            the next re-anchoring. Default: as in a stream that has wrapped once.
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


def filled_caches(model: Model, peer: Any, window: int) -> list[Any]:
    """Return mlx-lm's rotating caches, full and past their wrap."""
    config, size = model.config, SINKS + window
    shape = (1, config.num_key_value_heads, size, config.head_dim)
    caches = rotating_caches(peer, size, SINKS)
    for cache in caches:
        keys, values = (mx.random.normal(shape, model.dtype) for _ in range(2))
        cache.state = (keys, values, 2 * size, SINKS, size, size)
    mx.eval([cache.state[:2] for cache in caches])
    return caches


def their_step(model: Model, peer: Any, window: int, count: int) -> Step:
    """Return mlx-lm's step: a decode step gives its token back, as its own loop does."""
    caches, head = filled_caches(model, peer, window), head_of(peer)
    token = TOKEN

    def decode() -> None:
        nonlocal token
        logits = peer(mx.array([[token]]), cache=caches)[:, -1]
        chosen: Any = mx.argmax(logits, axis=-1).item()
        token = chosen

    def prefill() -> None:
        hidden = peer.model(mx.array([[TOKEN] * count]), cache=caches)[:, -1:]
        mx.eval(mx.argmax(head(hidden), axis=-1), [cache.state[:2] for cache in caches])

    return decode if count == 1 else prefill


def their_loop(model: Model, peer: Any, window: int) -> Step:
    """Return a turn of mlx-lm's own generation, greedy."""
    from mlx_lm.generate import generate_step, generation_stream

    caches = filled_caches(model, peer, window)
    tokens = generate_step(mx.array([TOKEN]), peer, max_tokens=-1, prompt_cache=caches)

    def turn() -> None:
        for _ in range(TURN):
            next(tokens)
        with mx.stream(generation_stream):
            mx.synchronize()  # the token it has begun already is computed in its own turn

    return turn


def their_build(model: Model, peer: Any, window: int) -> Build:
    caches = filled_caches(model, peer, window)
    return lambda: mx.argmax(peer(mx.array([[TOKEN]]), cache=caches)[:, -1], axis=-1)
