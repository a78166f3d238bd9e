"""Loads a model and its tokenizer from a source; starts no streams."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.cache import AttentionShape, DenseCache, StreamCache
from mlx_stream.cache.positions import Rope
from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.config import ModelConfig, read_config
from mlx_stream.errors import CheckpointError, MemoryRefused, TokenizerError, ValueRefused
from mlx_stream.errors.argument_types import check_arguments
from mlx_stream.hub.resolve import resolve
from mlx_stream.models import fingerprint
from mlx_stream.models.compiled import CompiledSteps
from mlx_stream.models.layers import CausalLM
from mlx_stream.models.layout import ring_bytes
from mlx_stream.models.weights import DTYPES, RemainingTensors, build, weight_bytes
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
            "process with multiprocessing's spawn method, or load the model only there"
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
        """Return whether a text is this model's fingerprint, of any version."""
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


@check_arguments
def load(
    source: str | Path = "starter",
    dtype: str | None = None,
    keep_quantized: bool | None = None,
    force: bool = False,
    notify: Notify = discard,
    check: Callable[[int, int], None] = check_memory,
) -> Model:
    """Load a model from a folder, a Hub id, a `.gguf` file, or `starter`.

    Args:
        dtype: float32, float16 or bfloat16. Default: on Metal the checkpoint's own (bfloat16
            becomes float16 on M1 and M2, which emulate it), float32 on the CPU backend.
        keep_quantized: compute with quantized weights. Default: yes on Metal, no on the CPU
            backend, whose quantized products are slower than float32.
        force: load even if the weights exceed the device's memory budget.
        notify: called with one line before something is fetched or converted.
        check: replaces the check of the device's memory budget; see `Model`.

    Raises:
        SourceError, CheckpointError, TokenizerError: see `mlx_stream.errors`.
        MemoryRefused: the weights exceed the device's budget.
        ValueRefused: this process was forked after a model was loaded.
    """
    check_process()
    chosen = named_dtype(dtype)
    if (compiled := os.environ.get(backend.COMPILE, "")) not in ("", "0", "1"):
        raise ValueRefused(f"{backend.COMPILE} must be 0 or 1, not {compiled!r}")
    backend.prepare_compiling()
    while backend.notices:
        notify(backend.notices.pop())
    # A Path always means a file or folder; as a string, "starter" would mean the starter model.
    place = str(source.absolute()) if isinstance(source, Path) else source
    path = resolve(place, notify)
    with naming(str(source), path):
        checkpoint = read_checkpoint(path)
        config = read_config(checkpoint.config)
        if checkpoint.images:
            notify(f"{source}: only text is read; its image parts are not loaded")
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
    computed = chosen or default_dtype(checkpoint)
    keep = backend.on_metal() if keep_quantized is None else keep_quantized
    needed = weight_bytes(config, checkpoint.tensors, computed, keep)
    if checkpoint.dequantized:
        notify(
            f"{source}: {explain_dequantized(checkpoint)} floats: the weights take "
            f"{megabytes(needed)}"
        )
    if not force:
        check(needed, 0)
    with naming(str(source), path):
        network = build(config, RemainingTensors(checkpoint.tensors), computed, keep)
    quantized = keep and config.quantization is not None
    shape = attention_shape(config)
    return Model(
        str(source), config, network, tokenizer, shape, computed, quantized, needed, force, check
    )


def build_model(
    name: str,
    settings: dict[str, Any],
    tensors: dict[str, mx.array],
    dtype: mx.Dtype,
    keep_quantized: bool = False,
) -> Model:
    """Build a model, without a tokenizer, from config.json settings and tensors in memory.

    Args:
        tensors: keyed by the checkpoint's names; the dict is empty afterwards.
    """
    config = read_config(settings)
    needed = weight_bytes(config, tensors, dtype, keep_quantized)
    network = build(config, tensors, dtype, keep_quantized)
    shape, no_tokenizer = attention_shape(config), cast(Any, None)
    return Model(name, config, network, no_tokenizer, shape, dtype, keep_quantized, needed)


def named_dtype(name: str | None) -> mx.Dtype | None:
    """Return the dtype that `--dtype` names.

    Raises:
        ValueRefused: there is no such dtype.
    """
    if name is not None and name not in DTYPES:
        raise ValueRefused(f"`dtype` must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name] if name else None


def attention_shape(config: ModelConfig) -> AttentionShape:
    """Return the shape of the caches of a model's streams."""
    rotating = Rope(config.rope, config.head_dim)
    still = Rope(replace(config.rope, partial_rotary_factor=0.0), config.head_dim)
    ropes = (
        still if layer in config.unrotated_layers else rotating
        for layer in range(config.num_hidden_layers)
    )
    return AttentionShape(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, tuple(ropes)
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a folder or a `.gguf` file; its tensors stay on disk."""
    return read_gguf(path) if path.is_file() else read_folder(path)


@contextmanager
def naming(source: str, *paths: Path) -> Iterator[None]:
    """Add the model's name to errors about its files that do not mention one of `paths`."""
    try:
        yield
    except (CheckpointError, TokenizerError) as error:
        if any(str(path) in str(error) or f"{path.name}:" in str(error) for path in paths):
            raise
        raise type(error)(f"{source}: {error}") from error


def default_dtype(checkpoint: Checkpoint) -> mx.Dtype:
    """Return the dtype to compute in: float32 on the CPU backend, else the checkpoint's own."""
    if not backend.on_metal():
        return mx.float32
    own = stored_dtype(checkpoint)
    return mx.float16 if own == mx.bfloat16 and not backend.native_bfloat16() else own


def stored_dtype(checkpoint: Checkpoint) -> mx.Dtype:
    """Return the dtype of a checkpoint's floats: its embedding's, because norms may be wider."""
    if checkpoint.dtype is not None:
        return DTYPES[checkpoint.dtype]
    tensors = checkpoint.tensors
    for name in ("model.embed_tokens.scales", "model.embed_tokens.weight"):
        if name in tensors and tensors[name].dtype in DTYPES.values():
            return tensors[name].dtype
    return mx.float16


def explain_dequantized(checkpoint: Checkpoint) -> str:
    """Return the start of a sentence about matrices of types that MLX does not support."""
    kinds = ", ".join(sorted(set(checkpoint.dequantized.values())))
    count = len(checkpoint.dequantized)
    matrices = "1 matrix" if count == 1 else f"{count} matrices"
    return f"{matrices} of a type MLX does not support ({kinds}) become{'s' * (count == 1)}"
