"""Times reading a long text from its beginning through a window, alternating with mlx-lm."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.bench import SINKS
from mlx_stream.evaluate.mlx_lm import head_of, rotating_caches
from mlx_stream.evaluate.report import Row
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import ReadRequest
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.program.notices import Notify, discard


def check_prefill(tokens: int, chunks: Sequence[int]) -> None:
    """Raise ValueRefused if the text or a chunk has fewer than 2 tokens."""
    if tokens < 2:
        raise ValueRefused(f"--prefill must be at least 2, not {tokens}")
    if min(chunks) < 2:
        raise ValueRefused(f"--prefill-chunk must be at least 2, not {min(chunks)}")


def prefills(
    model: Model,
    peer: Any,
    windows: Sequence[int],
    tokens: int,
    chunks: Sequence[int],
    progress: Notify = discard,
) -> list[Row]:
    """Time reading a text of `tokens` tokens through each window, with each chunk size."""
    ids = [token % model.config.vocab_size for token in range(tokens)]
    found = []
    for asked in windows:
        _, window = model.resolve_window(SINKS, asked, progress)
        for chunk in chunks:
            progress(f"window {window}: reading {tokens:,} tokens in chunks of {chunk}")
            found.append({"window": window, **prefill(model, peer, window, ids, chunk)})
    return found


def prefill(model: Model, peer: Any, window: int, ids: Sequence[int], chunk: int) -> Row:
    """Read one text from the beginning through both windows, alternating, and time all of it.

    The side that has read less reads the next chunk. Each runs its head only for the last token.
    """
    readers = {
        "ours": our_reading(model, window, ids, chunk),
        "mlx_lm": their_reading(peer, window, ids, chunk),
    }
    seconds, done = dict.fromkeys(readers, 0.0), dict.fromkeys(readers, 0)
    while readers:
        name = min(readers, key=lambda reader: done[reader])
        begun = time.perf_counter()
        count = next(readers[name], None)
        seconds[name] += time.perf_counter() - begun
        if count is None:
            del readers[name]
        else:
            done[name] += count
    mx.clear_cache()
    return {
        "tokens": len(ids),
        "chunk": chunk,
        "mlx_lm_chunk": chunk,
        "ours_tokens_per_second": len(ids) / seconds["ours"],
        "mlx_lm_tokens_per_second": len(ids) / seconds["mlx_lm"],
        "ratio": seconds["mlx_lm"] / seconds["ours"],
    }


def best_of(results: Sequence[Row]) -> list[Row]:
    """Return each window's best results, ours and mlx-lm's, each with its fastest chunk size."""
    found = []
    for window in dict.fromkeys(result["window"] for result in results):
        those = [result for result in results if result["window"] == window]
        ours = max(those, key=lambda result: result["ours_tokens_per_second"])
        theirs = max(those, key=lambda result: result["mlx_lm_tokens_per_second"])
        best = ours | {key: theirs[key] for key in ("mlx_lm_chunk", "mlx_lm_tokens_per_second")}
        best["ratio"] = best["ours_tokens_per_second"] / best["mlx_lm_tokens_per_second"]
        found.append(best)
    return found


def our_reading(model: Model, window: int, ids: Sequence[int], chunk: int) -> Iterator[int]:
    stream = TokenStream(model, model.new_cache(SINKS, window))
    rest = chunk * ((len(ids) - 1) // chunk)
    while stream.length < rest:
        yield stream.run(ReadRequest(stream, ids[stream.length : rest], chunk=chunk)).count
    mx.eval(mx.argmax(stream.read(ids[rest:], chunk)))
    yield len(ids) - rest


def their_reading(peer: Any, window: int, ids: Sequence[int], chunk: int) -> Iterator[int]:
    caches, head = rotating_caches(peer, SINKS + window, SINKS), head_of(peer)
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        hidden = peer.model(mx.array([[*part]]), cache=caches)
        mx.eval([cache.state for cache in caches])
        if start + len(part) == len(ids):
            mx.eval(mx.argmax(head(hidden[:, -1:])))
        yield len(part)
