"""Models that other tools quantized: converted without loss, refused where they cannot be run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils

from mlx_stream.checkpoint import other_quantizers
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.checkpoint.other_quantizers import in_mlx_bits
from mlx_stream.errors import ConfigError, MlxStreamError, ValueRefused
from mlx_stream.load import load
from mlx_stream.plan.inspect import summarize_model
from mlx_stream.program.notices import discard
from mlx_stream.quantize.convert import ConvertOptions, convert_model
from mlx_stream.quantize.recipes import uniform_recipe
from tests.checkpoint.test_text_model import wrap
from tests.fakes.other_quantizers import awq, fp8, gptq, write_quantized
from tests.fakes.tiny import QWEN2, tiny_config
from tests.fakes.tiny_models import all_logits, make, some_ids

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Any]]] = {
    "awq": (AWQ, partial(awq, group=64)),
    "awq of large groups": ({**AWQ, "group_size": 128}, partial(awq, group=128)),
    "gptq": (GPTQ, partial(gptq, group=64)),
    "gptq of one group a row": ({**GPTQ, "group_size": -1}, lambda w: gptq(w, w.shape[1])),
    "gptq of 8 bits": ({**GPTQ, "bits": 8}, partial(gptq, group=64, bits=8)),
    "gptq of 2 bits": ({**GPTQ, "bits": 2}, partial(gptq, group=64, bits=2)),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, partial(gptq, group=64, less=0)),
    "gptq with biases of zero": (GPTQ, lambda w: with_bias(*gptq(w, 64))),
    "gptq with zeros of 0": (
        GPTQ,
        lambda w: gptq(np.where(np.arange(len(w[0])) < 64, abs(w), w), 64),
    ),
    "fp8 per tensor": (FP8, partial(fp8, block=None)),
    "fp8 per block": ({**FP8, "weight_block_size": [48, 80]}, partial(fp8, block=(48, 80))),
}
IDS = some_ids(50)


def with_bias(tensors: dict[str, np.ndarray], values: np.ndarray) -> Any:
    return {**tensors, "bias": np.zeros(len(values), np.float16)}, values


def logits(path: Path, dtype: str = "float32", keep: bool = False) -> np.ndarray:
    model = load(path, dtype, keep_quantized=keep)
    return all_logits(model, model.new_cache(4, 60), IDS, 20)


def reference(weights: dict[str, np.ndarray], changes: dict[str, Any]) -> np.ndarray:
    model = make(tiny_config(**changes), {name: mx.array(w) for name, w in weights.items()})
    return all_logits(model, model.new_cache(4, 60), IDS, 20)


@pytest.mark.parametrize("changes", [SHAPE, SHAPE | QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_converted_model_has_the_logits_of_its_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
):
    monkeypatch.setattr(other_quantizers, "CHUNK", 9_000)  # several parts of each matrix
    entry, quantize = FORMATS[name]
    folder, out = tmp_path / "model", tmp_path / "out"
    expected = reference(write_quantized(folder, entry, changes, quantize), changes)
    convert_model(str(folder), out / "floats", ConvertOptions(dtype="float32"))
    np.testing.assert_allclose(logits(out / "floats"), expected, atol=1e-5)
    # As is: codes unchanged, with scales in the model's own type.
    result = convert_model(str(folder), out / "same", ConvertOptions())
    assert result.peak_bytes <= result.bound_bytes
    for keep in (False, True):
        np.testing.assert_allclose(logits(out / "same", keep=keep), expected, atol=1e-3)
    config = read_folder(out / "same").config
    assert config.get("quantization", {}).get("bits") == (entry.get("bits"))
    convert_model(str(folder), out / "six", ConvertOptions(uniform_recipe(6)))
    assert read_folder(out / "six").config["quantization"]["bits"] == 6


def test_awq_is_read_as_mlx_lm_reads_it(tmp_path: Path):
    write_quantized(tmp_path, AWQ, SHAPE, FORMATS["awq"][1])
    checkpoint = read_folder(tmp_path)
    theirs, entry = mlx_lm_utils._transform_awq_weights(dict(checkpoint.tensors), AWQ)
    ours = in_mlx_bits(checkpoint, mx.float16)
    assert {**entry, "mode": "affine"} == ours.config["quantization"]
    assert theirs.keys() == ours.tensors.keys()
    for name, tensor in theirs.items():
        assert mx.array_equal(ours.tensors[name].astype(tensor.dtype), tensor), name


def test_a_model_inside_one_that_reads_images_is_converted(tmp_path: Path):
    changes = SHAPE | {"model_type": "mistral"}
    weights = write_quantized(tmp_path / "inside", FP8, changes, FORMATS["fp8 per tensor"][1])
    wrap(tmp_path / "inside", "older")
    convert_model(str(tmp_path / "inside"), tmp_path / "out", ConvertOptions(dtype="float32"))
    np.testing.assert_allclose(logits(tmp_path / "out"), reference(weights, changes), atol=1e-5)


# --- refused ---


@pytest.mark.parametrize("name", ["awq", "gptq", "fp8 per block"])
def test_only_convert_reads_them(tmp_path: Path, name: str):
    entry, quantize = FORMATS[name]
    write_quantized(tmp_path / "model", entry, SHAPE, quantize)
    with pytest.raises(ConfigError, match="run mlx_stream convert MODEL FOLDER, then use FOLDER"):
        load(tmp_path / "model")
    with pytest.raises(ConfigError, match="run mlx_stream convert MODEL FOLDER, then use FOLDER"):
        summarize_model(str(tmp_path / "model"), discard)
    options = ConvertOptions(report=("text", "the " * 999))
    with pytest.raises(ValueRefused, match="convert it without them first"):
        convert_model(str(tmp_path / "model"), tmp_path / "out", options)


def change(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = change(tensors[name])

    return apply


def without(name: str) -> Callable[..., None]:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        del tensors[name]

    return apply


def unchanged(tensors: dict[str, np.ndarray]) -> None:
    pass


WRONG: list[tuple[str, dict[str, Any], Callable[..., None], str]] = [
    ("gptq", {}, change("g_idx", lambda x: x[::-1]), "reordered inputs (act-order"),
    ("gptq", {}, change("g_idx", lambda x: x[:-1]), "reordered inputs (act-order"),
    ("gptq", {}, without("qzeros"), "qzeros' is missing"),
    ("awq", {}, without("scales"), "scales' is missing"),
    ("awq", {}, change("scales", lambda x: x[:-1]), "scales' has shape"),
    ("gptq", {}, change("qzeros", lambda x: x[:, :-1]), "qzeros' has shape"),
    ("gptq", {}, change("qweight", lambda x: x.view(np.float32)), "qweight' is mlx.core.float32"),
    ("gptq", {}, change("qweight", lambda x: x.reshape(-1)), "qweight' is mlx.core.int32 of shape"),
    ("gptq", {}, lambda t: t.update(perm=t["g_idx"]), "unknown tensor"),
    ("gptq", {"bits": 3}, unchanged, "gptq with 3 bits in format 'None' is not supported"),
    ("gptq", {"checkpoint_format": "marlin"}, unchanged, "in format 'marlin'"),
    ("awq", {"version": "gemv"}, unchanged, "in format 'gemv'"),
    ("awq", {"group_size": 48}, unchanged, "group_size 48 is not supported"),
    ("awq", {"group_size": "x"}, unchanged, "group_size must be a whole number"),
    ("fp8 per block", {}, without("weight"), "weight' is missing"),
    ("fp8 per block", {}, change("weight_scale_inv", lambda x: x[:, :-1]), "expected floats of sh"),
    ("fp8 per block", {"weight_block_size": [0, 4]}, unchanged, "weight_block_size must be an ar"),
    ("fp8 per block", {"weight_block_size": 4}, unchanged, "weight_block_size must be an array"),
    ("fp8 per block", {"quant_method": "bitsandbytes"}, unchanged, "'bitsandbytes' is not suppor"),
]


@pytest.mark.parametrize(
    ("name", "entry", "change", "message"), WRONG, ids=lambda x: "" if callable(x) else str(x)[:40]
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, name: str, entry: dict[str, Any], change: Callable[..., None], message: str
):
    sound, quantize = FORMATS[name]

    def damaged(weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        tensors, values = quantize(weight)
        change(tensors)
        return tensors, values

    write_quantized(tmp_path / "model", sound | entry, SHAPE, damaged)
    with pytest.raises(MlxStreamError) as caught:
        convert_model(str(tmp_path / "model"), tmp_path / "out" / "o", ConvertOptions())
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
