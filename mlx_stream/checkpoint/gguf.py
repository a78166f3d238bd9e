"""A llama.cpp GGUF file read as a checkpoint; knows GGUF's names and blocks, no modules.

Blocks of Q4_0, Q4_1 and Q8_0 are affine groups of 32 in other words, so they are repacked for MLX
without loss: nothing is dequantized here.
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
from mlx_stream.checkpoint.gguf_header import GGUFHeader, Tensor, read_header, shorten
from mlx_stream.checkpoint.gguf_tokenizer import gguf_tokenizer
from mlx_stream.errors import CheckpointError, ConfigError, WeightsError

GROUP = 32
PLAIN = {"F32": "<f4", "F16": "<f2"}
# Bits of an element, and the layout of a block: scale d, minimum m, quants q.
BLOCKS = {
    "Q4_0": (4, np.dtype([("d", "<f2"), ("q", "u1", 16)])),
    "Q4_1": (4, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])),
    "Q8_0": (8, np.dtype([("d", "<f2"), ("q", "u1", 32)])),
}


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file of a Llama as Hugging Face's config, names, row order and tokenizer.

    Tensors are read from the file when asked for: float32 or float16, and for quantized ones
    uint32 (rows, columns * bits / 32), with float16 scales and biases (rows, columns / 32).

    Raises:
        CheckpointError: damaged or truncated; a type of tensor that is not supported.
        ConfigError: the metadata is incomplete or asks for what is not supported.
        WeightsError: a tensor is missing, unknown or of the wrong shape; when one is read, its
            scales do not fit MLX's.
        TokenizerError: the tokenizer cannot be rebuilt.
    """
    header = read_header(path)
    refuse_unsupported_gguf(header)
    refuse_types(header)
    config = gguf_config(header)
    modules = name_tensors(header, config)
    path = path.absolute()
    scaling = read_rope_scaling(header, config, read_factors(header, config["head_dim"], path))
    if scaling is not None:
        config["rope_scaling"] = scaling
    quantization = gguf_quantization(modules)
    if quantization is not None:
        config["quantization"] = quantization
    tokenizer, tokenizer_config = gguf_tokenizer(header, config["vocab_size"])
    return Checkpoint(config, GGUFTensors(path, header.file, modules), tokenizer, tokenizer_config)


def refuse_types(header: GGUFHeader) -> None:
    supported = (*PLAIN, *BLOCKS)
    for tensor in header.tensors.values():
        if tensor.kind not in supported:
            raise CheckpointError(
                f"{header.file}: the tensor {shorten(tensor.name)} has the type {tensor.kind}, "
                f"which is not supported (supported: {', '.join(supported)})"
            )


