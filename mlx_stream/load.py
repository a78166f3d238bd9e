"""Loads a model and its tokenizer from a source; starts no streams."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.cache import AttentionShape
from mlx_stream.cache.positions import Rope
from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.config import ModelConfig, read_config
from mlx_stream.errors import CheckpointError, TokenizerError, ValueRefused
from mlx_stream.errors.argument_types import check_arguments
from mlx_stream.generate.model import Model, check_memory, check_process, megabytes
from mlx_stream.hub.resolve import resolve
from mlx_stream.models.weights import DTYPES, RemainingTensors, build, weight_bytes
from mlx_stream.program.notices import Notify, discard
from mlx_stream.text.tokenizer import Tokenizer


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
    """Return the shape of a model's stream caches."""
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
