"""A model's fingerprint: fixed forever in each version, and different for any two models."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.config import ModelConfig, Quantization
from mlx_stream.generate.model import Model
from mlx_stream.models.fingerprint import fingerprint
from mlx_stream.rope import RopeConfig
from tests.fakes.tiny import LLAMA3, YARN, tiny_config
from tests.fakes.tiny_models import Tensors, make, tensors_of
from tests.models.test_weights import QUANTIZABLE, RECIPES, quantize

Make = Callable[..., Model]


def fixed_tensors(raw: dict) -> Tensors:
    """Return tensors of fixed numbers, independent of random generators and exact in bfloat16."""
    found = {}
    for place, (name, tensor) in enumerate(sorted(tensors_of(raw).items())):
        numbers = (np.arange(tensor.size) * 37 + 11 * place) % 101 - 50
        found[name] = mx.array((numbers / 64).astype(np.float32).reshape(tensor.shape))
    return found


YARN_AND_BIASES = {"rope_scaling": YARN, "attention_bias": True}
LLAMA3_AND_TIED = {"rope_scaling": LLAMA3, "tie_word_embeddings": True}
MISTRAL_WITH_WINDOW = {"model_type": "mistral", "sliding_window": 100}
# Those of version 1 come from the code that wrote its files, those of version 2 from the code that
# introduced it.
FIXED: list[tuple[dict[str, Any], mx.Dtype, str, str]] = [
    ({}, mx.float32, "c926d5a332c852fa", "07b1115ae8122211"),
    ({}, mx.bfloat16, "d0e1a86d14e7d55f", "c53ab79a2df619d3"),
    (YARN_AND_BIASES, mx.float32, "579d8436ab19ae06", "8faec03e1fb1eef3"),
    (LLAMA3_AND_TIED, mx.float16, "f44692a2fa7c8818", "f69b28c328c4faab"),
    (MISTRAL_WITH_WINDOW, mx.float32, "a3443533beafe872", "60a60a1b9a135a12"),
]


@pytest.mark.parametrize(("changes", "dtype", "first", "second"), FIXED)
def test_fingerprints_stay_what_they_were(changes, dtype, first, second):
    raw = tiny_config(**changes)
    model = make(raw, fixed_tensors(raw), dtype)
    assert model.fingerprint(1) == first
    assert model.fingerprint() == model.fingerprint(2) == f"2:{second}"
    assert model.is_fingerprint(first) and model.is_fingerprint(f"2:{second}")


def test_a_models_fingerprint_is_of_either_version_and_of_no_other_model(tiny_model: Make):
    model, other = tiny_model(), tiny_model(seed=1)
    for version in (1, 2):
        assert model.fingerprint(version) == tiny_model().fingerprint(version)
        assert model.is_fingerprint(model.fingerprint(version))
        assert not model.is_fingerprint(other.fingerprint(version))
    assert len(model.fingerprint(1)) == 16 and len(model.fingerprint(2)) == 18
    second = model.fingerprint()
    for text in ("", "2:", second[2:], "1:" + model.fingerprint(1), "3" + second[1:]):
        assert not model.is_fingerprint(text)


OTHERWISE: dict[str, Any] = {
    "model_type": "mistral",
    "rope_type": "linear",
    "rope": RopeConfig(rope_theta=20_000.0),
    "sliding_window": 99,
    "unrotated_layers": (1,),
    "short_factor": (1.5,),
    "position_limit": 99,
    "quantization": {"": Quantization(32, 4, "affine")},
}
BOUNDS = {"max_position_embeddings", "sliding_window", "position_limit"}
NOT_COMPUTED = BOUNDS | {"quantization", "vocab_size"}


def otherwise(settings: Any, name: str) -> Any:
    """Return settings that differ only in the one named."""
    value = getattr(settings, name)
    changed = OTHERWISE.get(name, not value if isinstance(value, bool) else value)
    return replace(settings, **{name: 2 * value if changed is value else changed})


def test_what_changes_the_computation_changes_the_fingerprint_and_nothing_else_does(
    tiny_model: Make,
):
    model = tiny_model()

    def of(config: ModelConfig, dtype: mx.Dtype = mx.float32, kept: bool = False) -> str:
        return fingerprint(config, model.network, dtype, kept)

    config, same = model.config, of(model.config)
    assert same == model.fingerprint()
    for field in fields(ModelConfig):
        changed = of(otherwise(config, field.name))
        assert (changed == same) == (field.name in NOT_COMPUTED), field.name
    for field in fields(RopeConfig):
        assert of(replace(config, rope=otherwise(config.rope, field.name))) != same, field.name
    assert of(config, mx.bfloat16) != same and of(config, kept=True) != same


@dataclass(frozen=True)
class LaterConfig(ModelConfig):
    """The settings of a future version."""

    alibi: bool = False


def test_a_setting_that_is_new_leaves_models_without_it_what_they_were(tiny_model: Make):
    model = tiny_model()
    later = LaterConfig(**vars(model.config))

    def of(config: ModelConfig) -> str:
        return fingerprint(config, model.network, mx.float32, False)

    assert of(later) == model.fingerprint()
    assert of(replace(later, alibi=True)) != model.fingerprint()


def test_the_order_of_tensors_does_not_matter_their_names_and_values_do(tiny_model: Make):
    model = tiny_model()
    named, expected = [*model.network.named_tensors()], model.fingerprint()

    def of(tensors: list[tuple[str, mx.array]]) -> str:
        model.network.named_tensors = lambda: iter(tensors)
        return fingerprint(model.config, model.network, mx.float32, False)

    assert of(named[::-1]) == expected
    for place, (name, tensor) in enumerate(named):
        for other in ((f"{name}s", tensor), (name, tensor * 1.0001), (name, tensor[:-1])):
            assert of([*named[:place], other, *named[place + 1 :]]) != expected, name
    assert of(named[1:]) != expected


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tensors_have_the_names_and_values_of_the_checkpoint(recipe, tied):
    raw = tiny_config(**QUANTIZABLE, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    config, tensors = raw, tensors_of(raw)
    if recipe:
        config, tensors, _ = quantize(raw, RECIPES[recipe])
    expected = dict(tensors)
    named = dict(make(config, tensors, keep_quantized=True).network.named_tensors())
    assert named.keys() == expected.keys()
    for name, tensor in expected.items():
        assert named[name].dtype == tensor.dtype and mx.array_equal(named[name], tensor), name
