"""A model that also reads images is always loaded as the text model inside it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream import load
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.checkpoint.text_model import text_config
from mlx_stream.errors import ConfigError
from mlx_stream.hub.listing import is_supported
from mlx_stream.models.layout import layout_of
from mlx_stream.plan.inspect import summarize_model
from mlx_stream.program.notices import discard
from mlx_stream.quantize.recipes import uniform_recipe
from mlx_stream.quantize.write_converted import write_converted
from tests.fakes.tiny import MINISTRAL3, MISTRAL, tiny_config, tiny_weights, write_tiny
from tests.fakes.tiny_models import all_logits, some_ids
from tests.models.test_weights import FOUR_BITS, quantize

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
SPELLINGS = {
    "older": ("language_model.model.", "language_model.lm_head.", ""),
    "newer": ("model.language_model.", "lm_head.", "model."),
}


def wrap(folder: Path, spelling: str) -> Path:
    """Put a folder's model inside a Mistral 3 that has an image part."""
    inner, head, other = SPELLINGS[spelling]
    raw = json.loads((folder / "config.json").read_text())
    outer: dict[str, Any] = {"model_type": "mistral3", "vision_config": {"model_type": "pixtral"}}
    if quantization := raw.pop("quantization", None):
        named = {renamed(path, inner, head): entry for path, entry in quantization.items()}
        outer["quantization"] = named
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": raw}))
    tensors: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore
    mx.eval(tensors)
    found = {renamed(name, inner, head): tensor for name, tensor in tensors.items()}
    found[f"{other}vision_tower.ln_pre.weight"] = mx.ones(4)
    found[f"{other}multi_modal_projector.linear_1.weight"] = mx.ones((4, 4))
    mx.save_safetensors(str(folder / "model.safetensors"), found)
    return folder


def renamed(name: str, inner: str, head: str) -> str:
    if name.startswith("model."):
        return inner + name.removeprefix("model.")
    return head + name.removeprefix("lm_head.") if name.startswith("lm_head") else name


def logits(folder: Path) -> np.ndarray:
    model = load(folder, dtype="float32", keep_quantized=False)
    return all_logits(model, model.new_cache(4, 60), some_ids(90), 37)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", [MISTRAL, MINISTRAL3], ids=["mistral", "ministral3"])
def test_the_text_model_is_what_it_is_alone(tmp_path, family, spelling):
    config = tiny_config(**SHAPE, **family)
    alone, wrapped = (
        write_tiny(tmp_path / name, config, tiny_weights(config)) for name in ("alone", "wrapped")
    )
    notices: list[str] = []
    wrap(wrapped, spelling)
    model = load(wrapped, dtype="float32", notify=notices.append)
    assert len(notices) == 1 and "only text is read" in notices[0]
    assert model.config == load(alone, dtype="float32").config
    np.testing.assert_array_equal(logits(wrapped), logits(alone))
    assert is_supported(wrapped)
    summaries = [summarize_model(str(path), discard) for path in (wrapped, alone)]
    assert replace(summaries[0], name="") == replace(summaries[1], name="")
    out = tmp_path / "converted"
    write_converted(read_folder(wrapped), out, uniform_recipe(4))
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == config["model_type"] and "text_config" not in written
    assert load(out, dtype="float32").config.quantization


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_quantization_stands_outside_with_the_wrapper_s_names(tmp_path, spelling):
    config, tensors, _ = quantize(tiny_config(**SHAPE, **MISTRAL), FOUR_BITS)
    folder = write_tiny(tmp_path / "quantized", config, tiny_weights(tiny_config(**SHAPE)))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    expected = logits(folder)
    paths = [part.path for part in layout_of(load(folder).config).matrices]
    wrap(folder, spelling)
    np.testing.assert_array_equal(logits(folder), expected)
    assert all(load(folder).config.quantized(path) for path in paths)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}, "mistral4"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "'llama' inside"),
        ({"text_config": {}}, "None"),
    ],
)
def test_another_model_inside_is_named(tmp_path, raw, named):
    folder = write_tiny(tmp_path / "m", tiny_config(), tiny_weights(tiny_config()))
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=named):
        load(folder)
    assert not is_supported(folder)


def test_a_config_without_a_wrapper_stays_as_it_is():
    assert text_config(tiny_config()) == tiny_config()
