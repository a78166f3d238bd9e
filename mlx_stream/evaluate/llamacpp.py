"""llama.cpp as a peer: the same GGUF file, the same ids, its own context shift.

It is used through the package `llama-cpp-python`, if that is installed. When the context is full,
half of the tokens that are not kept are dropped and the rest are moved down, as in llama.cpp's own
programs.
"""

import ctypes
import functools
import importlib.util
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
        return "it needs the model as a GGUF file: pass one with --gguf"
    return None


class LlamaCpp:
    """Reads ids through llama.cpp with a context of `capacity` tokens; the first `keep` are kept.

    Raises SourceError if llama.cpp cannot open the file.
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
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = capacity, self.chunk, self.chunk
        params.n_threads = params.n_threads_batch = 1
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SourceError(f"llama.cpp cannot create a context of {capacity} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(self.chunk, 0, 1)
        self.past = 0
        weakref.finalize(self, free, llama_cpp, self.batch, self.context, self.model)

    def read(self, start: int, stop: int) -> list[float]:
        """Return the losses of ids[start + 1] to ids[stop], like the other readers."""
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
        normal = np.logaddexp.reduce(logits, axis=-1)
        return (normal - logits[np.arange(count), self.ids[first + 1 : end + 1]]).tolist()


@functools.cache
def start_silently() -> Any:
    """Start llama.cpp with logging off; the callback must live as long as the process."""
    import llama_cpp  # type: ignore[import-not-found]

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return silence


def free(library: Any, batch: Any, context: Any, model: Any) -> None:
    """Free the C objects, in this order."""
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
