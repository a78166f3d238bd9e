"""GGUF files are read without loss, in Hugging Face's words; what cannot be is refused by name."""

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.gguf import in_order, read_gguf
from mlx_stream.checkpoint.gguf_header import TENSOR_TYPES, read_header
from mlx_stream.errors import CheckpointError, ConfigError, WeightsError
from tests.fakes.gguf_files import (
    HEAD_DIM,
    HEADS,
    VOCAB,
    forged,
    key,
    overwrite,
    permute,
    refused,
    tensor,
    text,
    write_tiny,
)

KINDS = ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def dequantized(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Return a parameter in float32, as exactly as MLX can compute it."""
    weight = checkpoint.tensors[name]
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in checkpoint.tensors:
        return np.array(weight.astype(mx.float32))
    entry = checkpoint.config["quantization"]
    entry = entry.get(module, entry)
    scales = checkpoint.tensors[f"{module}.scales"]
    biases = checkpoint.tensors[f"{module}.biases"]
    assert scales.dtype == biases.dtype == mx.float16 and weight.dtype == mx.uint32
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    return np.array(mx.dequantize(weight, *wide, group_size=32, bits=entry["bits"]))


# Weights.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biases", [False, True])
def test_every_value_is_llama_cpps(path: Path, kind: str, biases: bool):
    expected = write_tiny(path, kind, tied=biases, biases=biases)
    checkpoint = read_gguf(path)
    for name, values in expected.items():
        assert np.array_equal(dequantized(checkpoint, name), values), name
    parts = {name.removesuffix("scales").removesuffix("biases") for name in checkpoint.tensors}
    assert {part if "weight" in part or "bias" in part else f"{part}weight" for part in parts} == (
        expected.keys()
    )


def test_rows_of_queries_and_keys_are_put_back():
    rows = np.arange(HEADS * HEAD_DIM * 3).reshape(HEADS * HEAD_DIM, 3)
    for heads in (HEADS, 1):
        permuted = permute(rows, heads)
        assert not np.array_equal(permuted, rows)
        assert np.array_equal(in_order(permuted, heads), rows)
        assert np.array_equal(in_order(permute(rows[:, 0], heads), heads), rows[:, 0])
    assert in_order(np.array(list("abcd")), 1).tolist() == ["a", "c", "b", "d"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_extreme_blocks_are_exact(path: Path, kind: str):
    """Every quant, with scales that are subnormal, zero, negative and large."""
    write_tiny(path, kind)
    where = read_header(path).tensors["blk.0.attn_v.weight"]
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = np.random.default_rng(0).integers(0, 256, (where.size // size, size), np.uint8)
    scales = np.array([0.0, 6e-8, -6e-8, -1.0, 3.3e-5, 500.0], np.float16)
    for column in range(4 if kind == "Q4_1" else 2)[::2]:
        chosen = np.resize(np.roll(scales, column), len(blocks)).view(np.uint8).reshape(-1, 2)
        blocks[:, column : column + 2] = chosen
    overwrite(path, where.offset, blocks.tobytes())
    flat = gguf.quants.dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType[kind])
    found = dequantized(read_gguf(path), "model.layers.0.self_attn.v_proj.weight")
    assert np.array_equal(found.reshape(-1), flat)


@pytest.mark.parametrize(
    ("kind", "scale"), [("Q8_0", 512.0), ("Q4_0", 8192.0), ("Q4_1", np.inf), ("Q4_0", np.nan)]
)
def test_scales_that_do_not_fit_are_refused(path: Path, kind: str, scale: float):
    write_tiny(path, kind)
    where = read_header(path).tensors["blk.1.ffn_up.weight"]
    overwrite(path, where.offset, np.float16(scale).tobytes())
    assert "blk.1.ffn_up.weight" in refused(path, WeightsError)


def test_a_file_cut_after_it_was_opened_is_an_error(path: Path):
    write_tiny(path)
    tensors = read_gguf(path).tensors
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(WeightsError, match="has changed"):
        mx.eval([tensors[name] for name in tensors])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.attn_v.weight": None}, "blk.1.attn_v.weight is missing"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        ({"blk.0.attn_rot.weight": np.zeros(4, np.float32)}, "attn_rot.weight' is not one of"),
        ({"blk.2.attn_norm.weight": np.zeros(64, np.float32)}, "is not one of a Llama's"),
        ({"blk.0.attn_q.weight": np.zeros((32, 64), np.float32)}, "expected (64, 64)"),
        ({"output_norm.weight": np.zeros((8, 8), np.float32)}, "expected (64,)"),
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "blk.0.attn_k.bias is missing"),
    ],
)
def test_wrong_tensors_are_named(path: Path, tensors: dict[str, Any], message: str):
    write_tiny(path, tensors=tensors)
    assert message in refused(path, WeightsError)


# Configuration.


def test_config_is_hugging_faces(path: Path):
    write_tiny(path, keys={"tokenizer.ggml.eot_token_id": 0})
    config = read_gguf(path).config
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "rope_theta": 50_000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "quantization": {"group_size": 32, "bits": 4, "mode": "affine"},
    }


def test_config_follows_the_tensors(path: Path):
    write_tiny(path, "F32", tied=False, biases=True, keys={"llama.rope.freq_base": None})
    config = read_gguf(path).config
    assert config["attention_bias"] and config["mlp_bias"] and not config["tie_word_embeddings"]
    assert config["torch_dtype"] == "float32" and config["rope_theta"] == 10_000
    assert config["eos_token_id"] == 2 and "quantization" not in config


def test_quantization_names_the_modules_that_differ(path: Path):
    kinds = {"token_embd.weight": "Q8_0", "output.weight": "F16", "blk.1.ffn_up.weight": "Q4_1"}
    expected = write_tiny(path, "Q4_0", kinds=kinds, tied=False)
    checkpoint = read_gguf(path)
    assert checkpoint.config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        "lm_head": False,
    }
    for name, values in expected.items():
        assert np.array_equal(dequantized(checkpoint, name), values), name


SCALING = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 1.0}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {"type": "yarn", "factor": 2.0, "yarn_beta_fast": 16.0},
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_rope_scaling(path: Path, keys: dict[str, Any], expected: dict[str, Any] | None):
    write_tiny(path, keys={SCALING + key: value for key, value in keys.items()})
    assert read_gguf(path).config.get("rope_scaling") == expected


def llama3_factors(factor: float, low: float = 1.0) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, `LlamaModel.generate_extra_tensors`."""
    factors = []
    for frequency in 50_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - low) / (4.0 - low)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_settings_are_recovered_from_the_factors(path: Path, factor: float):
    factors = llama3_factors(factor)
    assert 1 < np.median(factors) < factor or len(set(factors.tolist())) > 2
    write_tiny(path, tensors={"rope_freqs.weight": factors})
    assert read_gguf(path).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    "factors",
    [llama3_factors(8.0, low=2.0), np.full(8, np.nan, np.float32), np.full(8, np.inf, np.float32)],
)
def test_other_rope_factors_are_refused(path: Path, factors: np.ndarray):
    write_tiny(path, tensors={"rope_freqs.weight": factors})
    assert "rope_freqs.weight" in refused(path, ConfigError)


