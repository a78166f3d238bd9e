"""Reads a llama.cpp GGUF file as a checkpoint; knows GGUF's names and blocks, runs no model.

Blocks of Q4_0, Q4_1 and Q8_0 are affine groups of 32, so they are repacked for MLX without loss:
nothing is dequantized here.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.gguf_config import (
    gguf_config,
    read_rope_scaling,
    refuse_unsupported_gguf,
)
from mlx_stream.checkpoint.gguf_header import GGUFHeader, Tensor, read_header
from mlx_stream.checkpoint.gguf_tokenizer import gguf_tokenizer
from mlx_stream.config import ModelConfig, read_config, shorten
from mlx_stream.errors import CheckpointError, ConfigError, WeightsError
from mlx_stream.models.layers import Projection
from mlx_stream.models.layout import Vector, layout_of

FACTORS = "rope_freqs.weight"
# Modules by their Hugging Face names, and llama.cpp's.
MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GROUP = 32
PLAIN = {"F32": "<f4", "F16": "<f2"}
# Bits of an element, and the layout of a block: scale d, minimum m, quants q.
BLOCKS = {
    "Q4_0": (4, np.dtype([("d", "<f2"), ("q", "u1", 16)])),
    "Q4_1": (4, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])),
    "Q8_0": (8, np.dtype([("d", "<f2"), ("q", "u1", 32)])),
}


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file of a Llama with Hugging Face's config, names, row order and tokenizer.

    Tensors are read from the file when asked for: float32 or float16, and for quantized ones
    uint32 (rows, columns * bits / 32), with float16 scales and biases (rows, columns / 32).

    Raises:
        CheckpointError: the file is damaged or truncated, or has an unsupported type of tensor.
        ConfigError: the metadata is incomplete or not supported.
        WeightsError: a tensor is missing, unknown or of the wrong shape; when one is read, its
            scales do not fit MLX's.
        TokenizerError: the tokenizer cannot be rebuilt.
    """
    header, path = read_header(path), path.absolute()
    refuse_unsupported_gguf(header)
    refuse_types(header)
    config = gguf_config(header)
    factors = read_factors(header, config["head_dim"], path)
    config |= read_rope_scaling(header.metadata, config, factors)
    try:
        checked = read_config(config)
    except ConfigError as error:
        raise ConfigError(f"{header.file}: {error}") from error
    parameters = name_tensors(header, checked)
    config |= gguf_quantization(parameters)
    tokenizer, tokenizer_config = gguf_tokenizer(header, checked.vocab_size)
    tensors = GGUFTensors(path, header.file, parameters)
    return Checkpoint(config, tensors, tokenizer, tokenizer_config)


def refuse_types(header: GGUFHeader) -> None:
    supported = (*PLAIN, *BLOCKS)
    for tensor in header.tensors.values():
        if tensor.kind not in supported:
            raise CheckpointError(
                f"{header.file}: the tensor {shorten(tensor.name)} has the type {tensor.kind}, "
                f"which is not supported (supported: {', '.join(supported)})"
            )


