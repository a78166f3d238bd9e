"""A fingerprint that tells one loaded model from another.

It detects a fine-tune, but not a single damaged value.

Version 2 uses the checkpoint's tensor names and omits settings at their defaults, so it does
not change when modules are rearranged or a family gets a new setting. Version 1 uses the names of
this package's modules; it is still computed to recognise old files.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import CausalLM

VERSION = 2
# Values sampled from each tensor.
SAMPLED = 64
# Settings that do not change the computation, or that are evident from the tensors.
NOT_COMPUTED = {
    "max_position_embeddings",
    "sliding_window",
    "position_limit",
    "quantization",
    "vocab_size",
}
# The settings of version 1.
SETTINGS_1 = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "quantization",
)
ROPE_1 = (
    "rope_theta",
    "rope_type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "truncate",
    "attention_factor",
)


def fingerprint(config: ModelConfig, network: CausalLM, dtype: mx.Dtype, quantized: bool) -> str:
    """Return a model's fingerprint: "2:" and 16 hexadecimal digits.

    Args:
        quantized: whether the model computes with its quantized weights.
    """
    settings = {
        name: value for name, value in settings_of(config).items() if name not in NOT_COMPUTED
    }
    about = {"config": settings, "dtype": str(dtype), "kept": quantized}
    return f"{VERSION}:{digest_tensors(about, network.named_tensors())}"


def fingerprint_1(config: ModelConfig, network: CausalLM, dtype: mx.Dtype, quantized: bool) -> str:
    """Return a model's version 1 fingerprint: 16 hexadecimal digits."""
    settings: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS_1}
    settings["rope"] = {name: getattr(config.rope, name) for name in ROPE_1}
    if config.quantization is not None:
        table = config.quantization.items()
        settings["quantization"] = {path: entry and vars(entry) for path, entry in table}
    about = {"config": settings, "dtype": str(dtype), "kept": quantized}
    tensors: Any = tree_flatten(network.parameters())
    return digest_tensors(about, tensors)


def digest_tensors(about: dict[str, Any], tensors: Iterable[tuple[str, mx.array]]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        digest.update(raw_bytes(flat[:: max(1, flat.size // SAMPLED)]))
    return digest.hexdigest()[:16]


def settings_of(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that have no default or differ from their default."""
    found: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.default is MISSING or value != field.default:
            found[field.name] = settings_of(value) if is_dataclass(value) else value
    return found


def raw_bytes(array: mx.array) -> memoryview:
    """Evaluate an array and return its bytes in row-major order."""
    integers = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    # numpy has no bfloat16, and only the bits matter.
    values: Any = np.ascontiguousarray(np.array(array.view(integers), copy=False))
    return memoryview(values).cast("B")
