"""GGUF files of a tiny model of every family, as llama.cpp's converter writes them.

Names and keys go through the `gguf` package, so only the choice of keys is made here.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.fakes.gguf_files import permute
from tests.fakes.tiny import CHAT_TEMPLATE, SPECIALS, tiny_tokenizer

ARCHITECTURES = {"mistral": "mistral3", "ministral3": "mistral3"}
INTERLEAVED = ("llama", "mistral3", "smollm3")
# For types that the package cannot write: the root mean square of random blocks with d = 1, and m
# as a multiple of d.
RANDOM = {"Q2_K": (16.0, 1.5), "Q3_K": (43.0, 0.0), "Q4_K": (240.0, 7.5)}
RANDOM |= {"Q5_K": (490.0, 15.5), "Q6_K": (1370.0, 0.0)}
# Where d and m are in a block.
PLACES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
# Widths that every type's block size divides.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16}


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the bytes of a matrix; for a type in `RANDOM`, random blocks of the same scale."""
    number = gguf.GGMLQuantizationType[kind]
    if kind not in RANDOM:
        return gguf.quants.quantize(values, number)
    elements, size = gguf.GGML_QUANT_SIZES[number]
    rows, blocks = len(values), values.shape[1] // elements
    random = np.random.default_rng(values.size)
    found = random.integers(0, 256, (rows * blocks, size), np.uint8)
    spread, minimum = RANDOM[kind]
    for place, times in zip(PLACES[kind], (1.0, minimum), strict=False):
        scales = random.uniform(0.7, 1.4, (rows * blocks, 1)) * times * values.std() / spread
        found[:, place : place + 2] = scales.astype(np.float16).view(np.uint8)
    return found.reshape(rows, -1)


def decode(encoded: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[kind])


def write_family(
    path: Path,
    raw: dict[str, Any],
    weights: dict[str, np.ndarray],
    kind: str = "F32",
    kinds: dict[str, str] | None = None,
    parts: int = 1,
) -> dict[str, np.ndarray]:
    """Write a model as GGUF; return the values of its weights in float32, by Hugging Face name.

    Args:
        raw: a `tiny_config`.
        kinds: the types of individual matrices, by Hugging Face name; all others have `kind`.
        parts: about how many files to write, named as llama.cpp names them.
    """
    architecture = str(ARCHITECTURES.get(raw["model_type"], raw["model_type"]))
    number = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, raw["num_hidden_layers"])
    heads = {"q_proj": raw["num_attention_heads"], "k_proj": raw["num_key_value_heads"]}
    expected: dict[str, np.ndarray] = {}
    limit = -(-(len(weights) + 2) // parts) if parts > 1 else 0
    with closing(gguf.GGUFWriter(path, architecture, split_max_tensors=limit)) as writer:
        write_keys(writer, raw)
        for name, values in weights.items():
            use = (kinds or {}).get(name, kind) if values.ndim == 2 else "F32"
            encoded = encode(values, use)
            expected[name] = decode(encoded, use)
            module = name.split(".")[-2]
            if architecture in INTERLEAVED and module in heads:
                encoded = permute(encoded, heads[module])
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            writer.add_tensor(found, encoded, raw_dtype=gguf.GGMLQuantizationType[use])
        for name, values in factor_tensors(raw).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return expected


def write_keys(writer: gguf.GGUFWriter, raw: dict[str, Any]) -> None:
    """Write the keys that `convert_hf_to_gguf.py` writes."""
    head_dim = raw["head_dim"]
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or raw["rope_theta"])
    if raw["model_type"] == "phi3":
        writer.add_rope_dimension_count(int(raw.get("partial_rotary_factor", 1.0) * head_dim))
        writer.add_sliding_window(raw.get("sliding_window") or 0)
        original = raw.get("original_max_position_embeddings", raw["max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope:
            growth = np.log(raw["max_position_embeddings"] / original) / np.log(original)
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + growth)))
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        if raw["model_type"] in ("llama", "smollm3"):
            writer.add_rope_dimension_count(head_dim)
    if rope.get("rope_type") in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "llama_4_scaling_beta" in rope:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    vocabulary = tiny_tokenizer(raw["vocab_size"])
    tokens = [vocabulary.id_to_token(index) or "" for index in range(raw["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    merges = json.loads(vocabulary.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def factor_tensors(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    rope = raw.get("rope_scaling") or {}
    if rope.get("rope_type") == "longrope":
        sides = {side: np.array(rope[f"{side}_factor"], np.float32) for side in ("long", "short")}
        return {f"rope_factors_{side}.weight": values for side, values in sides.items()}
    if rope.get("rope_type") != "llama3":
        return {}
    head_dim = raw["head_dim"]
    plain = raw["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * plain / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return {"rope_freqs.weight": factors.astype(np.float32)}
