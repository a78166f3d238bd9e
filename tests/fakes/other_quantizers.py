"""Tiny folders as AutoAWQ, GPTQ and fp8 tools write them, and the floats that they stand for."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import TensorSpec, serialize_file

from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

# AutoAWQ's `packing_utils.AWQ_ORDER`: which output each nibble holds.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Arrays = dict[str, np.ndarray]


def pack(codes: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """Pack (rows, n) codes along n into (rows, n * bits / 32) int32, as the tools do."""
    per = 32 // bits
    words = np.zeros((len(codes), codes.shape[1] // per), np.uint32)
    for place in range(per):
        column = order[place] if order else place
        words |= codes[:, column::per].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def integers(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, ...]:
    """Return codes (outputs, inputs), scales and zeros (outputs, groups), and the values."""
    groups = weight.reshape(len(weight), -1, group)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.round(-low / scales), 0, 2**bits - 1)
    codes = np.clip(np.round(groups / scales) + zeros, 0, 2**bits - 1)
    values = (codes - zeros) * scales
    return codes.reshape(weight.shape), scales[..., 0], zeros[..., 0], values.reshape(weight.shape)


def awq(weight: np.ndarray, group: int) -> tuple[Arrays, np.ndarray]:
    codes, scales, zeros, values = integers(weight, 4, group)
    tensors = {
        "qweight": pack(codes.T, 4, AWQ_ORDER),
        "qzeros": pack(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T.astype(np.float16),
    }
    return tensors, values


def gptq(weight: np.ndarray, group: int, bits: int = 4, less: int = 1) -> tuple[Arrays, np.ndarray]:
    """Quantize in GPTQ's original format: zero points are stored minus 1 (`less`), in a nibble."""
    codes, scales, zeros, values = integers(weight, bits, group)
    tensors = {
        "qweight": np.ascontiguousarray(pack(codes, bits).T),
        "qzeros": pack((zeros.T.astype(int) - less) % 2**bits, bits),
        "scales": scales.T.astype(np.float16),
        "g_idx": (np.arange(weight.shape[1]) // group).astype(np.int32),
    }
    return tensors, values


def fp8(weight: np.ndarray, block: tuple[int, int] | None) -> tuple[Arrays, np.ndarray]:
    rows, columns = weight.shape
    high, wide = block or weight.shape
    scales = np.empty((-(-rows // high), -(-columns // wide)), np.float32)
    spread = np.empty_like(weight)
    for i, j in np.ndindex(*scales.shape):
        part = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
        scales[i, j] = np.abs(weight[part]).max() / 448
        spread[part] = scales[i, j]
    codes = mx.to_fp8(mx.array(weight / spread))
    values = np.array(mx.from_fp8(codes, mx.float32)) * spread
    tensors: Arrays = {"weight": np.array(codes)}
    if block:
        return tensors | {"weight_scale_inv": scales}, values
    one = {"weight_scale_inv": scales.reshape(()), "activation_scale": scales.reshape(())}
    return tensors | one, values


def write_quantized(
    folder: Path, entry: dict[str, Any], changes: dict[str, Any], quantize: Any
) -> Arrays:
    """Write a model whose layers' matrices are quantized; return its weights as float32.

    Args:
        entry: its `quantization_config`.
        quantize: a matrix -> its tensors and its values.
    """
    raw = tiny_config(**changes)
    weights = tiny_weights(raw)
    write_tiny(folder, raw | {"quantization_config": entry}, weights)
    stored: Arrays = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or ".layers." not in name:
            stored[name] = weight
            continue
        tensors, weights[name] = quantize(weight)
        stored |= {f"{module}.{end}": tensor for end, tensor in tensors.items()}
    stored = {name: np.ascontiguousarray(array) for name, array in stored.items()}
    dtypes = {"uint8": "float8_e4m3fn"}
    specs = {
        name: TensorSpec(
            dtype=dtypes.get(str(array.dtype), str(array.dtype)),
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in stored.items()
    }
    serialize_file(specs, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    return weights
