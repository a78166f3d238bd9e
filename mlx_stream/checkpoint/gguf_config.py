"""Translates a GGUF header's keys, as named by llama.cpp, to a config.json; reads no tensor data.

Defaults are llama.cpp's. Anything that llama.cpp computes but this package does not is refused by
name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_stream.checkpoint.gguf_header import GGUFHeader, shortest
from mlx_stream.config import Keys, shorten
from mlx_stream.errors import ConfigError, WeightsError

MOST_HEAD_DIM = 2**16  # far above any model's; it limits how many factors are read
FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"

# Keys under the architecture's name that change the computation, each with the value that leaves it
# unchanged.
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


@dataclass(frozen=True)
class Architecture:
    """A llama.cpp architecture and the model family that it maps to.

    Attributes:
        model_type, name: config.json's `model_type`, and the class in its `architectures`.
        interleaved: rotated pairs are adjacent (llama.cpp's rope type NORM), so the rows of queries
            and keys are in a different order from Hugging Face's.
        read: keys of `NEUTRAL` that are supported for this architecture.
        factors: tensors that only scale the frequencies.
    """

    model_type: str
    name: str
    interleaved: bool = False
    read: tuple[str, ...] = ()
    factors: tuple[str, ...] = (FREQS,)


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "mistral3": Architecture(
        "mistral",
        "MistralForCausalLM",
        interleaved=True,
        read=("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        read=("attention.sliding_window", "rope.scaling.attn_factor"),
        factors=(SHORT, LONG),
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", interleaved=True),
}


def read_architecture(header: GGUFHeader) -> Architecture:
    """Return the architecture of a file.

    Raises:
        ConfigError: the architecture, or a key that changes the computation, is not supported.
    """
    keys = header.metadata
    prefix = keys.text("general.architecture")
    if prefix not in ARCHITECTURES:
        raise ConfigError(
            f"{header.file}: the architecture {shorten(prefix)} is not supported (supported: "
            f"{', '.join(ARCHITECTURES)})"
        )
    if keys.text("general.type", "model") != "model":
        raise keys.wrong("general.type", "'model'")
    found = ARCHITECTURES[prefix]
    for key, neutral in NEUTRAL.items():
        value = keys.value(f"{prefix}.{key}", neutral)
        if key not in found.read and (isinstance(value, list | np.ndarray) or value != neutral):
            raise ConfigError(
                f"{header.file}: {prefix}.{key} = {shorten(value)} changes the computation and is "
                "not supported"
            )
    return found


def gguf_config(header: GGUFHeader, architecture: Architecture) -> dict[str, Any]:
    """Return the content of config.json, without rope_scaling and quantization."""
    keys, prefix = header.metadata, header.metadata.text("general.architecture")
    hidden = keys.count(f"{prefix}.embedding_length")
    heads = keys.count(f"{prefix}.attention.head_count")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{header.file}: token_embd.weight is missing or not a matrix")
    head_dim, rotary = read_head_dims(keys, prefix, hidden // heads)
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": keys.count(f"{prefix}.block_count"),
        "intermediate_size": keys.count(f"{prefix}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "rope_theta": keys.number(f"{prefix}.rope.freq_base", 10_000.0),
        "max_position_embeddings": keys.count(f"{prefix}.context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": has_bias(header, "attn_"),
        "mlp_bias": has_bias(header, "ffn_"),
        "torch_dtype": FLOATS.get(embedding.kind, "float16"),
    }
    if rotary != head_dim:
        if architecture.model_type != "phi3":
            raise ConfigError(
                f"{keys.where}: {prefix}.rope.dimension_count {rotary} is not the head size "
                f"{head_dim}: partial rotary positions are not supported"
            )
        config["partial_rotary_factor"] = rotary / head_dim
    if is_set(keys, f"{prefix}.attention.sliding_window"):
        config["sliding_window"] = keys.count(f"{prefix}.attention.sliding_window")
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


FLOATS = {"F32": "float32", "BF16": "bfloat16"}


def read_head_dims(keys: Keys, prefix: str, default: int) -> tuple[int, int]:
    """Return the size of a head and how many of its dimensions are rotated."""
    rotary = keys.count(f"{prefix}.rope.dimension_count", default, most=MOST_HEAD_DIM)
    # Phi-3 files do not give the head size: it is hidden size / heads, and only a part is rotated.
    whole = default if prefix == "phi3" else rotary
    head_dim = keys.count(f"{prefix}.attention.key_length", whole, most=MOST_HEAD_DIM)
    rotary = keys.count(f"{prefix}.rope.dimension_count", head_dim)
    if keys.count(f"{prefix}.attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"{keys.where}: {prefix}.attention.value_length differs from the head size {head_dim}, "
            "which is not supported"
        )
    return head_dim, rotary


def is_set(keys: Keys, key: str) -> bool:
    """Return whether a key is present and not 0, whatever its type."""
    value = keys.raw.get(key)
    return isinstance(value, list | np.ndarray) or bool(value)


def has_bias(header: GGUFHeader, prefix: str) -> bool:
    return any(re.fullmatch(rf"blk\.\d+\.{prefix}\w+\.bias", name) for name in header.tensors)


def read_rope_scaling(
    keys: Keys, config: Mapping[str, Any], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return the rotary scaling keys of config.json.

    Args:
        factors: the values of the architecture's factor tensors, where present.
    """
    prefix = keys.text("general.architecture")
    if config["model_type"] == "phi3":
        return read_longrope(keys, config, factors)
    # In llama.cpp, a factor without a type is linear; without a factor, nothing is scaled.
    kind = keys.text(f"{prefix}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{keys.where}: {prefix}.rope.scaling.type {shorten(kind)} is not supported "
            "(supported: none, linear, yarn)"
        )
    old = keys.number(f"{prefix}.rope.scale_linear", 1.0)
    factor = 1.0 if kind == "none" else keys.number(f"{prefix}.rope.scaling.factor", old)
    if FREQS in factors:
        if factor != 1:
            raise ConfigError(
                f"{keys.where}: {FREQS} together with {prefix}.rope.scaling.type {kind!r} is not "
                "supported"
            )
        return read_rope_factors(keys.where, config, factors[FREQS])
    tempered = is_set(keys, f"{prefix}.attention.temperature_scale")
    if tempered and (kind != "yarn" or factor == 1):
        raise ConfigError(f"{keys.where}: {prefix}.attention.temperature_scale needs yarn")
    if factor == 1:
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.count(
            f"{prefix}.rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        for beta in ("beta_fast", "beta_slow"):
            if f"{prefix}.rope.scaling.yarn_{beta}" in keys.raw:
                scaling[beta] = keys.number(f"{prefix}.rope.scaling.yarn_{beta}")
        if is_set(keys, f"{prefix}.rope.scaling.yarn_log_multiplier"):
            # llama.cpp assumes 1 for the other scale.
            scaling["mscale"] = 1.0
            scaling["mscale_all_dim"] = keys.number(f"{prefix}.rope.scaling.yarn_log_multiplier")
    if not tempered:
        return {"rope_scaling": scaling}
    # Ministral 3: its files have these keys in one object.
    beta = keys.number(f"{prefix}.attention.temperature_scale")
    scaling |= {"llama_4_scaling_beta": beta, "rope_theta": config["rope_theta"]}
    names = {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}
    return names | {"rope_parameters": scaling}


def read_longrope(
    keys: Keys, config: Mapping[str, Any], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    if keys.text("phi3.rope.scaling.type", "none") not in ("none", "longrope"):
        raise keys.wrong("phi3.rope.scaling.type", "none or longrope")
    if SHORT not in factors:
        return {}
    scaling: dict[str, Any] = {"type": "longrope"}  # as Phi-3's own configs spell it
    # Only the short ones are used here; other programs read the long ones from a converted folder.
    for name, key in ((SHORT, "short_factor"), (LONG, "long_factor")):
        numbers = factors.get(name, factors[SHORT])
        if not np.isfinite(numbers).all():
            raise ConfigError(f"{keys.where}: {name} has values that are not finite")
        scaling[key] = [shortest(value) for value in numbers]
    scaling["attention_factor"] = keys.number("phi3.rope.scaling.attn_factor", 1.0)
    key = "phi3.rope.scaling.original_context_length"
    original = keys.count(key, config["max_position_embeddings"])
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def read_rope_factors(file: str, config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Recover Llama 3's settings from the factors that llama.cpp's converter derived from them.

    The scaling factor is the largest of these, and the other settings are the same for every Llama
    3. They are accepted only if they reproduce all the factors.
    """
    head_dim, original = config["head_dim"], 8192
    if np.all(factors == 1.0):
        return {}
    factor = float(factors.max())
    frequencies = config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    # 1 where a pair keeps its frequency (it makes over 4 rotations in the original context), 0
    # where it is slowed by the whole factor (it makes less than one).
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
