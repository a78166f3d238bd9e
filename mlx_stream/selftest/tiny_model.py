"""Makes a small random model with a real architecture; fetches nothing."""

from typing import Any

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.config import read_config
from mlx_stream.generate.model import Model
from mlx_stream.load import build_model, named_dtype
from mlx_stream.models.layout import Vector, layout_of

# As in Llama 3: four query heads per key head, its rotary frequencies, a tied head. As in SmolLM3,
# some layers (here one of two) have no rotary positions.
CONFIG: dict[str, Any] = {
    "model_type": "smollm3",
    "no_rope_layers": [1, 0],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
NAME = "a small random model"


def make_tiny_model(dtype: str | None = None) -> Model:
    """Return a small model without a tokenizer, in float16 on Metal, else in float32.

    Raises:
        ValueRefused: `dtype` is unknown.
    """
    default = mx.float16 if backend.on_metal() else mx.float32
    return build_model(NAME, CONFIG, weights(), named_dtype(dtype) or default)


def weights() -> dict[str, mx.array]:
    """Return random weights whose scale makes attention far from uniform."""
    parts = list(layout_of(read_config(CONFIG)).parts)
    keys = mx.random.split(mx.random.key(0), len(parts))
    tensors = {}
    for part, key in zip(parts, keys, strict=True):
        if isinstance(part, Vector):
            tensors[f"{part.path}.weight"] = mx.ones(part.size)
        else:
            weight = mx.random.normal((part.outputs, part.inputs), key=key)
            tensors[f"{part.path}.weight"] = weight * (1.5 * part.inputs**-0.5)
    return tensors
