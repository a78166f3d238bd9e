"""A converted model is mlx-lm's: its layout, its bits, its logits; the same bytes each time."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from mlx_stream.checkpoint import shards
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.config import Quantization, read_config
from mlx_stream.errors import ValueRefused, WeightsError
from mlx_stream.evaluate.mlx_lm import load_peer
from mlx_stream.load import load
from mlx_stream.quantize.convert import ConvertOptions, convert_model
from mlx_stream.quantize.recipes import Recipe, recipe_named, uniform_recipe
from mlx_stream.quantize.write_converted import ConversionResult, write_converted
from tests.fakes.gguf_families import WIDE, write_family
from tests.fakes.gguf_files import write_tiny as write_gguf
from tests.fakes.shell import edit
from tests.fakes.tiny import (
    LLAMA3,
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

# Rows of 128 and 256: every group size divides them.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3},
    "tied": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rope_parameters": {**YARN, "rope_theta": 5e5},
    },
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
}
IDS = some_ids(90)


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(**SHAPE, **FAMILIES[request.param])
    folder = tmp_path_factory.mktemp("convert") / request.param
    return write_tiny(folder, config, tiny_weights(config), "bfloat16", shards=3)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = tiny_config(**SHAPE)
    return write_tiny(tmp_path / "llama", config, tiny_weights(config), "bfloat16", shards=2)


def converted(
    source: Path, out: Path, recipe: Recipe | None = None, **options: Any
) -> ConversionResult:
    return write_converted(read_folder(source), out, recipe, **options)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(folder: Path, keep: bool) -> np.ndarray:
    model = load(folder, "float32", keep_quantized=keep)
    return all_logits(model, model.new_dense_cache(), IDS, 64)


def peer_logits(folder: Path, keep: bool) -> np.ndarray:
    """Return mlx-lm's logits in float32, with scales in float32 or weights dequantized."""
    peer = load_peer(folder, load(folder, "float32", keep_quantized=keep))
    return np.array(peer(mx.array([IDS]))[0])


ALIKE = [uniform_recipe(bits) for bits in (2, 3, 4, 5, 6, 8)]
ALIKE += [recipe_named(name) for name in ("mxfp4", "mxfp8", "nvfp4")]
GROUPS = [uniform_recipe(4, 32), uniform_recipe(3, 128), recipe_named("mixed_3_6", 32)]


@pytest.mark.parametrize("recipe", [*ALIKE, *GROUPS, None], ids=lambda r: r.name if r else "copy")
def test_mlx_lm_gives_the_same_logits(source: Path, tmp_path: Path, recipe: Recipe | None) -> None:
    converted(source, tmp_path / "out", recipe)
    for keep in (False, True):
        ours, theirs = (of(tmp_path / "out", keep) for of in (logits, peer_logits))
        assert np.abs(ours - theirs).max() < 1e-3
    if recipe is None:
        assert np.array_equal(logits(source, False), logits(tmp_path / "out", False))
    elif recipe.base.bits == 8 and recipe.base.mode == "affine":
        error = logits(source, False) - logits(tmp_path / "out", False)
        assert 0 < np.abs(error).max() < 0.5


@pytest.mark.parametrize("recipe", [*ALIKE, *GROUPS], ids=lambda recipe: recipe.name)
def test_every_bit_is_as_mlx_lm_quantizes(llama: Path, tmp_path: Path, recipe: Recipe) -> None:
    converted(llama, tmp_path / "out", recipe)
    peer, config = load_model(llama)
    base = recipe.base

    def predicate(path: str, _: Any) -> dict[str, Any]:
        kind = recipe.quantized(path, 2)
        return {"group_size": kind.group_size, "bits": kind.bits, "mode": kind.mode}

    peer, config = quantize_model(
        peer, config, base.group_size, base.bits, mode=base.mode, quant_predicate=predicate
    )
    expected = dict(tree_flatten(peer.parameters()))
    found = read_folder(tmp_path / "out").tensors
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype and mx.array_equal(array, found[name]).item(), name
    written = read_json(tmp_path / "out" / "config.json")
    assert written["quantization"] == written["quantization_config"]
    ours, theirs = (
        read_config({**written, "quantization": said["quantization"]}) for said in (written, config)
    )
    for name in (name for name in expected if name.endswith(".scales")):
        path = name.removesuffix(".scales")
        assert ours.quantized(path) == theirs.quantized(path) == recipe.quantized(path, 2)


