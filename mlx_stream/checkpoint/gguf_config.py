"""A GGUF header's keys -> what config.json would say; knows llama.cpp's words, reads no tensor.

Where llama.cpp fills in a default, so does this; what it would compute and this package cannot is
refused by name.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_stream.checkpoint.gguf_header import GGUFHeader, Metadata, shorten
from mlx_stream.errors import CheckpointError, ConfigError, WeightsError

ARCHITECTURES = ("llama",)

# Keys under `llama.` that change what is computed, with the values that leave it as it is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (1.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
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
    if keys.count("split.count", 1, least=0) > 1:
        raise CheckpointError(
            f"{header.file}: one part of {keys.count('split.count')}; join them first with "
            "llama-gguf-split --merge"
        )
    for key, neutral in NEUTRAL.items():
        value = keys.value(f"llama.{key}", neutral[0])
        if isinstance(value, list | np.ndarray) or value not in neutral:
            raise ConfigError(
                f"{header.file}: llama.{key} = {shorten(value)} changes the computation and is "
                "not supported"
            )


def gguf_config(header: GGUFHeader) -> dict[str, Any]:
    """Return what config.json would say, but for rope_scaling and quantization."""
    keys = header.metadata
    hidden = keys.count("llama.embedding_length")
    heads = keys.count("llama.attention.head_count")
    layers = keys.count("llama.block_count")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{header.file}: token_embd.weight is missing or not a matrix")
    trained = keys.count("llama.context_length")
    eos = [
        keys.count(key, least=0)
        for key in (f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
        if key in keys
    ]
    kinds = {tensor.kind for tensor in header.tensors.values()}
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": keys.count("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("llama.attention.head_count_kv", heads),
        "head_dim": read_head_dim(keys, hidden, heads),
        "rms_norm_eps": keys.number("llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "rope_theta": keys.number("llama.rope.freq_base", 10_000.0),
        "max_position_embeddings": trained,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": has_bias(header, "attn_"),
        "mlp_bias": has_bias(header, "ffn_"),
        "torch_dtype": "float32" if kinds == {"F32"} else "float16",
    }
    if "tokenizer.ggml.bos_token_id" in keys:
        config["bos_token_id"] = keys.count("tokenizer.ggml.bos_token_id", least=0)
    if eos:
        unique = list(dict.fromkeys(eos))
        config["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    if heads % config["num_key_value_heads"]:
        raise ConfigError(
            f"{header.file}: {heads} heads are not a multiple of "
            f"{config['num_key_value_heads']} key/value heads"
        )
    return config


def read_head_dim(keys: Metadata, hidden: int, heads: int) -> int:
    rotary = keys.count("llama.rope.dimension_count") if "llama.rope.dimension_count" in keys else 0
    if not rotary and hidden % heads and "llama.attention.key_length" not in keys:
        raise ConfigError(
            f"{keys.file}: embedding_length {hidden} is not a multiple of {heads} heads, and there "
            "is no llama.attention.key_length"
        )
    head_dim = keys.count("llama.attention.key_length", rotary or hidden // heads)
    if rotary and rotary != head_dim:
        raise ConfigError(
            f"{keys.file}: llama.rope.dimension_count {rotary} is not the head size {head_dim}: "
            "partial rotary positions are not supported"
        )
    if keys.count("llama.attention.value_length", head_dim) != head_dim or head_dim % 2:
        raise ConfigError(
            f"{keys.file}: heads of size {head_dim} (llama.attention.key_length) must be even and "
            "as large as llama.attention.value_length"
        )
    return head_dim


def has_bias(header: GGUFHeader, prefix: str) -> bool:
    return any(re.fullmatch(rf"blk\.\d+\.{prefix}\w+\.bias", name) for name in header.tensors)


def read_rope_scaling(
    header: GGUFHeader, config: Mapping[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
    """Return Hugging Face's entry; `factors` are those of rope_freqs.weight, if it is there."""
    keys = header.metadata
    # llama.cpp: without a type a factor is linear; without a factor nothing is scaled.
    kind = keys.text("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{header.file}: llama.rope.scaling.type {shorten(kind)} is not supported (supported: "
            "none, linear, yarn)"
        )
    old = keys.number("llama.rope.scale_linear", 1.0)
    factor = 1.0 if kind == "none" else keys.number("llama.rope.scaling.factor", old)
    if factors is not None:
        if factor != 1:
            raise ConfigError(
                f"{header.file}: rope_freqs.weight together with llama.rope.scaling.type "
                f"{kind!r} is not supported"
            )
        return read_rope_factors(header, config, factors)
    if factor == 1:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.count(
            "llama.rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        for beta in ("beta_fast", "beta_slow"):
            if f"llama.rope.scaling.yarn_{beta}" in keys:
                scaling[beta] = keys.number(f"llama.rope.scaling.yarn_{beta}")
    return scaling


def read_rope_factors(
    header: GGUFHeader, config: Mapping[str, Any], factors: np.ndarray
) -> dict[str, Any] | None:
    """Recover Llama 3's settings from the factors llama.cpp's converter made of them.

    The factor is the largest one, the rest is what every Llama 3 has; they are believed only if
    they give back all the factors.
    """
    head_dim, original = config["head_dim"], 8192
    if np.all(factors == 1.0):
        return None
    factor = float(factors.max())
    frequencies = config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    # One where a pair keeps its frequency (it turns over 4 times in the original context), zero
    # where it is slowed by the whole factor (it turns less than once).
    kept = np.clip((original * frequencies / (2 * np.pi) - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    given_back = np.isfinite(factors).all() and factor > 1
    if not given_back or np.abs(factors * ((1 - kept) / factor + kept) - 1.0).max() > 1e-3:
        raise ConfigError(
            f"{header.file}: the factors of rope_freqs.weight are not Llama 3's (low 1, high 4, "
            "original context 8192) and are not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
