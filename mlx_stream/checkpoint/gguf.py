"""Reads a llama.cpp GGUF file as a checkpoint; handles names and rows, runs no models."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.gguf_blocks import FORMATS, GROUP
from mlx_stream.checkpoint.gguf_config import (
    Architecture,
    gguf_config,
    read_architecture,
    read_rope_scaling,
)
from mlx_stream.checkpoint.gguf_header import GGUFHeader, Tensor, read_headers
from mlx_stream.checkpoint.gguf_tokenizer import gguf_tokenizer
from mlx_stream.config import ModelConfig, read_config, shorten
from mlx_stream.errors import CheckpointError, ConfigError, WeightsError
from mlx_stream.models.layers import Projection
from mlx_stream.models.layout import Vector, layout_of

# Hugging Face's module names, and llama.cpp's names for them.
MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",  # in Phi-3, which has no separate gate
    "mlp.down_proj": "ffn_down",
}
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
KINDS = (*PLAIN, *FORMATS)
# How many numbers of a tensor are converted at a time.
CHUNK = 2**22


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file, possibly split, with Hugging Face's config, names, row order and tokenizer.

    Tensors are read from the file on demand, in bounded memory, as float32, float16 or bfloat16.
    Types that MLX supports as affine groups become uint32 (rows, columns * bits / 32), with scales
    and biases (rows, columns / 32) in float16, or in float32 for Q4_K and Q5_K, where they are
    products of two numbers. Other quantized types become float16.

    Raises:
        CheckpointError: the file is damaged or truncated, or has an unsupported tensor type.
        ConfigError: the metadata is incomplete or not supported.
        WeightsError: a tensor is missing, unknown or of the wrong shape, or, when it is read, has
            numbers that do not fit in 16 bits.
        TokenizerError: the tokenizer cannot be rebuilt.
    """
    header = read_headers(path)
    architecture = read_architecture(header)
    refuse_types(header)
    config = gguf_config(header, architecture)
    config |= read_rope_scaling(header.metadata, config, read_factors(header, architecture, config))
    try:
        checked = read_config(config)
    except ConfigError as error:
        raise ConfigError(f"{header.file}: {error}") from error
    parameters = name_tensors(header, checked, architecture)
    config |= gguf_quantization(parameters)
    tokenizer, tokenizer_config = gguf_tokenizer(header, checked.vocab_size)
    kinds = {name.removesuffix(".weight"): p.tensor.kind for name, p in parameters.items()}
    return Checkpoint(
        config,
        GGUFTensors(parameters),
        tokenizer,
        tokenizer_config,
        dtype=config["torch_dtype"],
        dequantized={n: k for n, k in kinds.items() if k in FORMATS and not FORMATS[k].repacked},
    )


def refuse_types(header: GGUFHeader) -> None:
    for tensor in header.tensors.values():
        if tensor.kind not in KINDS:
            raise CheckpointError(
                f"{header.file}: the tensor {shorten(tensor.name)} has the type {tensor.kind}, "
                f"which is not supported (supported: {', '.join(KINDS)})"
            )


