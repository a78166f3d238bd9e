"""`eval sinks` and `eval windows`: one text read through streams of several sizes."""

import math
import time
from collections.abc import Iterator, Sequence

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.corpus import Corpus
from mlx_stream.evaluate.readers import stream_reader
from mlx_stream.evaluate.report import Progress, Row, no_progress, perplexity
from mlx_stream.generate.model import Model

TOKENS_PER_REPORT = 2_048  # between calls to `progress`


def sweep(
    model: Model,
    text: Corpus,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    chunk: int,
    progress: Progress = no_progress,
) -> Iterator[Row]:
    """Read the first `tokens` tokens through each (sinks, window); yield a row for each."""
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
            nll += read(start, min(start + TOKENS_PER_REPORT, tokens))
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
