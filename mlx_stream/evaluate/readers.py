"""Reads a text in steps through a cache: this package's, a baseline from the paper, or a peer's.

A reader is a function: `read(start, stop)` reads tokens `start` to `stop - 1`, in order, and
returns the loss, -log p in nats, of the token after each of them: ids[start + 1] to ids[stop].
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_stream.cache import Cache
from mlx_stream.evaluate.mlx_lm import head_of, rotating_caches
from mlx_stream.evaluate.score import losses, losses_of
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import read_ids, run_coroutine
from mlx_stream.generate.token_stream import TokenStream

RECOMPUTE_CHUNK = 512  # the longest step when a window is read from scratch
Ids = Sequence[int]
Reader = Callable[[int, int], list[float]]


def stream_reader(model: Model, ids: Ids, cache: Cache, chunk: int) -> Reader:
    """Read the whole text through a single cache: `stream`, `window`, `dense`."""
    stream = TokenStream(model, cache)

    def read(start: int, stop: int) -> list[float]:
        assert start == stream.length
        return losses_of(stream, ids[start : stop + 1], chunk)

    return read


def fresh_reader(model: Model, ids: Ids, sinks: int, window: int, chunk: int) -> Reader:
    """Read each piece with a new stream that has read the window before it: `fresh`.

    With 2 sinks and a window of 3, tokens 10 and later are read by a stream that started at token
    5.
    """

    def read(start: int, stop: int) -> list[float]:
        stream = TokenStream(model, model.new_cache(sinks, window))
        begin = max(0, start - sinks - window)
        if begin < start:
            run_coroutine(read_ids(stream, ids[begin:start], chunk=chunk))
        return losses_of(stream, ids[start : stop + 1], chunk)

    return read


def recompute_reader(model: Model, ids: Ids, capacity: int, stride: int, sinks: int = 0) -> Reader:
    """Reread the latest tokens from scratch every `stride` tokens: `recompute`.

    With a stride of 1, this is the paper's baseline. The last token of a stride is predicted from
    at most `capacity` tokens, and the first from `stride - 1` fewer. With `sinks`, the
    context is the text's first tokens and the latest `capacity - sinks`: those that a stream
    attends to, but with keys computed without anything older.

    Worked example: capacity 4, stride 2: tokens 8 to 11 are read to get the losses of tokens 11 and
    12; only the last two rows count.
    """

    def read_stride(first: int, end: int) -> list[float]:
        begin = max(0, end - capacity)
        context = list(ids[begin:end])
        if begin and sinks:
            context = [*ids[:sinks], *context[sinks:]]
        stream = TokenStream(model, model.new_dense_cache())
        hidden = mx.concatenate(list(stream.steps(context, RECOMPUTE_CHUNK)), axis=1)
        return losses(model.network.logits, hidden[0, first - end :], ids[first + 1 : end + 1])

    return in_pieces(read_stride, stride)


def peer_reader(peer: Any, ids: Ids, capacity: int, keep: int, chunk: int) -> Reader:
    """Read with mlx-lm through its rotating cache."""
    caches, head = rotating_caches(peer, capacity, keep), head_of(peer)

    def read_chunk(first: int, end: int) -> list[float]:
        hidden = peer.model(mx.array([[*ids[first:end]]]), cache=caches)
        found = losses(head, hidden[0], ids[first + 1 : end + 1])
        mx.eval([cache.state for cache in caches])
        return found

    return in_pieces(read_chunk, chunk)


def in_pieces(read: Reader, most: int) -> Reader:
    """Return a reader that takes at most this many tokens at once."""

    def read_pieces(start: int, stop: int) -> list[float]:
        pieces = (read(first, min(first + most, stop)) for first in range(start, stop, most))
        return [loss for piece in pieces for loss in piece]

    return read_pieces
