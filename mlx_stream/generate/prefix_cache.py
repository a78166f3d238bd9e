"""Keeps the rows of beginnings that several streams share, so that each is read once.

A pinned beginning is the stream's sinks, so its rows are the first of the buffer, and the same in
every window. A stream that begins with it begins with a copy of them, to the bit what reading it
would give.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_stream.cache.storage import QuantizedStorage
from mlx_stream.generate.speculative import Writer

MOST_PREFIXES = 8
# The parts of quantized rows beyond the sinks, where a beginning has nothing.
BEYOND_SINKS = (".quants", ".scales", ".biases")

State = dict[str, mx.array | int]


class PrefixCache:
    """The states of streams that have read a beginning and nothing else.

    Args:
        reserve: called with the bytes of all beginnings; returns whether there is room for them.
    """

    def __init__(self, reserve: Callable[[int], bool]):
        self._reserve = reserve
        self._states: dict[object, State] = {}  # the latest one used is last

    @property
    def nbytes(self) -> int:
        return sum(map(state_bytes, self._states.values()))

    def restore(self, writer: Writer, ids: Sequence[int]) -> bool:
        """Make an empty stream begin with these ids, if their rows are here."""
        key = key_of(writer, ids)
        if key not in self._states:
            return False
        known = self._states[key] = self._states.pop(key)
        state = writer.tokens.state()
        for name, value in known.items():
            whole = state[name]
            if isinstance(value, mx.array) and isinstance(whole, mx.array) and value.ndim == 4:
                value = mx.concatenate([value, whole[:, :, value.shape[2] :]], axis=2)
            state[name] = value
        writer.tokens.restore(state)
        return True

    def add(self, writer: Writer, ids: Sequence[int]) -> None:
        """Keep the rows of a stream that has read these ids and nothing else; all are sinks."""
        state: State = {}
        for name, value in writer.tokens.state().items():
            if isinstance(value, mx.array) and value.ndim == 4:
                if name.endswith(BEYOND_SINKS):
                    continue
                value = mx.contiguous(value[:, :, : len(ids)] + 0)
            state[name] = value
        mx.eval([value for value in state.values() if isinstance(value, mx.array)])
        while self._states and not self._has_room(state):
            del self._states[next(iter(self._states))]
        if self._has_room(state):
            self._states[key_of(writer, ids)] = state
        self._reserve(self.nbytes)

    def clear(self) -> None:
        """Forget every beginning."""
        self._states.clear()
        self._reserve(0)

    def _has_room(self, state: State) -> bool:
        count = len(self._states)
        return count < MOST_PREFIXES and self._reserve(self.nbytes + state_bytes(state))


def key_of(writer: Writer, ids: Sequence[int]) -> object:
    """Return what streams that may begin with the same rows have in common."""
    storage = writer.cache.storage
    bits = storage.bits if isinstance(storage, QuantizedStorage) else None
    return tuple(ids), writer.cache.geometry.sinks, bits


def state_bytes(state: State) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, mx.array))
