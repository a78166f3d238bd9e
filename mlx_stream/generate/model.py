"""A loaded model: its weights and tokenizer, and the caches of its streams."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.cache import AttentionShape, DenseCache, StreamCache
from mlx_stream.config import ModelConfig
from mlx_stream.errors import MemoryRefused, ValueRefused
from mlx_stream.models import fingerprint
from mlx_stream.models.compiled import CompiledSteps
from mlx_stream.models.layers import CausalLM
from mlx_stream.models.layout import ring_bytes
from mlx_stream.models.window import (
    DEFAULT_WINDOW,
    THINKING_WINDOWS,
    bounded_windows,
    resolve_window,
)
from mlx_stream.program.notices import Notify, discard
from mlx_stream.text.tokenizer import Tokenizer

# The id of the process that computes with MLX, once there is one.
_process: int | None = None


def check_process() -> None:
    """Refuse to compute in a forked process: MLX's threads exist only in the parent.

    Raises:
        ValueRefused: this process was forked from one that had loaded a model.
    """
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise ValueRefused(
            "MLX cannot compute in a process that was forked after a model was loaded: start the "
            "process with multiprocessing's spawn method, or load the model only in the child"
        )


def check_memory(weights: int, ring: int) -> None:
    """Raise MemoryRefused if the weights and the ring exceed the device's budget."""
    budget = backend.memory_budget()
    if weights + ring > budget:
        raise MemoryRefused(
            f"{megabytes(weights)} of weights and {megabytes(ring)} of keys and values exceed this "
            f"device's budget of {megabytes(budget)}: use a smaller window, a quantized model, or "
            "`force`"
        )


def megabytes(amount: int) -> str:
    return f"{amount / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Model:
    """A loaded model: weights, tokenizer, and the shape of its streams' caches.

    Attributes:
        name: the source.
        network: the weights and their computation; holds no stream's state.
        attention: the shape of its streams' caches.
        dtype: the dtype of activations, keys and values.
        quantized: whether quantized weights were kept quantized.
        weight_bytes: how much memory the weights take up.
        force: whether memory limits are overridden.
        check: raises if memory is short; called with the sizes, in bytes, of the weights and of a
            new stream.
        compiled_steps: its traced decode steps.
    """

    name: str
    config: ModelConfig
    network: CausalLM
    tokenizer: Tokenizer
    attention: AttentionShape
    dtype: mx.Dtype
    quantized: bool
    weight_bytes: int
    force: bool = False
    check: Callable[[int, int], None] = check_memory
    compiled_steps: CompiledSteps = field(init=False, repr=False, compare=False)
    _fingerprints: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "compiled_steps", CompiledSteps(self.network))

    def __repr__(self) -> str:
        kind = f"{self.config.model_type}, {megabytes(self.weight_bytes)} of weights"
        quantized = ", quantized" if self.quantized else ""
        return f"Model({self.name!r}: {kind}{quantized}, {str(self.dtype).split('.')[-1]})"

    def with_check(self, check: Callable[[int, int], None]) -> "Model":
        """Return the same model with the same traces, but a different `check` for its streams."""
        found = replace(self, check=check)
        object.__setattr__(found, "compiled_steps", self.compiled_steps)
        return found

    def fingerprint(self, version: int = fingerprint.VERSION) -> str:
        """Return the fingerprint of this model as it was loaded; see `models.fingerprint`."""
        if version not in self._fingerprints:
            compute = {1: fingerprint.fingerprint_1, 2: fingerprint.fingerprint}[version]
            found = compute(self.config, self.network, self.dtype, self.quantized)
            self._fingerprints[version] = found
        return self._fingerprints[version]

    def is_fingerprint(self, text: str) -> bool:
        """Return whether a string is this model's fingerprint, of any version."""
        return text == self.fingerprint(2 if ":" in text else 1)

    def new_cache(
        self,
        sinks: int | None = None,
        window: int | None = None,
        spare: int = 0,
        notify: Notify = discard,
        kv_bits: int | None = None,
    ) -> StreamCache:
        """Allocate the fixed buffer of one stream.

        Args:
            sinks: S, default 4.
            window: W, default 2,048 or the rest of the trained context if that is less.
            spare: rows beyond the window, for tokens that may be rolled back.
            notify: called with one line if the model's sliding window reduces W.
            kv_bits: 8 or 4 quantizes the ring's keys and values, but not the sinks'.

        Raises:
            ValueRefused: sinks or window is out of range, or their sum exceeds the trained context;
                the heads cannot be quantized; or this process was forked.
            MemoryRefused: the weights and the ring exceed the device's budget.
        """
        check_process()
        sinks, window = self.resolve_window(sinks, window, notify)
        needed = ring_bytes(self.config, sinks, window, self.dtype.size, kv_bits, spare)
        if not self.force:
            self.check(self.weight_bytes, needed)
        return StreamCache(self.attention, sinks, window, spare, self.dtype, bits=kv_bits)

    def new_dense_cache(self) -> DenseCache:
        """Make a cache that attends to everything and grows, for comparison."""
        return DenseCache(self.attention, self.dtype)

    def resolve_window(
        self, sinks: int | None, window: int | None, notify: Notify = discard
    ) -> tuple[int, int]:
        """Return S and W with defaults and limits applied."""
        return resolve_window(self.config, sinks, window, notify)

    def thinking_window(self, sinks: int, kv_bits: int | None) -> int | None:
        """Return the default window of a model that thinks: the largest that fits.

        None if it is no larger than the default for other models.
        """
        for window in bounded_windows(self.config, sinks, THINKING_WINDOWS[:-1]):
            try:
                self.check(
                    self.weight_bytes,
                    ring_bytes(self.config, sinks, window, self.dtype.size, kv_bits),
                )
            except MemoryRefused:
                continue
            return window if window > DEFAULT_WINDOW else None
        return None

    def sinks_for(self, pinned: int, sinks: int | None, window: int | None) -> int:
        """Return S for a stream whose first `pinned` tokens, a system prompt, stay attended.

        Raises:
            ValueRefused: as for `new_cache`.
        """
        sinks, _ = self.resolve_window(sinks, None)
        trained = self.config.max_position_embeddings
        if pinned >= trained:
            raise ValueRefused(
                f"the system prompt of {pinned:,} tokens does not fit the model's trained context "
                f"of {trained:,}: shorten it"
            )
        sinks = max(sinks, pinned)
        self.resolve_window(sinks, window)
        return sinks
