"""GGUF files are read without loss, with Hugging Face's names."""

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.gguf import in_order, read_gguf
from mlx_stream.checkpoint.gguf_header import TENSOR_TYPES, read_header
from mlx_stream.errors import WeightsError
from tests.fakes.gguf_files import (
    HEAD_DIM,
    HEADS,
    VOCAB,
    llama3_factors,
    overwrite,
    permute,
    write_tiny,
)

LEGACY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


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
    assert scales.dtype == biases.dtype and weight.dtype == mx.uint32
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    return np.array(mx.dequantize(weight, *wide, group_size=32, bits=entry["bits"]))


# Weights.


@pytest.mark.parametrize("biases", [False, True])
def test_every_tensor_is_there(path: Path, biases: bool):
    expected = write_tiny(path, "Q4_0", tied=biases, biases=biases)
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


@pytest.mark.parametrize("kind", LEGACY)
def test_extreme_blocks_are_exact(path: Path, kind: str):
    """Every quant, with scales that are subnormal, zero, negative and large."""
    write_tiny(path, kind)
    where = read_header(path).tensors["blk.0.attn_v.weight"]
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = np.random.default_rng(0).integers(0, 256, (where.size // size, size), np.uint8)
    scales = np.array([0.0, 6e-8, -6e-8, -1.0, 3.3e-5, 500.0], np.float16)
    for column in range(4 if kind.endswith("_1") else 2)[::2]:
        chosen = np.resize(np.roll(scales, column), len(blocks)).view(np.uint8).reshape(-1, 2)
        blocks[:, column : column + 2] = chosen
    overwrite(path, where.offset, blocks.tobytes())
    flat = gguf.quants.dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType[kind])
    found = dequantized(read_gguf(path), "model.layers.0.self_attn.v_proj.weight")
    assert np.array_equal(found.reshape(-1), flat)


def test_a_file_cut_after_it_was_opened_is_an_error(path: Path):
    write_tiny(path)
    tensors = read_gguf(path).tensors
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(WeightsError, match="has changed"):
        mx.eval([tensors[name] for name in tensors])


# Configuration.


def test_config_is_hugging_faces(path: Path):
    write_tiny(path, keys={"tokenizer.ggml.eot_token_id": 0})
    assert read_gguf(path).config == {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
        **{"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        **{"vocab_size": VOCAB, "rope_theta": 50_000.0, "max_position_embeddings": 512},
        **{"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
        **{"torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": [2, 0]},
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


def test_rope_factors_of_one_are_none(path: Path):
    write_tiny(path, tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert "rope_scaling" not in read_gguf(path).config


def test_the_table_of_types_is_ggmls():
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        assert TENSOR_TYPES.get(int(kind), (kind.name, *sizes)) == (kind.name, *sizes)