def read_factors(
    header: GGUFHeader, architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the contents of the tensors that scale the rotary frequencies."""
    size = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0)) // 2
    found: dict[str, np.ndarray] = {}
    for name in architecture.factors:
        tensor = header.tensors.get(name)
        if tensor is None:
            continue
        if tensor.kind != "F32" or tensor.shape != (size,):
            raise ConfigError(
                f"{header.file}: {name} must be F32 of shape ({size},), not {tensor.kind} of "
                f"{tensor.shape}"
            )
        found[name] = read_rows(tensor, PLAIN["F32"], 0, size).astype(np.float64)[:, 0]
    return found


@dataclass(frozen=True)
class Parameter:
    """One array of a module: its tensor, and the number of heads with interleaved rows, or 0."""

    tensor: Tensor
    heads: int = 0


def name_tensors(
    header: GGUFHeader, config: ModelConfig, architecture: Architecture
) -> dict[str, Parameter]:
    """Return every tensor of the model by its Hugging Face name, after checking its shape.

    Raises:
        WeightsError: a tensor is missing, unknown or of the wrong shape.
    """
    if config.num_hidden_layers > len(header.tensors):
        raise WeightsError(
            f"{header.file}: {config.num_hidden_layers} layers in {len(header.tensors)} tensors: "
            "the file is damaged"
        )
    interleaved = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if not architecture.interleaved:
        interleaved = {}
    left = {n: tensor for n, tensor in header.tensors.items() if n not in architecture.factors}
    named: dict[str, Parameter] = {}
    for part in layout_of(config).parts:
        shape = (part.size,) if isinstance(part, Vector) else (part.outputs, part.inputs)
        biased = isinstance(part, Projection) and part.bias
        for end, wanted in (("weight", shape), *([("bias", shape[:1])] if biased else [])):
            name = f"{gguf_name(part.path)}.{end}"
            tensor = left.pop(name, None)
            if tensor is None:
                raise WeightsError(f"{header.file}: the tensor {name} is missing")
            if tensor.shape != wanted or (len(wanted) == 1 and tensor.kind in FORMATS):
                raise WeightsError(
                    f"{header.file}: the tensor {name} is {tensor.kind} of shape {tensor.shape}, "
                    f"expected {wanted}"
                )
            heads = interleaved.get(part.path.rpartition(".")[2], 0)
            named[f"{part.path}.{end}"] = Parameter(tensor, heads)
    if left:
        raise WeightsError(
            f"{header.file}: the tensor {shorten(next(iter(left)))} is not part of a "
            f"{config.model_type} model ({len(left)} unknown)"
        )
    return named


def gguf_name(path: str) -> str:
    """Return llama.cpp's name for a module: `model.layers.3.mlp.up_proj` is `blk.3.ffn_up`."""
    if not path.startswith("model.layers."):
        return MODULES[path]
    layer, _, module = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{MODULES[module]}"


def kept_bits(kind: str) -> int:
    """Return the bits per weight of a type that stays quantized, or 0 for other types."""
    return FORMATS[kind].bits if kind in FORMATS and FORMATS[kind].repacked else 0


def gguf_quantization(named: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return mlx-lm's config entry: the most common bits, and exceptions by matrix path."""
    bits = {
        name.removesuffix(".weight"): kept_bits(p.tensor.kind)
        for name, p in named.items()
        if len(p.tensor.shape) == 2
    }
    counts = Counter(found for found in bits.values() if found)
    if not counts:
        return {}
    common = counts.most_common(1)[0][0]
    overrides = {
        path: {"group_size": GROUP, "bits": found} if found else False
        for path, found in bits.items()
        if found != common
    }
    return {"quantization": {"group_size": GROUP, "bits": common, "mode": "affine", **overrides}}


Convert = Callable[[np.ndarray], np.ndarray]


class GGUFTensors(Mapping[str, mx.array]):
    """Arrays by Hugging Face name; each is read from the file and repacked on demand."""

    def __init__(self, named: Mapping[str, Parameter]):
        self._parts: dict[str, tuple[Parameter, Convert | None]] = {}
        for name, parameter in named.items():
            kind, module = parameter.tensor.kind, name.removesuffix(".weight")
            if kind in PLAIN:
                self._parts[name] = parameter, None
            elif not FORMATS[kind].repacked:
                self._parts[name] = parameter, FORMATS[kind].floats
            else:
                self._parts[name] = parameter, FORMATS[kind].words
                self._parts[f"{module}.scales"] = parameter, FORMATS[kind].scales
                self._parts[f"{module}.biases"] = parameter, FORMATS[kind].biases

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __getitem__(self, name: str) -> mx.array:
        parameter, convert = self._parts[name]
        tensor = parameter.tensor
        found = convert_rows(tensor, convert, parameter.heads)
        if len(tensor.shape) == 1:
            found = found[:, 0]
        array = mx.array(found)
        return array.view(mx.bfloat16) if tensor.kind == "BF16" else array


def convert_rows(tensor: Tensor, convert: Convert | None, heads: int) -> np.ndarray:
    """Return a tensor, converted a few rows at a time; only those rows take additional memory.

    Args:
        convert: maps (rows, blocks) to (rows, columns of the result); None for plain numbers.
        heads: number of heads whose rows are interleaved, or 0.
    """
    rows, columns = (*tensor.shape, 1)[:2]
    unit = rows // heads if heads else 1  # rows that must be converted together
    step = max(1, CHUNK // (columns * unit)) * unit
    found: np.ndarray | None = None
    for start in range(0, rows, step):
        layout = FORMATS[tensor.kind].layout if convert else PLAIN[tensor.kind]
        part = read_rows(tensor, layout, start, min(step, rows - start))
        if convert:
            part = convert_finite(tensor, convert, part)
        part = in_order(part, len(part) // unit if heads else 0)
        if found is None:
            found = np.empty((rows, part.shape[1]), part.dtype)
        found[start : start + len(part)] = part
    assert found is not None
    return found


def convert_finite(tensor: Tensor, convert: Convert, blocks: np.ndarray) -> np.ndarray:
    """Convert blocks; refuse numbers that do not fit in float16, which a model may compute in."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = convert(blocks)
        if found.dtype.kind == "f" and not np.isfinite(found.astype(np.float16)).all():
            raise WeightsError(
                f"{tensor.file}: the tensor {tensor.name} has scales that are not finite in "
                "float16: download the file again, or use another quantization"
            )
    return found


def read_rows(tensor: Tensor, layout: np.dtype, start: int, count: int) -> np.ndarray:
    """Return rows of a tensor: (count, blocks or numbers per row)."""
    # Read, not mapped: if a mapped file shrinks, the process is killed.
    per_row = tensor.size // layout.itemsize // tensor.shape[0]
    offset = tensor.offset + start * per_row * layout.itemsize
    try:
        found = np.fromfile(tensor.path, layout, count * per_row, offset=offset)
    except OSError as error:
        raise WeightsError(f"{tensor.file}: cannot be read ({error.strerror})") from error
    if found.size != count * per_row:
        raise WeightsError(
            f"{tensor.file}: the tensor {tensor.name} is truncated: the file has changed"
        )
    return found.reshape(count, per_row)


def in_order(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order for queries and keys: rows 0, D/2, 1, D/2 + 1, ... of a head.

    For example, with D = 4, its rows a, b, c, d of each head are Hugging Face's rows a, c, b, d.
    """
    if not heads:
        return array
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
