"""What an engine may take of memory, and who has it; plain numbers."""

import threading

from mlx_stream.errors import MemoryRefused
from mlx_stream.load import megabytes


class Budget:
    """Bytes of the weights and of every stream, held to a limit.

    It is charged before anything is allocated, by whoever is going to, under a key of theirs.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.weights = 0
        self._streams: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        with self._lock:
            return self.weights + sum(self._streams.values())

    def charge(self, key: int, weights: int, stream: int) -> None:
        """Note that `key` takes so many more bytes of a stream, beside the weights.

        Raises:
            MemoryRefused: that is too much; nothing is noted.
        """
        with self._lock:
            others = sum(self._streams.values())
            if weights + others + stream > self.limit:
                raise MemoryRefused(
                    f"{megabytes(weights)} of weights, {megabytes(others)} of keys and values of "
                    f"sessions that are open and {megabytes(stream)} of this one exceed the "
                    f"engine's budget of {megabytes(self.limit)}: close a session, use a smaller "
                    "window or a quantized model, or give a larger memory_budget"
                )
            self.weights = weights
            self._streams[key] = self._streams.get(key, 0) + stream

    def set_stream(self, key: int, stream: int) -> None:
        """Note what `key` takes by now, all in all."""
        with self._lock:
            self._streams[key] = stream
            if not stream:
                del self._streams[key]