def read_factors(header: GGUFHeader, head_dim: int, path: Path) -> np.ndarray | None:
    tensor = header.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.kind != "F32" or tensor.shape != (head_dim // 2,):
        raise ConfigError(
            f"{header.file}: rope_freqs.weight must be F32 of shape ({head_dim // 2},), not "
            f"{tensor.kind} of {tensor.shape}"
        )
    return read_raw(path, header.file, tensor, np.dtype("<f4")).astype(np.float64)


@dataclass(frozen=True)
class Parameter:
    """One array of a module: its tensor, and the heads whose rows llama.cpp interleaved, or 0."""

    tensor: Tensor
    heads: int = 0


def name_tensors(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return every tensor by its Hugging Face name, all there, none left, shapes checked."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], kv_heads * config["head_dim"]
    outer = {
        "token_embd": ("model.embed_tokens", (config["vocab_size"], hidden), False, 0),
        "output_norm": ("model.norm", (hidden,), False, 0),
        "output": ("lm_head", (config["vocab_size"], hidden), False, 0),
    }
    attention, mlp = config["attention_bias"], config["mlp_bias"]
    block = {
        "attn_norm": ("input_layernorm", (hidden,), False, 0),
        "attn_q": ("self_attn.q_proj", (queries, hidden), attention, heads),
        "attn_k": ("self_attn.k_proj", (keys, hidden), attention, kv_heads),
        "attn_v": ("self_attn.v_proj", (keys, hidden), attention, 0),
        "attn_output": ("self_attn.o_proj", (hidden, queries), attention, 0),
        "ffn_norm": ("post_attention_layernorm", (hidden,), False, 0),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden), mlp, 0),
        "ffn_up": ("mlp.up_proj", (inner, hidden), mlp, 0),
        "ffn_down": ("mlp.down_proj", (hidden, inner), mlp, 0),
    }
    if config["tie_word_embeddings"]:
        del outer["output"]
    left = dict(header.tensors)
    left.pop("rope_freqs.weight", None)
    named: dict[str, Parameter] = {}

    def take(name: str, module: str, shape: tuple[int, ...], bias: bool, heads: int) -> None:
        for end, wanted in (("weight", shape), *([("bias", shape[:1])] if bias else [])):
            tensor = left.pop(f"{name}.{end}", None)
            if tensor is None:
                raise WeightsError(f"{header.file}: the tensor {name}.{end} is missing")
            if tensor.shape != wanted or (len(wanted) == 1 and tensor.kind in BLOCKS):
                raise WeightsError(
                    f"{header.file}: the tensor {name}.{end} is {tensor.kind} of shape "
                    f"{tensor.shape}, expected {wanted}"
                )
            named[f"{module}.{end}"] = Parameter(tensor, heads)

    for name, rule in outer.items():
        take(name, *rule)
    # A forged layer count ends at the first tensor that is not there.
    for layer in range(config["num_hidden_layers"]):
        for name, (module, *rule) in block.items():
            take(f"blk.{layer}.{name}", f"model.layers.{layer}.{module}", *rule)
    if left:
        raise WeightsError(
            f"{header.file}: the tensor {shorten(next(iter(left)))} is not one of a Llama's "
            f"({len(left)} unknown)"
        )
    return named


def gguf_quantization(named: Mapping[str, Parameter]) -> dict[str, Any] | None:
    """Return mlx-lm's entry: the most common bits, and each matrix that differs by its path."""
    bits = {
        name.removesuffix(".weight"): BLOCKS[p.tensor.kind][0] if p.tensor.kind in BLOCKS else 0
        for name, p in named.items()
        if len(p.tensor.shape) == 2
    }
    counts = Counter(found for found in bits.values() if found)
    if not counts:
        return None
    common = counts.most_common(1)[0][0]
    overrides = {
        path: {"group_size": GROUP, "bits": found} if found else False
        for path, found in bits.items()
        if found != common
    }
    return {"group_size": GROUP, "bits": common, "mode": "affine", **overrides}


class GGUFTensors(Mapping[str, mx.array]):
    """Arrays by Hugging Face name, each read from the file and repacked when asked for."""

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
                    "float16: it is damaged, or must be quantized another way"
                )
        # MLX holds the whole span of a strided array: for scales, all the blocks they come from.
        return mx.array(np.ascontiguousarray(in_order(array, parameter.heads)))


def read_raw(path: Path, file: str, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """Return a tensor's elements or blocks: (rows, columns or blocks of them)."""
    # Read, not mapped: a file that shrinks later is then an error and not the end of the process.
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
    """Return what a zero stands for: the minimum, or -8 d or -128 d (exact, or it overflows)."""
    if "m" in (blocks.dtype.names or ()):
        return blocks["m"]
    zero = -128 if blocks["q"].shape[-1] == GROUP else -8
    with np.errstate(over="ignore", invalid="ignore"):
        return blocks["d"] * np.float16(zero)


def in_order(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order llama.cpp gives queries and keys: rows 0, D/2, 1, D/2 + 1, ... of a head.

    With D = 4 its rows a, b, c, d of each head are Hugging Face's a, c, b, d.
    """
    if not heads:
        return array
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
