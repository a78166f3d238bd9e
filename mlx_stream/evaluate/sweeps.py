"""`eval sinks` and `eval windows`: one text read through streams of several shapes."""

import math
import time
from collections.abc import Callable, Iterator, Sequence

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.corpus import Corpus
from mlx_stream.evaluate.readers import stream_reader
from mlx_stream.evaluate.report import Row, perplexity, refuse_twice
from mlx_stream.load import Model

Shape = tuple[int, int]  # sinks, window
TOKENS_PER_REPORT = 2_048  # between two calls of `progress`


def sink_shapes(model: Model, capacity: int, counts: Sequence[int]) -> list[Shape]:
    """Return the shape for each count of sinks in a cache of `capacity` tokens.

    Raises:
        ValueRefused: sinks leave no window, a count twice, or beyond the trained context.
    """
    refuse_twice("--sinks", [*counts])
    for count in counts:
        if count >= capacity:
            raise ValueRefused(
                f"--sinks {count} leaves no window in a cache of {capacity} tokens: use a larger "
                "--capacity"
            )
    return [check_shape(model, count, capacity - count) for count in counts]


def window_shapes(model: Model, sinks: int, windows: Sequence[int]) -> list[Shape]:
    """Return the shape for each window.

    Raises:
        ValueRefused: a window out of range or twice.
    """
    refuse_twice("--window", [*windows])
    return [check_shape(model, sinks, window) for window in windows]


def check_shape(model: Model, sinks: int, window: int) -> Shape:
    """Return a shape; raise ValueRefused if the model cannot have it, or would shorten it."""
    if model.resolve_window(sinks, window) != (sinks, window):
        raise ValueRefused(
            f"a window of {window} exceeds the model's sliding_window of "
            f"{model.config.sliding_window}: leave it out"
        )
    return sinks, window


def sweep(
    model: Model,
    text: Corpus,
    shapes: Sequence[Shape],
    tokens: int,
    chunk: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Row]:
    """Read the first `tokens` tokens through each shape; yield a row for each.

    Raises:
        ValueRefused: `tokens` or `chunk` below 1.
        TextError: the text has not so many tokens.
    """
    if tokens < 1 or chunk < 1:
        raise ValueRefused(f"--tokens and --chunk must be at least 1, not {tokens} and {chunk}")
    text.require(tokens, "--tokens")
    ids = text.first(tokens + 1)
    for index, (sinks, window) in enumerate(shapes):
        cache = model.new_cache(sinks, window)
        read = stream_reader(model, ids, cache, chunk)
        nll: list[float] = []
        begun = time.perf_counter()
        for start in range(0, tokens, TOKENS_PER_REPORT):
            nll.extend(read(start, min(start + TOKENS_PER_REPORT, tokens)))
            progress(index * tokens + len(nll), len(shapes) * tokens)
        yield {
            "sinks": sinks,
            "window": window,
            "tokens": tokens,
            "perplexity": perplexity(nll),
            "nll": math.fsum(nll) / tokens,
            "tokens_per_second": tokens / (time.perf_counter() - begun),
            "cache_bytes": cache.nbytes,
        }
        del read, cache
