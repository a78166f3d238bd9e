"""An engine's model and memory budget; everything but `Budget` is for the engine's thread only."""

import threading
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.errors import MemoryRefused
from mlx_stream.generate.model import Model, megabytes
from mlx_stream.generate.prefix_cache import PrefixCache
from mlx_stream.load import load
from mlx_stream.models.layout import ring_bytes
from mlx_stream.models.window import THINKING_WINDOWS, bounded_windows

HEAD_ROOM = 1_024  # tokens that a default window leaves for a system prompt
PREFIXES = "prefixes"  # the key of the cached prefixes in the budget


class Budget:
    """Keeps the total size of the weights and all streams within a limit.

    A stream is charged for, under its owner's key, before it is allocated.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.weights = 0
        self._streams: dict[object, int] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        with self._lock:
            return self.weights + sum(self._streams.values())

    def charge(self, key: object, weights: int, stream: int) -> None:
        """Record the size of the weights, and add the size of a stream under `key`, in bytes.

        Raises:
            MemoryRefused: the limit would be exceeded; nothing is recorded.
        """
        with self._lock:
            others = sum(self._streams.values())
            if weights + others + stream > self.limit:
                raise MemoryRefused(
                    f"the weights ({megabytes(weights)}), the open sessions' keys and values "
                    f"({megabytes(others)}) and this session's ({megabytes(stream)}) exceed the "
                    f"engine's budget of {megabytes(self.limit)}: close a session, use a smaller "
                    "window or a "
                    "quantized model, or raise memory_budget"
                )
            self.weights = weights
            self._streams[key] = self._streams.get(key, 0) + stream

    def try_stream(self, key: object, stream: int) -> bool:
        """Set the size recorded under `key` to `stream` bytes, if the limit allows it."""
        with self._lock:
            others = sum(bytes for one, bytes in self._streams.items() if one != key)
            if self.weights + others + stream > self.limit:
                return False
            self._streams[key] = stream
            return True

    def set_stream(self, key: object, stream: int) -> None:
        """Set the size recorded under `key` to `stream` bytes."""
        with self._lock:
            self._streams.pop(key, None)
            if stream:
                self._streams[key] = stream


class ModelHost:
    """One model, shared by all sessions.

    Args:
        source, dtype, keep_quantized: see `load`.
        limit: the maximum size of weights and streams, in bytes; None for the device's
            recommendation.
    """

    def __init__(
        self,
        source: str | Path,
        limit: int | None,
        dtype: str | None,
        keep_quantized: bool | None,
    ):
        self.name = str(source)
        self.notices: list[str] = []
        self.budget = Budget(limit or 0)
        # Sessions that do not share steps start with rows that were read in unshared steps.
        self.prefixes = {
            shared: PrefixCache(partial(self.budget.try_stream, (PREFIXES, shared)))
            for shared in (True, False)
        }
        self._source, self._limit = source, limit
        self._dtype, self._keep = dtype, keep_quantized
        self._model: Model | None = None

    def load(self) -> None:
        if self._limit is None:
            self.budget.limit = backend.memory_budget()
        # By default, MLX keeps freed buffers up to the total memory size.
        backend.set_cache_limit()
        self._model = load(
            self._source,
            self._dtype,
            self._keep,
            notify=self.notices.append,
            check=partial(self.budget.charge, None),
        )

    @property
    def model(self) -> Model:
        assert self._model is not None
        return self._model

    def model_for(self, key: object) -> Model:
        """Return the model, with its streams charged to `key`."""
        return self.model.with_check(partial(self._charge, key))

    def largest_window(self, streams: int, sinks: int | None, kv_bits: int | None) -> int | None:
        """Return the largest standard window with which all streams fit the budget, or None.

        It leaves room in the trained context for a system prompt.
        """
        model = self.model
        sinks = model.resolve_window(sinks, None)[0]
        room = min(HEAD_ROOM, model.config.max_position_embeddings // 4)
        most = bounded_windows(model.config, sinks + room, THINKING_WINDOWS)[0]
        for window in [one for one in THINKING_WINDOWS if one <= most] or [most]:
            ring = ring_bytes(model.config, sinks, window, model.dtype.size, kv_bits)
            if model.weight_bytes + streams * ring <= self.budget.limit:
                return window
        return None

    @property
    def prefix_bytes(self) -> int:
        return sum(prefixes.nbytes for prefixes in self.prefixes.values())

    def drop_prefixes(self) -> None:
        for prefixes in self.prefixes.values():
            prefixes.clear()

    def _charge(self, key: object, weights: int, stream: int) -> None:
        """Charge for a stream; drop the cached prefixes if it needs their room."""
        try:
            self.budget.charge(key, weights, stream)
        except MemoryRefused:
            if not self.prefix_bytes:
                raise
            self.drop_prefixes()
            self.budget.charge(key, weights, stream)

    def leave(self) -> None:
        """Release everything, so that another thread can use MLX."""
        self._model = None
        self.drop_prefixes()
        self.budget.weights = 0
        mx.clear_cache()
        mx.clear_streams()