def test_rope_factors_of_one_or_none(path: Path):
    write_tiny(path, tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert "rope_scaling" not in read_gguf(path).config
    write_tiny(path, tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    assert "rope_freqs.weight" in refused(path, ConfigError)
    keys = {SCALING + "type": "yarn", SCALING + "factor": 2.0}
    write_tiny(path, keys=keys, tensors={"rope_freqs.weight": llama3_factors(8.0)})
    assert "rope_freqs.weight" in refused(path, ConfigError)


REQUIRED = [
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [None, "text", -1, 0, True, [1, 2], float("nan")])
def test_missing_and_ill_typed_keys_are_named(path: Path, name: str, value: Any):
    write_tiny(path, keys={name: value})
    assert name in refused(path, ConfigError)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window = 64"),
        ({"llama.logit_scale": [1.0]}, "llama.logit_scale"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"llama.rope.scaling.type": 3}, "llama.rope.scaling.type must be text"),
        ({"llama.rope.scaling.factor": [2.0]}, "llama.rope.scaling.factor must be"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "partial rotary"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length"),
        ({"llama.attention.head_count_kv": 3}, "key/value heads"),
        ({"general.type": "adapter"}, "general.type must be 'model'"),
        ({"general.alignment": 24}, "general.alignment 24 is not a power of two"),
    ],
)
def test_what_would_change_the_computation_is_refused(
    path: Path, keys: dict[str, Any], message: str
):
    write_tiny(path, keys=keys)
    assert message in refused(path, CheckpointError)


def test_other_architectures_types_and_parts_are_refused(path: Path):
    write_tiny(path, architecture="qwen2")
    assert "'qwen2' is not supported (supported: llama)" in refused(path, ConfigError)
    write_tiny(path, keys={"split.count": 3})
    assert "one part of 3" in refused(path, CheckpointError)
    # Q5_1 blocks are 24 bytes of 32 elements; the writer makes no Q4_K, the same table holds it.
    write_tiny(path, kinds={"blk.0.ffn_up.weight": "Q5_1"})
    message = refused(path, CheckpointError)
    assert "blk.0.ffn_up.weight' has the type Q5_1" in message
    assert "(supported: F32, F16, Q4_0, Q4_1, Q8_0)" in message
    entry = tensor("blk.0.ffn_up.weight", (256, 2), kind=12)
    architecture = key("general.architecture", 8, text("llama"))
    path.write_bytes(forged((architecture,), (entry,), bytes(288)))
    assert "blk.0.ffn_up.weight' has the type Q4_K" in refused(path, CheckpointError)


def test_the_table_of_types_is_ggmls():
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        assert TENSOR_TYPES.get(int(kind), (kind.name, *sizes)) == (kind.name, *sizes)
