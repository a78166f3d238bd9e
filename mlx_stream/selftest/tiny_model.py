"""A model made on the spot: random weights, the shapes of a family; nothing is fetched."""

from typing import Any

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.load import Model, build_model, named_dtype

# Llama 3's: four query heads to each key head, its rotary frequencies, the head tied.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
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
NAME = "made on the spot"


def make_tiny_model(dtype: str | None = None) -> Model:
    """Return a small model without a tokenizer, in float16 on Metal, else in float32.

    Raises:
        ValueRefused: `dtype` is none.
    """
    default = mx.float16 if backend.on_metal() else mx.float32
    return build_model(NAME, CONFIG, weights(), named_dtype(dtype) or default)


def weights() -> dict[str, mx.array]:
    """Return random weights of a scale that makes attention far from uniform."""
    hidden, inner, size = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    heads, kv_heads = (size * CONFIG[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    layer = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], hidden)}
    norms = ["model.norm"]
    for number in range(CONFIG["num_hidden_layers"]):
        path = f"model.layers.{number}"
        shapes |= {f"{path}.{name}": shape for name, shape in layer.items()}
        norms += [f"{path}.input_layernorm", f"{path}.post_attention_layernorm"]
    keys = mx.random.split(mx.random.key(0), len(shapes))
    tensors = {
        f"{name}.weight": mx.random.normal(shape, key=key) * (1.5 * shape[1] ** -0.5)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    return tensors | {f"{name}.weight": mx.ones(hidden) for name in norms}
