"""A GGUF file of any family and type is the same model as a folder with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_stream.checkpoint import gguf as gguf_module
from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.checkpoint.gguf_blocks import FORMATS
from mlx_stream.errors import CheckpointError, ConfigError
from mlx_stream.load import load
from tests.checkpoint.test_gguf import dequantized
from tests.fakes import gguf_families
from tests.fakes.gguf_families import WIDE, write_family
from tests.fakes.gguf_files import refused
from tests.fakes.tiny import (
    LLAMA3,
    LONGROPE,
    MINISTRAL3,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    YARN,
    tiny_config,
    tiny_weights,
    write_tiny,
)
from tests.fakes.tiny_models import all_logits, some_ids

KINDS = ["F32", "F16", "BF16", *FORMATS]
# As in published files: the head and some matrices have different types from the rest.
MIXED = {
    "model.embed_tokens.weight": "Q6_K",
    "lm_head.weight": "Q6_K",
    "model.layers.0.self_attn.v_proj.weight": "Q6_K",
    "model.layers.1.mlp.down_proj.weight": "Q5_K",
    "model.layers.1.mlp.up_proj.weight": "Q5_0",
}
FAMILIES: list[dict[str, Any]] = [
    {},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "rope_theta": 5e4},
    {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    {"head_dim": 32, "num_attention_heads": 8},
    MISTRAL,
    MINISTRAL3,
    QWEN2,
    {**QWEN2, "tie_word_embeddings": True, "rope_scaling": YARN},
    QWEN3,
    {**QWEN3, "head_dim": 32, "rope_scaling": YARN},
    PHI3,
    {**PHI3, **LONGROPE, "sliding_window": 100},
    {**SMOLLM3, "no_rope_layers": None},
    {**SMOLLM3, "no_rope_layers": None, "rope_scaling": YARN},
]
SAME = ("position_limit", "sliding_window", "unrotated_layers", "max_position_embeddings")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def stored(values: dict[str, np.ndarray], kinds: dict[str, str]) -> dict[str, np.ndarray]:
    """Return float32 weights as they are read: those of some types are rounded to 16 bits."""
    rounded = [name for name in values if kinds.get(name) in ("Q2_K", "Q3_K", "Q6_K")]
    return values | {name: values[name].astype(np.float16).astype(np.float32) for name in rounded}


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_llama_cpps(path: Path, kind: str):
    raw = tiny_config(**WIDE, tie_word_embeddings=True)
    expected = write_family(path, raw, tiny_weights(raw), kind)
    checkpoint = read_gguf(path)
    matrices = dict.fromkeys((n for n, v in expected.items() if v.ndim == 2), kind)
    assert (len(checkpoint.dequantized) > 0) == (kind in ("Q2_K", "Q3_K", "Q6_K"))
    for name, values in stored(expected, matrices).items():
        assert np.array_equal(dequantized(checkpoint, name), values), name


@pytest.mark.parametrize("changes", FAMILIES, ids=str)
@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_a_family_has_the_logits_of_its_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], kind: str
):
    monkeypatch.setattr(gguf_module, "CHUNK", 9_000)  # several parts of each matrix
    raw = tiny_config(**WIDE | changes)
    kinds = MIXED if kind == "Q4_K" else {}
    expected = write_family(path, raw, tiny_weights(raw), kind, kinds)
    folder = write_tiny(path.with_name("folder"), raw, stored(expected, kinds))
    models = load(path, "float32"), load(folder, "float32")
    ours, theirs = (all_logits(m, m.new_cache(4, 60), some_ids(50), 17) for m in models)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs).max() > 0.5
    for name in SAME:
        assert getattr(models[0].config, name) == getattr(models[1].config, name), name
    assert models[0].tokenizer.encode("The theory") == models[1].tokenizer.encode("The theory")


# --- files in parts ---


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    raw = tiny_config(**QWEN3)
    write_family(tmp_path / "whole.gguf", raw, tiny_weights(raw), "Q8_0")
    write_family(tmp_path / "model.gguf", raw, tiny_weights(raw), "Q8_0", parts=3)
    found = sorted(tmp_path.glob("model-*.gguf"))
    assert [part.name for part in found] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return found


def test_parts_are_read_as_one_file(parts: list[Path]):
    whole = read_gguf(parts[0].with_name("whole.gguf"))
    for part in parts:
        checkpoint = read_gguf(part)
        assert checkpoint.config == whole.config and checkpoint.tokenizer == whole.tokenizer
        assert checkpoint.tensors.keys() == whole.tensors.keys()
        for name in whole.tensors:
            assert np.array_equal(checkpoint.tensors[name], whole.tensors[name]), name


def test_parts_that_do_not_fit_are_refused(parts: list[Path]):
    content = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match="not part 2 of 3"):
        read_gguf(parts[0])
    parts[1].unlink()
    assert "part 2 of 3 is missing" in refused(parts[0], CheckpointError)
    parts[1].write_bytes(content)
    alone = parts[0].rename(parts[0].with_name("alone.gguf"))
    assert "one part of 3: download all parts" in refused(alone, CheckpointError)
    alone.rename(parts[0].with_name("model-00001-of-00002.gguf"))
    assert "one part of 3" in refused(parts[0].with_name("model-00001-of-00002.gguf"))


# --- refused ---


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        (
            {**PHI3, **LONGROPE},
            {"rope_factors_short.weight": np.ones(5, np.float32)},
            "must be F32",
        ),
        ({**PHI3, **LONGROPE}, {"rope_factors_long.weight": np.full(6, np.nan)}, "not finite"),
        ({**PHI3, **LONGROPE}, {"rope_factors_short.weight": np.zeros(6)}, "short_factor must be"),
    ],
    ids=["size", "nan", "zero"],
)
def test_factors_that_do_not_fit_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, tensors: dict, message: str
):
    raw = tiny_config(**changes)
    floats = {name: values.astype(np.float32) for name, values in tensors.items()}
    sound = gguf_families.factor_tensors(raw)
    monkeypatch.setattr(gguf_families, "factor_tensors", lambda raw: sound | floats)
    write_family(path, raw, tiny_weights(raw))
    assert message in refused(path, ConfigError)
