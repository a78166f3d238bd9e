"""`eval latency`: time per token at several cache sizes: streaming, recompute, mlx-lm.

Caches are full of random keys, past their first wrap, and stay full. Streaming and mlx-lm take
steps in turn; ours crosses a re-anchoring in the middle of its steps, as a long stream does.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_stream.cache import StreamCache
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.bench import SINKS, Step, fill, in_turn, step_of, their_step
from mlx_stream.evaluate.readers import RECOMPUTE_CHUNK
from mlx_stream.evaluate.report import Row
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import Model

LEAST_STEPS = 20
RECOMPUTED = 5
FORCED = 20


@dataclass(frozen=True)
class Size:
    """A cache of `capacity` tokens, and how many steps are timed at it."""

    capacity: int
    steps: int

    @property
    def window(self) -> int:
        return self.capacity - SINKS


def parse_sizes(text: str, steps: int) -> Size:
    """Read `TOKENS[,steps=N]`.

    Raises:
        ValueRefused: not that, or out of range.
    """
    capacity, *pairs = text.split(",")
    values = [capacity]
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key != "steps" or len(pairs) > 1:
            raise ValueRefused(f"--cache {text}: takes steps, once, not {','.join(pairs)!r}")
        values.append(value)
    if not all(v.isascii() and v.isdigit() and len(v) < 10 for v in values):
        raise ValueRefused(f"--cache must be TOKENS or TOKENS,steps=N, not {text!r}")
    size = Size(int(capacity), int(values[-1]) if pairs else steps)
    if size.capacity <= SINKS:
        raise ValueRefused(f"--cache {text}: must exceed the {SINKS} sinks")
    if size.steps < LEAST_STEPS:
        option = f"--cache {text}: steps" if pairs else "--steps"
        raise ValueRefused(f"{option} must be at least {LEAST_STEPS}, not {size.steps}")
    return size


def measure_latency(
    model: Model,
    peer: Any | None,
    sizes: Sequence[Size],
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Row]:
    """Yield a row of milliseconds per token for each size and method.

    Args:
        peer: mlx-lm's model of the same weights, or None to leave it out.

    Raises:
        ValueRefused: a size the model cannot have.
    """
    capacities = [size.capacity for size in sizes]
    twice = next((one for one in capacities if capacities.count(one) > 1), None)
    if twice is not None:
        raise ValueRefused(f"--cache {twice} is given twice")
    for size in sizes:
        if model.resolve_window(SINKS, size.window) != (SINKS, size.window):
            raise ValueRefused(
                f"a cache of {size.capacity} exceeds the model's sliding_window of "
                f"{model.config.sliding_window}: leave it out"
            )
    for size in sizes:
        progress(f"cache {size.capacity:,}: {size.steps:,} steps")
        cache = model.new_cache(SINKS, size.window)
        fill(cache, halfway(cache, size.steps))
        ours = step_of(model, cache)
        if peer is None:
            times = [time_step(ours) for _ in range(size.steps)]
            yield latency_row(size, "stream", times)
        else:
            series = in_turn(ours, their_step(model, peer, size.window, 1), size.steps, None)
            yield latency_row(size, "stream", series.ours)
            yield latency_row(size, "mlx-lm", series.theirs)
        del ours  # a step may hold the buffers
        progress(f"cache {size.capacity:,}: {FORCED} re-anchorings")
        plain, turned = force_token(model, cache)
        yield latency_row(size, "stream, plain", plain)
        yield latency_row(size, "stream, re-anchoring", turned)
        del cache
        progress(f"cache {size.capacity:,}: recompute, {RECOMPUTED} steps")
        yield latency_row(
            size, "recompute", [time_step(recompute_step(model, size)) for _ in range(RECOMPUTED)]
        )
        mx.clear_cache()


def halfway(cache: StreamCache, steps: int) -> int:
    """Return the clock from which a re-anchoring comes in the middle of so many steps."""
    return max(cache.geometry.rows, cache.clock_limit - steps // 2)


def force_token(model: Model, cache: StreamCache) -> tuple[list[float], list[float]]:
    """Return the times of plain steps and of re-anchoring ones, taken in turn."""
    plain, turned = [], []
    for _ in range(FORCED):
        fill(cache, cache.clock_limit - 2)
        step = step_of(model, cache)
        step()  # the first after a refill meets fresh memory
        plain.append(time_step(step))
        before = cache.position.clock
        turned.append(time_step(step))
        assert cache.position.clock < before, "this step should have re-anchored"
    return plain, turned


def recompute_step(model: Model, size: Size) -> Step:
    ids = [7] * size.capacity

    def step() -> None:
        stream = TokenStream(model, model.new_dense_cache())
        mx.eval(mx.argmax(stream.read(ids, RECOMPUTE_CHUNK)))

    return step


def time_step(step: Step) -> float:
    """Return the seconds a step takes."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def latency_row(size: Size, method: str, seconds: Sequence[float]) -> Row:
    ordered = [1e3 * value for value in sorted(seconds)]
    hundredths = statistics.quantiles(ordered, n=100, method="inclusive")
    return {
        "cache": size.capacity,
        "method": method,
        "steps": len(ordered),
        "p50_ms": hundredths[49],
        "p95_ms": hundredths[94],
        "p99_ms": hundredths[98],
        "max_ms": ordered[-1],
    }


def findings(rows: Sequence[Row]) -> list[str]:
    """Return what the rows say, in sentences: growth, speed-up, stalls."""
    at = {(row["cache"], row["method"]): row for row in rows}
    sizes = sorted({row["cache"] for row in rows})
    low, high = sizes[0], sizes[-1]
    lines = []
    if low != high:
        growth = at[high, "stream"]["p50_ms"] / at[low, "stream"]["p50_ms"]
        lines.append(f"streaming grows {growth:.2f} times from cache {low:,} to {high:,}")
    for size in sizes:
        ours = at[size, "stream"]
        line = (
            f"cache {size:,}: {at[size, 'recompute']['p50_ms'] / ours['p50_ms']:.1f} times faster "
        )
        line += "than recompute"
        turned = at[size, "stream, re-anchoring"]["p50_ms"] / at[size, "stream, plain"]["p50_ms"]
        line += f"; a re-anchoring step takes {turned:.2f} plain ones"
        line += f"; p99 / p50 {ours['p99_ms'] / ours['p50_ms']:.3f}"
        if theirs := at.get((size, "mlx-lm")):
            line += f", of mlx-lm {theirs['p99_ms'] / theirs['p50_ms']:.3f}"
        lines.append(line)
    return lines