def read_factors(header: GGUFHeader, head_dim: int, path: Path) -> np.ndarray | None:
    tensor = header.tensors.get(FACTORS)
    if tensor is None:
        return None
    if tensor.kind != "F32" or tensor.shape != (head_dim // 2,):
        raise ConfigError(
            f"{header.file}: {FACTORS} must be F32 of shape ({head_dim // 2},), not "
            f"{tensor.kind} of {tensor.shape}"
        )
    return read_raw(path, header.file, tensor, np.dtype("<f4")).astype(np.float64)


@dataclass(frozen=True)
class Parameter:
    """One array of a module: its tensor, and the heads whose rows llama.cpp interleaved, or 0."""

    tensor: Tensor
    heads: int = 0


def name_tensors(header: GGUFHeader, config: ModelConfig) -> dict[str, Parameter]:
    """Return every tensor of the model by its Hugging Face name, shapes checked.

    Raises:
        WeightsError: a tensor is missing, unknown or of the wrong shape.
    """
    if config.num_hidden_layers > len(header.tensors):
        raise WeightsError(
            f"{header.file}: {config.num_hidden_layers} layers in {len(header.tensors)} tensors: "
            "the file is damaged"
        )
    interleaved = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    left = {name: tensor for name, tensor in header.tensors.items() if name != FACTORS}
    named: dict[str, Parameter] = {}
    for part in layout_of(config).parts:
        shape = (part.size,) if isinstance(part, Vector) else (part.outputs, part.inputs)
        biased = isinstance(part, Projection) and part.bias
        for end, wanted in (("weight", shape), *([("bias", shape[:1])] if biased else [])):
            name = f"{gguf_name(part.path)}.{end}"
            tensor = left.pop(name, None)
            if tensor is None:
                raise WeightsError(f"{header.file}: the tensor {name} is missing")
            if tensor.shape != wanted or (len(wanted) == 1 and tensor.kind in BLOCKS):
                raise WeightsError(
                    f"{header.file}: the tensor {name} is {tensor.kind} of shape {tensor.shape}, "
                    f"expected {wanted}"
                )
            heads = interleaved.get(part.path.rpartition(".")[2], 0)
            named[f"{part.path}.{end}"] = Parameter(tensor, heads)
    if left:
        raise WeightsError(
            f"{header.file}: the tensor {shorten(next(iter(left)))} is not part of a Llama "
            f"({len(left)} unknown)"
        )
    return named


def gguf_name(path: str) -> str:
    """Return llama.cpp's name of a module: `model.layers.3.mlp.up_proj` is `blk.3.ffn_up`."""
    if not path.startswith("model.layers."):
        return MODULES[path]
    layer, _, module = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{MODULES[module]}"


def gguf_quantization(named: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return mlx-lm's entry: the most common bits, and each matrix that differs by its path."""
    bits = {
        name.removesuffix(".weight"): BLOCKS[p.tensor.kind][0] if p.tensor.kind in BLOCKS else 0
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


class GGUFTensors(Mapping[str, mx.array]):
    """Arrays by Hugging Face name; each is read from the file and repacked when asked for."""

    def __init__(self, path: Path, file: str, named: Mapping[str, Parameter]):
        self._path, self._file = path, file
        self._parts: dict[str, tuple[Parameter, Callable[[np.ndarray], np.ndarray] | None]] = {}
        for name, parameter in named.items():
            if parameter.tensor.kind in PLAIN:
                self._parts[name] = (parameter, None)
                continue
            module = name.removesuffix(".weight")
            self._parts[name] = (parameter, pack_quants)
            self._parts[f"{module}.scales"] = (parameter, pack_scales)
            self._parts[f"{module}.biases"] = (parameter, pack_biases)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __getitem__(self, name: str) -> mx.array:
        parameter, pack = self._parts[name]
        tensor = parameter.tensor
        if pack is None:
            array = read_raw(self._path, self._file, tensor, np.dtype(PLAIN[tensor.kind]))
        else:
            blocks = read_raw(self._path, self._file, tensor, BLOCKS[tensor.kind][1])
            array = pack(blocks)
            if array.dtype == np.float16 and not np.isfinite(array).all():
                raise WeightsError(
                    f"{self._file}: the tensor {tensor.name} has scales that are not finite in "
                    "float16: download the file again, or use another quantization"
                )
        # MLX holds the whole span of a strided array: for scales, all the blocks they come from.
        return mx.array(np.ascontiguousarray(in_order(array, parameter.heads)))


def read_raw(path: Path, file: str, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """Return a tensor's elements or blocks: (rows, columns or blocks of them)."""
    # Read, not mapped: a mapped file that shrinks ends the process.
    count = tensor.size // dtype.itemsize
    try:
        found = np.fromfile(path, dtype, count, offset=tensor.offset)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror})") from error
    if found.size != count:
        raise WeightsError(f"{file}: the tensor {tensor.name} is cut short: the file has changed")
    return found.reshape(*tensor.shape[:-1], -1)


def pack_quants(blocks: np.ndarray) -> np.ndarray:
    """Return (rows, words) uint32 as `mx.quantize` packs: element i in bits i * b and up.

    A block of 4 bits holds elements 0 and 16 in its first byte, 1 and 17 in the next; MLX wants 0
    and 1, then 2 and 3. The signed bytes of Q8_0 become q + 128.
    """
    quants = blocks["q"]
    if quants.shape[-1] == GROUP:
        packed = quants ^ 0x80
    else:
        packed = np.empty(quants.shape, np.uint8)
        for half, nibbles in ((packed[..., :8], quants & 15), (packed[..., 8:], quants >> 4)):
            half[...] = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return packed.view("<u4").reshape(blocks.shape[0], -1)


def pack_scales(blocks: np.ndarray) -> np.ndarray:
    return blocks["d"]


def pack_biases(blocks: np.ndarray) -> np.ndarray:
    """Return the value of a zero: the minimum, or -8 d or -128 d (exact, or it overflows)."""
    if "m" in (blocks.dtype.names or ()):
        return blocks["m"]
    zero = -128 if blocks["q"].shape[-1] == GROUP else -8
    with np.errstate(over="ignore", invalid="ignore"):
        return blocks["d"] * np.float16(zero)


def in_order(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of queries and keys: rows 0, D/2, 1, D/2 + 1, ... of a head.

    With D = 4 its rows a, b, c, d of each head are Hugging Face's a, c, b, d.
    """
    if not heads:
        return array
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
