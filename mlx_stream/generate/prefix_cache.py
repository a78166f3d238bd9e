"""Caches the rows of prefixes that several streams share, so that each prefix is read only once.

A pinned prefix forms the stream's sinks, so its rows come first in the buffer and are the same for
every window. A stream with that prefix starts with a copy of them, bit-identical to
what reading the prefix would produce.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_stream.cache.geometry import StreamPosition
from mlx_stream.cache.storage import QuantizedStorage
from mlx_stream.generate.speculative import Writer

MOST_PREFIXES = 8
# Reading fewer ids takes one short step, whereas copying rows goes through the whole buffer.
LEAST_IDS = 16


@dataclass(frozen=True)
class Prefix:
    """A prefix of P ids: its position, each layer's rows (1, K, P, D), the sinks (L, K, P, D)."""

    position: StreamPosition
    keys: list[mx.array]
    values: list[mx.array]
    sinks: mx.array

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values, self.sinks))


class PrefixCache:
    """The rows of the most recently used prefixes.

    Args:
        reserve: called with their total size in bytes; returns whether there is room for that, and
            if so reserves it.
    """

    def __init__(self, reserve: Callable[[int], bool]):
        self._reserve = reserve
        self._prefixes: dict[object, Prefix] = {}  # most recently used last

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._prefixes.values())

    def restore(self, writer: Writer, ids: Sequence[int]) -> bool:
        """Fill an empty stream with these ids, if their rows are cached."""
        key = key_of(writer, ids)
        if key not in self._prefixes:
            return False
        self._prefixes[key] = prefix = self._prefixes.pop(key)
        paste_rows(writer, prefix)
        writer.tokens.ids.restore(ids)
        return True

    def add(self, writer: Writer, ids: Sequence[int]) -> None:
        """Cache the rows of a stream that has read exactly these ids, all of which are sinks."""
        key = key_of(writer, ids)
        if len(ids) < LEAST_IDS or key in self._prefixes:
            return
        needed = len(ids) * writer.cache.current.sinks.nbytes // writer.cache.geometry.sinks * 3
        while self._prefixes and not self._has_room(needed):
            del self._prefixes[next(iter(self._prefixes))]
        if self._has_room(needed):
            self._prefixes[key] = copy_rows(writer, len(ids))
        self._reserve(self.nbytes)

    def clear(self) -> None:
        """Drop all prefixes."""
        self._prefixes.clear()
        self._reserve(0)

    def _has_room(self, needed: int) -> bool:
        return len(self._prefixes) < MOST_PREFIXES and self._reserve(self.nbytes + needed)


def key_of(writer: Writer, ids: Sequence[int]) -> object:
    """Return a key that is equal for streams that may start with the same rows."""
    storage = writer.cache.storage
    bits = storage.bits if isinstance(storage, QuantizedStorage) else None
    return tuple(ids), writer.cache.geometry.sinks, bits


def copy_rows(writer: Writer, count: int) -> Prefix:
    """Return a copy of a stream's first `count` rows."""
    current, storage = writer.cache.current, writer.cache.storage
    keys, values = (
        [mx.contiguous(storage.read(rows, 0, count, current.sinks) + 0) for rows in layers]
        for layers in (current.keys, current.values)
    )
    sinks = mx.contiguous(current.sinks[:, :, :count] + 0)
    mx.eval(keys, values, sinks)
    return Prefix(current.position, keys, values, sinks)


def paste_rows(writer: Writer, prefix: Prefix) -> None:
    """Write the first rows of an empty stream by layer, so that only one is in memory twice."""
    cache, count = writer.cache, prefix.sinks.shape[2]
    segments = [(0, count, 0)]
    for layer, (new_keys, new_values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        keys, values = [*cache.current.keys], [*cache.current.values]
        keys[layer] = cache.storage.write(keys[layer], new_keys, segments)
        values[layer] = cache.storage.write(values[layer], new_values, segments)
        cache.current = replace(cache.current, keys=keys, values=values)
        mx.eval(cache.arrays())
    sinks = mx.array(cache.current.sinks)
    sinks[:, :, :count] = prefix.sinks
    mx.eval(sinks)
    cache.current = replace(cache.current, position=prefix.position, sinks=sinks)
