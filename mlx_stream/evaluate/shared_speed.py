"""Compares the speed of several streams at once: in shared steps, in turn, and in mlx-lm's batch.

All windows are full. Each round reads one token of every stream. The rounds alternate, all in one
process. mlx-lm's batch has rotating caches of the same size, but no sinks, which mlx-lm refuses in
a batch.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_stream.cache.steps.verify import spare_rows
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.bench import SINKS, TOKEN, WARMUP, filled_cache, filled_caches, quartiles
from mlx_stream.evaluate.costs import time_step
from mlx_stream.evaluate.report import Row
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.shared_step import run_together
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.models.window import MOST_STREAMS
from mlx_stream.program.notices import Notify, discard
from mlx_stream.sampling import Sampler, Sampling

LEAST_ROUNDS = 3

Round = Callable[[], None]


def shared_speed(
    model: Model,
    peer: Any,
    counts: Sequence[int],
    window: int,
    rounds: int,
    progress: Notify = discard,
) -> list[Row]:
    """Time rounds that read one token of each of several streams, with greedy sampling.

    Returns, for each count, the quartiles, in milliseconds, of a round in one shared step, of a
    round that steps the streams in turn, and of a round of mlx-lm's batch; and the throughput of
    each as a multiple of a single stream's: ours relative to our single stream, mlx-lm's relative
    to its own.

    Raises:
        ValueRefused: a number is out of range.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueRefused(f"--pairs must be at least {LEAST_ROUNDS}, not {rounds}")
    if not counts or not all(1 <= count <= MOST_STREAMS for count in counts):
        raise ValueRefused(f"--streams must be numbers from 1 to {MOST_STREAMS}, such as 1,2,4,8")
    _, window = model.resolve_window(SINKS, window, progress)
    rows: list[Row] = []
    for count in counts:
        progress(f"window {window}, {count} at once")
        sides: dict[str, Round] = {
            "one": one_by_one(model, window, 1),
            "shared": together(model, window, count),
            "in_turn": one_by_one(model, window, count),
            "mlx_lm_one": their_batch(model, peer, window, 1),
            "mlx_lm": their_batch(model, peer, window, count),
        }
        times = alternate(sides, rounds)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        rows.append(
            {
                "streams": count,
                "window": window,
                "rounds": rounds,
                **{
                    f"{name}_ms": quartiles([1e3 * s for s in each]) for name, each in times.items()
                },
                "shared_gain": count * median["one"] / median["shared"],
                "in_turn_gain": count * median["one"] / median["in_turn"],
                "mlx_lm_gain": count * median["mlx_lm_one"] / median["mlx_lm"],
                "ratio": statistics.median(
                    theirs / ours
                    for ours, theirs in zip(times["shared"], times["mlx_lm"], strict=True)
                ),
            }
        )
        mx.clear_cache()
    return rows


def alternate(sides: dict[str, Round], rounds: int) -> dict[str, list[float]]:
    """Run a round of each side in turn, starting with a different side each time."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = [*sides]
    for at in range(-WARMUP, rounds):
        for name in [*names[at % len(names) :], *names[: at % len(names)]]:
            seconds = time_step(sides[name])
            if at >= 0:
                times[name].append(seconds)
    return times


def requests_of(model: Model, window: int, count: int) -> list[ReadRequest]:
    """Return a request for the next token of each of several streams with full windows."""
    streams = [
        TokenStream(model, filled_cache(model, window, spare_rows(None))) for _ in range(count)
    ]
    greedy = [Sampler(Sampling(temperature=0)) for _ in range(count)]
    return [
        ReadRequest(stream, (TOKEN,), Want.TOKEN, sampler=sampler)
        for stream, sampler in zip(streams, greedy, strict=True)
    ]


def together(model: Model, window: int, count: int) -> Round:
    requests = requests_of(model, window, count)

    def step() -> None:
        for request, result in zip(requests, run_together(requests), strict=True):
            request.ids = (token_of(result),)

    return step


def one_by_one(model: Model, window: int, count: int) -> Round:
    requests = requests_of(model, window, count)

    def step() -> None:
        for request in requests:
            request.ids = (token_of(request.stream.run(request)),)

    return step


def token_of(result: ReadResult | Exception) -> int:
    if isinstance(result, Exception):
        raise result
    return result.token


def their_batch(model: Model, peer: Any, window: int, count: int) -> Round:
    """Return a round of mlx-lm's batch; a single stream gets the same kind of cache."""
    from mlx_lm.models.cache import BatchRotatingKVCache

    alone = [filled_caches(model, peer, window, keep=0) for _ in range(count)]
    caches = [BatchRotatingKVCache.merge([*layer]) for layer in zip(*alone, strict=True)]
    tokens = mx.full((count, 1), TOKEN)

    def step() -> None:
        nonlocal tokens
        tokens = mx.argmax(peer(tokens, cache=caches)[:, -1:], axis=-1)
        mx.eval(tokens)

    return step
