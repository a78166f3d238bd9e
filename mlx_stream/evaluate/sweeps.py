"""`eval sinks` and `eval windows`: one text read through streams of several shapes."""

import math
import time
from collections.abc import Callable, Iterator, Sequence

from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.evaluate.corpus import Corpus
from mlx_stream.evaluate.readers import StreamReader
from mlx_stream.evaluate.report import Row, perplexity
from mlx_stream.load import Model

Shape = tuple[int, int]
# How often progress is told.
TOKENS_PER_REPORT = 2_048


def sink_shapes(model: Model, capacity: int, counts: Sequence[int]) -> list[Shape]:
    """Return (sinks, window) for each count of sinks in a cache of `capacity` tokens.

    Raises:
        ValueRefused: sinks leave no window, a count twice, or beyond the trained context.
    """
    refuse_twice("--sinks", counts)
    for count in counts:
        if count >= capacity:
            raise ValueRefused(
                f"--sinks {count} leaves no window in a cache of {capacity} tokens: use a larger "
                "--capacity"
            )
    return resolve_shapes(model, [(count, capacity - count) for count in counts])


def window_shapes(model: Model, sinks: int, windows: Sequence[int]) -> list[Shape]:
    """Return (sinks, window) for each window.

    Raises:
        ValueRefused: a window out of range or twice.
    """
    refuse_twice("--window", windows)
    return resolve_shapes(model, [(sinks, window) for window in windows])


def refuse_twice(option: str, values: Sequence[int]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueRefused(f"{option} {twice} is given twice")


def resolve_shapes(model: Model, shapes: Sequence[Shape]) -> list[Shape]:
    """Refuse shapes the model cannot have, and those its sliding window would make equal."""
    for sinks, window in shapes:
        if model.resolve_window(sinks, window) != (sinks, window):
            raise ValueRefused(
                f"a window of {window} exceeds the model's sliding_window of "
                f"{model.config.sliding_window}: leave it out"
            )
    return list(shapes)


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
    if len(text.ids) <= tokens:
        raise TextError(
            f"{', '.join(text.names)}: {len(text.ids):,} tokens are not {tokens:,} and one to "
            "predict: give a longer text, or a smaller --tokens"
        )
    ids = text.first(tokens + 1)
    for index, (sinks, window) in enumerate(shapes):
        cache = model.new_cache(sinks, window)
        reader = StreamReader(model, ids, cache, chunk)
        nll: list[float] = []
        begun = time.perf_counter()
        for start in range(0, tokens, TOKENS_PER_REPORT):
            nll.extend(reader.read(start, min(start + TOKENS_PER_REPORT, tokens)))
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
        del reader, cache
