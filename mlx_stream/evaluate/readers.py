"""One text read through one cache, some tokens at a time: ours, the paper's baselines, a peer's.

A reader reads its text in order. `read(start, stop)` takes tokens `start` to `stop - 1` in and
returns the loss, -log p in nats, of each token after them: ids[start + 1] to ids[stop].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlx_stream.cache import Cache
from mlx_stream.evaluate.mlx_lm import head_of, rotating_caches
from mlx_stream.evaluate.score import losses, losses_of
from mlx_stream.generate.requests import read_ids, run_coroutine
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import Model

# The longest step of a window read from scratch.
RECOMPUTE_CHUNK = 512


class Reader(Protocol):
    def read(self, start: int, stop: int) -> list[float]: ...


class StreamReader:
    """Read through one cache that lives as long as the text: `stream`, `window`, `dense`."""

    def __init__(self, model: Model, ids: Sequence[int], cache: Cache, chunk: int):
        self.stream, self.ids, self.chunk = TokenStream(model, cache), ids, chunk

    def read(self, start: int, stop: int) -> list[float]:
        assert start == self.stream.length
        steps = losses_of(self.stream, self.ids[start : stop + 1], self.chunk)
        return [loss for step in steps for loss in step]


@dataclass(frozen=True)
class FreshReader:
    """Read each piece with a stream begun on the window before it: `fresh`.

    What a stream that has run for ever is held against: it forgot nothing it should know and
    carries nothing it should not. With 2 sinks and a window of 3, tokens from 10 on are read by a
    stream that began at token 5.
    """

    model: Model
    ids: Sequence[int]
    sinks: int
    window: int
    chunk: int

    def read(self, start: int, stop: int) -> list[float]:
        stream = TokenStream(self.model, self.model.new_cache(self.sinks, self.window))
        begin = max(0, start - self.sinks - self.window)
        if begin < start:
            run_coroutine(read_ids(stream, self.ids[begin:start], chunk=self.chunk))
        steps = losses_of(stream, self.ids[start : stop + 1], self.chunk)
        return [loss for step in steps for loss in step]


@dataclass(frozen=True)
class RecomputeReader:
    """Read the latest tokens again from scratch for every `stride` tokens: `recompute`.

    The paper's baseline, with a stride of 1. Token t is predicted from at most `capacity` tokens,
    the first of a stride from `stride - 1` fewer. With `sinks`, the text's first tokens and the
    latest `capacity - sinks`: what a stream attends to, with keys that saw nothing older.

    Worked example: capacity 4, stride 2, for the losses of tokens 11 and 12 tokens 8 to 11 are
    read, and the last two rows count.
    """

    model: Model
    ids: Sequence[int]
    capacity: int
    stride: int
    sinks: int = 0

    def read(self, start: int, stop: int) -> list[float]:
        found = []
        for first in range(start, stop, self.stride):
            found.extend(self._group(first, min(first + self.stride, stop)))
        return found

    def _group(self, first: int, end: int) -> list[float]:
        begin = max(0, end - self.capacity)
        context = list(self.ids[begin:end])
        if begin and self.sinks:
            context = [*self.ids[: self.sinks], *context[self.sinks :]]
        stream = TokenStream(self.model, self.model.new_dense_cache())
        hidden = mx.concatenate(list(stream.steps(context, RECOMPUTE_CHUNK)), axis=1)
        rows = hidden[0, first - end :]
        return losses(self.model.network.logits, rows, self.ids[first + 1 : end + 1])


class PeerReader:
    """Read with mlx-lm through its rotating cache."""

    def __init__(self, peer: Any, ids: Sequence[int], capacity: int, keep: int, chunk: int):
        self.peer, self.ids, self.chunk = peer, ids, chunk
        self.caches, self.head = rotating_caches(peer, capacity, keep), head_of(peer)

    def read(self, start: int, stop: int) -> list[float]:
        found = []
        for first in range(start, stop, self.chunk):
            end = min(first + self.chunk, stop)
            hidden = self.peer.model(mx.array([[*self.ids[first:end]]]), cache=self.caches)
            found.extend(losses(self.head, hidden[0], self.ids[first + 1 : end + 1]))
            mx.eval([cache.state for cache in self.caches])
        return found
