"""Divergence and sensitivity equal numpy's results on all logits at once, in bounded memory."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.checkpoint import shards
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.config import Quantization
from mlx_stream.errors import TextError, WeightsError
from mlx_stream.evaluate.divergence import compare
from mlx_stream.evaluate.sensitivity import measure_sensitivity
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.quantize.recipes import uniform_recipe
from mlx_stream.quantize.write_converted import write_converted
from tests.fakes.tiny import MISTRAL, tiny_config
from tests.fakes.tiny_models import all_logits, make, some_ids, tensors_of
from tests.long.big_checkpoint import write_big

IDS = some_ids(150)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = log_softmax(p), log_softmax(q)
    return (np.exp(p) * (p - q)).sum(-1)


def logits_of(model: Model) -> np.ndarray:
    return all_logits(model, model.new_cache(3, 40), IDS[:-1], 64)


def compared(one: Model, other: Model, chunk: int) -> dict:
    p, q = (TokenStream(model, model.new_cache(3, 40)) for model in (one, other))
    return compare(p, q, IDS, chunk)


@pytest.mark.parametrize("chunk", [1, 37, 128])
def test_divergence_is_what_the_logits_say(tiny_model, chunk: int) -> None:
    one, other = tiny_model(), tiny_model(seed=1)
    found = compared(one, other, chunk)
    p, q = logits_of(one), logits_of(other)
    rows = divergence(p, q)
    assert found["tokens"] == len(rows) == 149
    assert math.isclose(found["kl_mean"], rows.mean(), rel_tol=1e-4)
    assert math.isclose(found["kl_p99"], np.percentile(rows, 99), rel_tol=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).mean()
    assert math.isclose(found["top1_agreement"], same, abs_tol=1e-6)
    for logits, name in ((p, "source_perplexity"), (q, "perplexity")):
        losses = -log_softmax(logits)[np.arange(149), IDS[1:]]
        assert math.isclose(found[name], math.exp(losses.mean()), rel_tol=1e-4)
    itself = compared(one, tiny_model(), 64)
    assert (itself["kl_mean"], itself["kl_p99"], itself["top1_agreement"]) == (0, 0, 1)


def test_a_damaged_model_has_no_figures(tiny_model) -> None:
    broken = tiny_model()
    broken.network.norm.weight[0] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        compared(tiny_model(), broken, 64)


@pytest.mark.parametrize("changes", [MISTRAL, {"tie_word_embeddings": True}])
def test_sensitivity_is_what_rounding_one_part_does(changes: dict) -> None:
    raw = tiny_config(**changes)
    kind = Quantization(32, 2)
    found = measure_sensitivity(make(raw, tensors_of(raw)), IDS, kind)
    assert len(found) == 4 * raw["num_hidden_layers"]
    matrices = [f"{path}.weight" for part in found for path in part]
    assert sorted(matrices) == sorted(name for name in tensors_of(raw) if "_proj." in name)
    original = make(raw, tensors_of(raw))
    expected = all_logits(original, original.new_dense_cache(), IDS, 256)
    for part, harm in found.items():
        tensors = tensors_of(raw)
        for path in part:
            packed = mx.quantize(tensors[f"{path}.weight"], 32, 2)
            tensors[f"{path}.weight"] = mx.dequantize(*packed, 32, 2)
        model = make(raw, tensors)
        logits = all_logits(model, model.new_dense_cache(), IDS, 256)
        assert math.isclose(harm, divergence(expected, logits).mean(), rel_tol=1e-3), part
        assert harm > 1e-4


def test_a_measured_model_is_as_it_was() -> None:
    raw = tiny_config()
    model = make(raw, tensors_of(raw))
    before = all_logits(model, model.new_dense_cache(), IDS, 256)
    # Rows of 96 cannot be divided into groups of 64.
    found = measure_sensitivity(model, IDS, Quantization(64, 2))
    assert not any("down_proj" in path for part in found for path in part)
    assert np.array_equal(before, all_logits(model, model.new_dense_cache(), IDS, 256))
    with pytest.raises(TextError, match="has 127 tokens: at least 128 are needed"):
        measure_sensitivity(model, IDS[:127], Quantization(64, 2))


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.write_shards, "__defaults__", (10_000_000,))
    shape = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192}
    source = write_big(tmp_path / "source", **shape, num_attention_heads=8, num_key_value_heads=2)
    whole = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    for name, recipe, dtype in (
        ("four", uniform_recipe(4), None),
        ("two", uniform_recipe(2, 32), "float32"),
        ("again", uniform_recipe(3), None),
        ("full", None, "float32"),
    ):
        start = tmp_path / "four" if name in ("again", "full") else source
        result = write_converted(read_folder(start), tmp_path / name, recipe, dtype)
        assert result.peak_bytes <= result.bound_bytes, name
        assert result.bound_bytes < (0.6 if name == "full" else 0.35) * whole
        assert 0 <= result.resident_bytes < result.bound_bytes
