"""llama.cpp as a peer: the same GGUF file, the same ids, its own context shift.

Through the package `llama-cpp-python`, if it is installed. When the context is full, half of what
is not kept is dropped and the rest moved down, as llama.cpp's own programs do.
"""

import ctypes
import functools
import importlib.util
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_stream.errors import SourceError

PACKAGE = "llama_cpp"


def why_not(gguf: Path | None) -> str | None:
    """Return why llama.cpp cannot be measured here, or None if it can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "llama-cpp-python is not installed"
    if gguf is None:
        return "it reads GGUF files: give the same model as one with --gguf"
    return None


class LlamaCppReader:
    """Read ids through llama.cpp with a context of `capacity` tokens, the first `keep` kept.

    Raises:
        SourceError: llama.cpp cannot open the file.
    """

    def __init__(self, gguf: Path, ids: Sequence[int], capacity: int, keep: int, chunk: int):
        import llama_cpp  # type: ignore[import-not-found]

        self.library: Any = llama_cpp
        self.ids, self.capacity, self.keep = ids, capacity, keep
        self.chunk = min(chunk, capacity - keep)
        start_silently()
        self.model = llama_cpp.llama_model_load_from_file(
            str(gguf).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SourceError(f"{gguf}: llama.cpp cannot open it")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.context = self._open_context()
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(self.chunk, 0, 1)
        self.past = 0
        weakref.finalize(self, free, llama_cpp, self.batch, self.context, self.model)

    def _open_context(self) -> Any:
        params = self.library.llama_context_default_params()
        params.n_ctx = self.capacity
        params.n_batch = params.n_ubatch = self.chunk
        params.n_threads = params.n_threads_batch = 1
        context = self.library.llama_init_from_model(self.model, params)
        if not context:
            raise SourceError(f"llama.cpp cannot make a context of {self.capacity} tokens")
        return context

    def read(self, start: int, stop: int) -> list[float]:
        found = []
        for first in range(start, stop, self.chunk):
            end = min(first + self.chunk, stop)
            if self.past + end - first > self.capacity:
                self._shift()
            found.extend(self._decode(first, end))
        return found

    def _shift(self) -> None:
        dropped = (self.past - self.keep) // 2
        self.library.llama_memory_seq_rm(self.memory, 0, self.keep, self.keep + dropped)
        self.library.llama_memory_seq_add(self.memory, 0, self.keep + dropped, self.past, -dropped)
        self.past -= dropped

    def _decode(self, first: int, end: int) -> list[float]:
        batch, count = self.batch, end - first
        batch.n_tokens = count
        for row in range(count):
            batch.token[row] = self.ids[first + row]
            batch.pos[row] = self.past + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = True
        if self.library.llama_decode(self.context, batch) != 0:
            raise SourceError("llama.cpp refused a batch of tokens")
        self.past += count
        pointer = self.library.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(pointer, shape=(count, self.vocabulary)).astype(np.float64)
        return [loss(logits[row], self.ids[first + row + 1]) for row in range(count)]


@functools.cache
def start_silently() -> Any:
    """Begin with llama.cpp and keep it quiet; the callback is kept, for it may be called ever."""
    import llama_cpp  # type: ignore[import-not-found]

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return silence


def free(library: Any, batch: Any, context: Any, model: Any) -> None:
    """Free what only C knows of, in this order."""
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)


def loss(logits: np.ndarray, target: int) -> float:
    """Return -log p of one id given logits (vocabulary,)."""
    highest = float(logits.max())
    return math.log(float(np.exp(logits - highest).sum())) + highest - float(logits[target])
