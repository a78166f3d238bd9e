"""`eval latency`: time per token at several cache sizes: streaming, recompute, mlx-lm.

Caches are full of random keys, past their first wrap, and stay full. Streaming and mlx-lm
alternate step by step; the stream re-anchors halfway through, as a long stream does.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_stream.cache import StreamCache
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.bench import SINKS, TOKEN, Step, fill, in_turn, step_of, their_step
from mlx_stream.evaluate.costs import time_step
from mlx_stream.evaluate.readers import RECOMPUTE_CHUNK
from mlx_stream.evaluate.report import Row
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.program.notices import Notify, discard

LEAST_STEPS = 20
RECOMPUTED = 5
FORCED = 20


def measure_latency(
    model: Model, peer: Any | None, sizes: dict[int, int], progress: Notify = discard
) -> Iterator[Row]:
    """Yield a row of milliseconds per token for each cache size and method.

    `peer` is mlx-lm's model with the same weights, or None. `sizes` maps the number of tokens in
    the cache to the number of steps to time. Raises ValueRefused if there are too few steps.
    """
    if min(sizes.values()) < LEAST_STEPS:
        raise ValueRefused(f"--steps must be at least {LEAST_STEPS}, not {min(sizes.values())}")
    for size, steps in sizes.items():
        progress(f"cache {size:,}: {steps:,} steps")
        cache = model.new_cache(SINKS, size - SINKS)
        # A re-anchoring happens halfway through the steps.
        fill(cache, max(cache.geometry.rows, cache.clock_limit - steps // 2))
        ours = step_of(model, cache)
        if peer is None:
            yield latency_row(size, "stream", [time_step(ours) for _ in range(steps)])
        else:
            times = in_turn(ours, their_step(model, peer, size - SINKS, 1), steps, None)
            for method, seconds in zip(("stream", "mlx-lm"), times, strict=True):
                yield latency_row(size, method, seconds)
        del ours  # a step may keep the buffers alive
        progress(f"cache {size:,}: {FORCED} re-anchorings")
        plain, turned = force_reanchoring(model, cache)
        yield latency_row(size, "stream, plain", plain)
        yield latency_row(size, "stream, re-anchoring", turned)
        del cache
        progress(f"cache {size:,}: recompute, {RECOMPUTED} steps")
        again = recompute_step(model, size)
        yield latency_row(size, "recompute", [time_step(again) for _ in range(RECOMPUTED)])
        mx.clear_cache()


def force_reanchoring(model: Model, cache: StreamCache) -> tuple[list[float], list[float]]:
    """Return the times of plain steps and of re-anchoring ones, measured alternately."""
    plain, turned = [], []
    for _ in range(FORCED):
        fill(cache, cache.clock_limit - 2)
        step = step_of(model, cache)
        step()  # the first step after a refill uses fresh memory
        plain.append(time_step(step))
        before = cache.position.clock
        turned.append(time_step(step))
        assert cache.position.clock < before, "this step should have re-anchored"
    return plain, turned


def recompute_step(model: Model, size: int) -> Step:
    def step() -> None:
        stream = TokenStream(model, model.new_dense_cache())
        mx.eval(mx.argmax(stream.read([TOKEN] * size, RECOMPUTE_CHUNK)))

    return step


def latency_row(size: int, method: str, seconds: Sequence[float]) -> Row:
    times = [1e3 * value for value in seconds]
    hundredths = statistics.quantiles(times, n=100, method="inclusive")
    row: Row = {"cache": size, "method": method, "steps": len(times)}
    row |= {f"p{percent}_ms": hundredths[percent - 1] for percent in (50, 95, 99)}
    return {**row, "max_ms": max(times)}


def findings(rows: Sequence[Row]) -> list[str]:
    """Return sentences that describe what the rows show: growth, speed-up, stalls."""
    at = {(row["cache"], row["method"]): row for row in rows}
    sizes = sorted({row["cache"] for row in rows})
    low, high = sizes[0], sizes[-1]
    lines = []
    if low != high:
        growth = at[high, "stream"]["p50_ms"] / at[low, "stream"]["p50_ms"]
        lines.append(
            f"a streaming step takes {growth:.2f} times as long with cache {high:,} as with {low:,}"
        )
    for size in sizes:
        ours = at[size, "stream"]
        faster = at[size, "recompute"]["p50_ms"] / ours["p50_ms"]
        turned = at[size, "stream, re-anchoring"]["p50_ms"] / at[size, "stream, plain"]["p50_ms"]
        line = f"cache {size:,}: {faster:.1f} times faster than recompute"
        line += f"; a re-anchoring step takes as long as {turned:.2f} plain ones"
        line += f"; p99 / p50 {ours['p99_ms'] / ours['p50_ms']:.3f}"
        if theirs := at.get((size, "mlx-lm")):
            line += f", mlx-lm's {theirs['p99_ms'] / theirs['p50_ms']:.3f}"
        lines.append(line)
    return lines
