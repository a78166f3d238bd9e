"""Speed beside mlx-lm's: the same weights, one process, steps in turn; knows no command line.

Windows are filled with random keys and values through the caches' own state.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_stream.cache import StreamCache
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.peer import head_of, rotating_caches
from mlx_stream.generate import PREFILL_CHUNK
from mlx_stream.load import Model

SINKS = 4
WARMUP = 2
# A slow machine or slow weights: no more pairs than fit this many seconds, but at least three.
SECONDS_PER_SERIES = 45.0
LEAST_PAIRS = 3

Step = Callable[[], None]


@dataclass(frozen=True)
class Series:
    """Times of one kind of step, in seconds, taken in turn: pair i ran side by side."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """mlx-lm's time over ours, median over the pairs: above 1, ours is faster."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

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
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time decoding and prefill at full windows, ours and mlx-lm's in turn.

    Args:
        windows: W of each comparison; both caches hold 4 + W tokens.
        pairs: decode steps of each (prefill: an eighth as many chunks).
        chunk: tokens of a prefill step.

    Raises:
        ValueRefused: a number out of range.
    """
    if pairs < LEAST_PAIRS:
        raise ValueRefused(f"--pairs must be at least {LEAST_PAIRS}, not {pairs}")
    if chunk < 2:
        raise ValueRefused(f"--chunk must be at least 2, not {chunk}")
    results = {}
    for asked in windows:
        _, window = model.resolve_window(SINKS, asked, progress)
        progress(f"window {window}: decoding")
        decode = in_turn(our_step(model, window, 1), their_step(model, peer, window, 1), pairs)
        progress(f"window {window}: prefill in chunks of {chunk}")
        prefill = in_turn(
            our_step(model, window, chunk),
            their_step(model, peer, window, chunk),
            max(LEAST_PAIRS, pairs // 8),
        )
        results[str(window)] = {
            "decode_ratio": decode.ratio,
            "prefill_ratio": prefill.ratio,
            "decode": decode.as_json(),
            "prefill": prefill.as_json() | {"chunk": chunk},
        }
        mx.clear_cache()
    return results


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


def our_step(model: Model, window: int, count: int) -> Step:
    cache = model.new_cache(SINKS, window)
    fill(cache)
    return step_of(model, cache, count)


def step_of(model: Model, cache: StreamCache, count: int = 1) -> Step:
    """Return a step that reads `count` tokens into a cache and chooses the next."""
    ids = [7] * count

    def step() -> None:
        left = count
        while True:
            taken = cache.take(left)
            hidden = model.network(ids[:taken], cache)
            left -= taken
            if not left:
                break
        token = mx.argmax(model.network.logits(hidden[:, -1]), axis=-1)
        mx.eval(token)
        if count > 1:
            mx.eval(cache.arrays())

    return step


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


def their_step(model: Model, peer: Any, window: int, count: int) -> Step:
    config = model.config
    size = SINKS + window
    shape = (1, config.num_key_value_heads, size, config.head_dim)
    caches = rotating_caches(peer, size, SINKS)
    for cache in caches:
        keys, values = (mx.random.normal(shape, model.dtype) for _ in range(2))
        cache.state = (keys, values, 2 * size, SINKS, size, size)
    mx.eval([cache.state[:2] for cache in caches])
    ids, head = mx.array([[7] * count]), head_of(peer)

    def step() -> None:
        hidden = peer.model(ids, cache=caches)[:, -1:]
        token = mx.argmax(head(hidden), axis=-1)
        mx.eval(token, [cache.state[:2] for cache in caches] if count > 1 else ())

    return step