def test_the_layout_is_mlx_lms(llama: Path, tmp_path: Path) -> None:
    result = converted(llama, tmp_path / "out", uniform_recipe(4))
    names = {"config.json", "conversion.json", "generation_config.json", "model.safetensors"}
    names |= {"model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
    assert files_of(tmp_path / "out").keys() == names
    before, after = read_folder(llama), read_folder(tmp_path / "out")
    assert before.tokenizer == after.tokenizer
    assert before.tokenizer_config == after.tokenizer_config
    assert before.generation_config == after.generation_config
    size = sum(array.nbytes for array in after.tensors.values())
    assert result.about["tensor_bytes"] == size
    # 4 bits, and two 16-bit numbers for each group of 64; norms are few.
    assert 4.5 < result.about["bits_per_weight"] < 4.6
    table = sum(a.nbytes for name, a in after.tensors.items() if "embed_tokens" in name)
    assert result.about["bytes_per_token"] == size - table + table // 300


def test_shards_are_as_large_as_they_may_be(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.write_shards, "__defaults__", (70_000,))
    result = converted(source, tmp_path / "out")
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    tensors = read_folder(tmp_path / "out").tensors
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    sizes: dict[str, list[int]] = {}
    for name, shard in index["weight_map"].items():
        sizes.setdefault(shard, []).append(tensors[name].nbytes)
    count = len(sizes)
    assert result.files == count > 4
    assert sorted(sizes) == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert all(sum(found) <= 70_000 or len(found) == 1 for found in sizes.values())
    ordered = [sum(found) for _, found in sorted(sizes.items())]
    assert all(a + b > 70_000 for a, b in itertools.pairwise(ordered))


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q8_0"])
def test_a_gguf_is_copied_without_loss(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kind)
    result = write_converted(read_gguf(path), tmp_path / "out")
    assert result.peak_bytes <= result.bound_bytes
    before, after = read_gguf(path).tensors, read_folder(tmp_path / "out").tensors
    assert before.keys() == after.keys()
    assert all(mx.array_equal(after[name], before[name]).item() for name in before)


def test_a_gguf_with_types_that_mlx_lacks_becomes_8_bits(tmp_path: Path) -> None:
    path, raw = tmp_path / "tiny.gguf", tiny_config(**WIDE)
    kinds = {"lm_head.weight": "Q6_K", "model.layers.1.mlp.down_proj.weight": "Q3_K"}
    write_family(path, raw, tiny_weights(raw), "Q4_K", kinds)
    notices: list[str] = []
    convert_model(str(path), tmp_path / "out", ConvertOptions(), notices.append)
    numbers = 300 * 256 + 256 * 256
    assert notices == [
        "2 matrices of a type MLX does not support (Q3_K, Q6_K) become 8 bits in groups of 32: "
        f"{numbers * (1 + 4 / 32) / 1e6:.1f} MB"
    ]
    found, before = read_folder(tmp_path / "out"), read_gguf(path)
    entry = found.config["quantization"]
    assert entry["model.layers.1.mlp.down_proj"] == entry["lm_head"] == asdict(Quantization(32, 8))
    name = "model.layers.0.mlp.up_proj"
    assert mx.array_equal(found.tensors[f"{name}.weight"], before.tensors[f"{name}.weight"])
    assert before.tensors[f"{name}.scales"].dtype == mx.float32
    for kind in ("scales", "biases"):  # rounded to the file's type, with which mlx-lm computes
        narrow = before.tensors[f"{name}.{kind}"].astype(mx.float16)
        assert mx.array_equal(found.tensors[f"{name}.{kind}"], narrow)
    error = logits(tmp_path / "out", False) - logits(path, False)
    assert np.abs(error).max() < 0.1
    np.testing.assert_allclose(
        peer_logits(tmp_path / "out", True), logits(tmp_path / "out", True), atol=1e-3
    )
    # With a dtype, everything becomes floats, and nothing is rounded.
    convert_model(str(path), tmp_path / "floats", ConvertOptions(dtype="float32"))
    np.testing.assert_allclose(logits(tmp_path / "floats", False), logits(path, False), atol=1e-5)


def test_a_matrix_already_stored_as_asked_for_is_copied(llama: Path, tmp_path: Path) -> None:
    converted(llama, tmp_path / "four", uniform_recipe(4))
    converted(tmp_path / "four", tmp_path / "again", uniform_recipe(4))
    assert (
        files_of(tmp_path / "four")["model.safetensors"]
        == (files_of(tmp_path / "again")["model.safetensors"])
    )
    converted(tmp_path / "four", tmp_path / "wider", uniform_recipe(8, 32))
    error = logits(tmp_path / "wider", False) - logits(tmp_path / "four", False)
    assert 0 < np.abs(error).max() < 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dtype_alone_applies_to_everything(llama: Path, tmp_path: Path, dtype: str) -> None:
    converted(llama, tmp_path / "four", uniform_recipe(4))
    converted(tmp_path / "four", tmp_path / "out", dtype=dtype)
    found = read_folder(tmp_path / "out")
    assert {str(array.dtype) for array in found.tensors.values()} == {f"mlx.core.{dtype}"}
    assert found.config["torch_dtype"] == dtype and "quantization" not in found.config
    error = np.abs(logits(tmp_path / "out", False) - logits(tmp_path / "four", False)).max()
    assert error < {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.5}[dtype]


def test_a_dtype_with_bits_applies_to_scales_and_norms(llama: Path, tmp_path: Path) -> None:
    converted(llama, tmp_path / "out", uniform_recipe(4), dtype="float16")
    tensors = read_folder(tmp_path / "out").tensors
    assert {str(array.dtype) for name, array in tensors.items() if "weight" not in name} == {
        "mlx.core.float16"
    }
    assert tensors["model.norm.weight"].dtype == mx.float16


def test_matrices_that_groups_do_not_divide_stay_floats(tmp_path: Path) -> None:
    config = tiny_config()  # rows of 64 and 96
    source = write_tiny(tmp_path / "model", config, tiny_weights(config), "bfloat16")
    result = converted(source, tmp_path / "out", uniform_recipe(4))
    assert result.unquantized == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    ours, theirs = (of(tmp_path / "out", True) for of in (logits, peer_logits))
    assert np.abs(ours - theirs).max() < 1e-3
    with pytest.raises(ValueRefused, match="divided into groups of 128"):
        converted(source, tmp_path / "other", uniform_recipe(4, 128))


def test_leftovers_of_old_exports_are_left_out(llama: Path, tmp_path: Path) -> None:
    checkpoint = read_folder(llama)
    assert isinstance(checkpoint.tensors, dict)
    checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(16)
    write_converted(checkpoint, tmp_path / "out", uniform_recipe(4))
    assert not any("inv_freq" in name for name in read_folder(tmp_path / "out").tensors)
    checkpoint = read_folder(llama)
    assert isinstance(checkpoint.tensors, dict)
    checkpoint.tensors["model.vision.weight"] = mx.zeros(16)
    with pytest.raises(WeightsError, match=r"unknown tensor 'model\.vision\.weight'"):
        write_converted(checkpoint, tmp_path / "other", uniform_recipe(4))


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (np.nan, "bfloat16")])
def test_values_that_do_not_fit_are_refused(tmp_path: Path, value: float, dtype: str) -> None:
    config = tiny_config(**SHAPE)
    weights = tiny_weights(config)
    weights["model.layers.1.mlp.up_proj.weight"][7, 9] = value
    source = write_tiny(tmp_path / "model", config, weights, "bfloat16")
    for recipe in (uniform_recipe(4), None):
        with pytest.raises(WeightsError, match=rf"layers\.1\.mlp\.up_proj.*fit {dtype}"):
            converted(source, tmp_path / "out", recipe, dtype=dtype)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_paths_and_code_of_the_maker_are_left_out(llama: Path, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        edit(
            llama / file,
            _name_or_path=str(llama),
            name_or_path="/somewhere/else",
            auto_map={"A": "b.C"},
        )
    converted(llama, tmp_path / "out", uniform_recipe(4))
    for data in files_of(tmp_path / "out").values():
        assert b"name_or_path" not in data and b"auto_map" not in data
