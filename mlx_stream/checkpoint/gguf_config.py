"""Translates a GGUF header's keys to a config.json; uses llama.cpp's names, reads no tensors.

Defaults are llama.cpp's. What llama.cpp computes and this package does not is refused by name.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_stream.checkpoint.gguf_header import GGUFHeader
from mlx_stream.config import Keys, shorten
from mlx_stream.errors import CheckpointError, ConfigError, WeightsError

ARCHITECTURES = ("llama",)
MOST_HEAD_DIM = 2**16  # far above any model's; it bounds the reading of rope_freqs.weight

# Keys under `llama.` that change the computation, with the value that does not.
NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "attention.causal": True,
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"), 0.0),
    **dict.fromkeys(("attention.sliding_window", "attention.temperature_scale"), 0),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), 0.0),
    **dict.fromkeys(("embedding_scale", "logit_scale", "residual_scale"), 1.0),
    **dict.fromkeys(("rope.scaling.alpha", "rope.scaling.yarn_log_multiplier"), 0.0),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), 1.0),
    "rope.scaling.yarn_ext_factor": 1.0,
    **dict.fromkeys(("swin_norm", "use_parallel_residual"), False),
}


def refuse_unsupported_gguf(header: GGUFHeader) -> None:
    keys = header.metadata
    architecture = keys.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{header.file}: the architecture {shorten(architecture)} is not supported "
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    if keys.text("general.type", "model") != "model":
        raise keys.wrong("general.type", "'model'")
    if (parts := keys.count("split.count", 1, least=0)) > 1:
        raise CheckpointError(
            f"{header.file}: one part of {parts}; join them first with llama-gguf-split --merge"
        )
    for key, neutral in NEUTRAL.items():
        value = keys.value(f"llama.{key}", neutral)
        if isinstance(value, list | np.ndarray) or value != neutral:
            raise ConfigError(
                f"{header.file}: llama.{key} = {shorten(value)} changes the computation and is "
                "not supported"
            )


def gguf_config(header: GGUFHeader) -> dict[str, Any]:
    """Return the content of config.json, without rope_scaling and quantization."""
    keys = header.metadata
    hidden = keys.count("llama.embedding_length")
    heads = keys.count("llama.attention.head_count")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{header.file}: token_embd.weight is missing or not a matrix")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": keys.count("llama.block_count"),
        "intermediate_size": keys.count("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("llama.attention.head_count_kv", heads),
        "head_dim": read_head_dim(keys, hidden // heads),
        "rms_norm_eps": keys.number("llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "rope_theta": keys.number("llama.rope.freq_base", 10_000.0),
        "max_position_embeddings": keys.count("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": has_bias(header, "attn_"),
        "mlp_bias": has_bias(header, "ffn_"),
        "torch_dtype": "float32" if embedding.kind == "F32" else "float16",
    }
    ids = {
        role: keys.count(key, least=0)
        for role in ("bos", "eos", "eot", "eom")
        if (key := f"tokenizer.ggml.{role}_token_id") in keys.raw
    }
    if "bos" in ids:
        config["bos_token_id"] = ids.pop("bos")
    if ends := list(dict.fromkeys(ids.values())):
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return config


def read_head_dim(keys: Keys, default: int) -> int:
    rotary = keys.count("llama.rope.dimension_count", default, most=MOST_HEAD_DIM)
    head_dim = keys.count("llama.attention.key_length", rotary, most=MOST_HEAD_DIM)
    if keys.count("llama.rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(
            f"{keys.where}: llama.rope.dimension_count {rotary} is not the head size {head_dim}: "
            "partial rotary positions are not supported"
        )
    if keys.count("llama.attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"{keys.where}: llama.attention.value_length differs from the head size {head_dim}, "
            "which is not supported"
        )
    return head_dim


def has_bias(header: GGUFHeader, prefix: str) -> bool:
    return any(re.fullmatch(rf"blk\.\d+\.{prefix}\w+\.bias", name) for name in header.tensors)


def read_rope_scaling(
    keys: Keys, config: Mapping[str, Any], factors: np.ndarray | None
) -> dict[str, Any]:
    """Return config.json's rope_scaling, or nothing.

    Args:
        factors: those of rope_freqs.weight, if it is there.
    """
    # llama.cpp: without a type a factor is linear; without a factor nothing is scaled.
    kind = keys.text("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{keys.where}: llama.rope.scaling.type {shorten(kind)} is not supported (supported: "
            "none, linear, yarn)"
        )
    old = keys.number("llama.rope.scale_linear", 1.0)
    factor = 1.0 if kind == "none" else keys.number("llama.rope.scaling.factor", old)
    if factors is not None:
        if factor != 1:
            raise ConfigError(
                f"{keys.where}: rope_freqs.weight together with llama.rope.scaling.type "
                f"{kind!r} is not supported"
            )
        return read_rope_factors(keys.where, config, factors)
    if factor == 1:
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.count(
            "llama.rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        for beta in ("beta_fast", "beta_slow"):
            if f"llama.rope.scaling.yarn_{beta}" in keys.raw:
                scaling[beta] = keys.number(f"llama.rope.scaling.yarn_{beta}")
    return {"rope_scaling": scaling}


def read_rope_factors(file: str, config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Recover Llama 3's settings from the factors that llama.cpp's converter made of them.

    The factor is the largest one, and the other settings are those of every Llama 3. They are
    accepted only if they reproduce all the factors.
    """
    head_dim, original = config["head_dim"], 8192
    if np.all(factors == 1.0):
        return {}
    factor = float(factors.max())
    frequencies = config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    # One where a pair keeps its frequency (it turns over 4 times in the original context), zero
    # where it is slowed by the whole factor (it turns less than once).
    kept = np.clip((original * frequencies / (2 * np.pi) - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    plausible = np.isfinite(factors).all() and factor > 1
    if not plausible or np.abs(factors * ((1 - kept) / factor + kept) - 1.0).max() > 1e-3:
        raise ConfigError(
            f"{file}: the factors of rope_freqs.weight are not Llama 3's (low 1, high 4, original "
            "context 8192) and are not supported"
        )
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
    return {"rope_scaling": scaling}
