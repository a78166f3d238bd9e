"""The model of an engine and its budget; used on the engine's thread alone."""

import itertools
from functools import partial
from pathlib import Path

from mlx_stream import backend
from mlx_stream.engine.budget import Budget
from mlx_stream.load import Model, load

WEIGHTS = 0  # the key of what is loaded


class ModelHost:
    """One model, shared by sessions.

    Args:
        source, dtype, keep_quantized: see `load`.
        limit: bytes that weights and streams may take; None: what the device recommends.
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
        self._source, self._limit = source, limit
        self._dtype, self._keep = dtype, keep_quantized
        self._model: Model | None = None
        self._keys = itertools.count(1)

    def load(self) -> None:
        """Load the model. On the thread, as all that follows."""
        if self._limit is None:
            self.budget.limit = backend.memory_budget()
        # Freed buffers are kept by MLX, and would otherwise be as much as the whole memory.
        backend.set_cache_limit()
        self._model = load(
            self._source,
            self._dtype,
            self._keep,
            notify=self.notices.append,
            check=partial(self.budget.charge, WEIGHTS),
        )

    @property
    def model(self) -> Model:
        assert self._model is not None
        return self._model

    def new_key(self) -> int:
        return next(self._keys)

    def model_for(self, key: int) -> Model:
        """Return the model with its streams charged to `key`."""
        return self.model.with_check(partial(self.budget.charge, key))

    def leave(self) -> None:
        """Let go of everything, so that another thread may begin."""
        import mlx.core as mx

        self._model = None
        self.budget.weights = 0
        mx.clear_cache()
        mx.clear_streams()
