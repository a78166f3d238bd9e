"""Recipes give each matrix its bits: mlx-lm's by a rule, measured ones where more bits help."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from mlx_stream.config import QUANTIZATION_MODES, Quantization
from mlx_stream.models.layout import matrix_bytes
from mlx_stream.quantize.recipes import ENDS, RECIPES, allocate_bits, recipe_named, uniform_recipe

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def paths_of(layers: int) -> list[str]:
    return [*ENDS, *(f"model.layers.{i}.{part}" for i in range(layers) for part in PARTS)]


@pytest.mark.parametrize("name", QUANT_RECIPES)
@pytest.mark.parametrize("layers", [1, 2, 7, 8, 16, 30, 32, 80])
def test_mixed_recipes_are_mlx_lms(name: str, layers: int) -> None:
    paths = paths_of(layers)
    model = SimpleNamespace(
        named_modules=lambda: [(path, None) for path in paths], layers=[None] * layers
    )
    theirs = mixed_quant_predicate_builder(name, model, 64)  # type: ignore[arg-type]
    ours = recipe_named(name)
    for path in paths:
        kind = ours.quantized(path, layers)
        expected = theirs(path, None)  # type: ignore[call-arg,arg-type]
        assert expected == {"group_size": kind.group_size, "bits": kind.bits, "mode": kind.mode}


def test_every_recipe_has_its_own_name_and_what_mlx_takes() -> None:
    for name, recipe in RECIPES.items():
        assert recipe_named(name) is recipe and recipe.name == name
        for path in paths_of(4):
            kind = recipe.quantized(path, 4)
            all_bits, groups = QUANTIZATION_MODES[kind.mode]
            assert kind.bits in all_bits and kind.group_size in groups
    assert recipe_named("mixed_4_6", 32).quantized("lm_head", 2) == Quantization(32, 6)


def total(recipe, elements: dict[str, int], layers: int) -> int:
    return sum(matrix_bytes(n, recipe.quantized(path, layers), 2) for path, n in elements.items())


@given(
    name=st.sampled_from([name for name in RECIPES if name.startswith("sensitive")]),
    harm=st.lists(st.floats(-1e-3, 10), min_size=12, max_size=12),
    sizes=st.lists(st.integers(1, 64), min_size=12, max_size=12),
)
def test_a_measured_recipe_costs_no_more_than_a_bit_more(name, harm, sizes) -> None:
    parts = [(f"model.layers.{i}.mlp.up_proj",) for i in range(12)]
    elements = {path: 1024 * n for (path,), n in zip(parts, sizes, strict=True)}
    recipe = allocate_bits(recipe_named(name), elements, dict(zip(parts, harm, strict=True)))
    assert recipe.chosen is not None
    assert total(recipe, elements, 12) <= total(uniform_recipe(recipe.base.bits + 1), elements, 12)
    for (path,), value in zip(parts, harm, strict=True):
        assert value > 0 or path not in recipe.chosen
    # What was left out would not fit, or helps less per byte than everything that was taken.
    assert recipe.high is not None
    ratio = {p: h / elements[p] for (p,), h in zip(parts, harm, strict=True)}
    best = max(ratio, key=lambda path: ratio[path])
    fits = elements[best] * (recipe.high.bits - recipe.base.bits) <= sum(elements.values())
    assert best in recipe.chosen or not fits or ratio[best] <= 0


def test_embedding_and_head_come_first() -> None:
    recipe = recipe_named("sensitive_4_6")
    elements = {"model.embed_tokens": 64_000, "model.layers.0.mlp.up_proj": 6400}
    harm = {("model.layers.0.mlp.up_proj",): 1.0}
    # Two more bits for the embedding cost more than one more bit for everything: nothing is left.
    settled = allocate_bits(recipe, elements, harm)
    assert settled.chosen == frozenset()
    assert settled.quantized("model.embed_tokens", 1).bits == 6
    assert settled.quantized("model.layers.0.mlp.up_proj", 1).bits == 4
    elements["model.embed_tokens"] = 640
    assert (
        allocate_bits(recipe, elements, harm).chosen == frozenset()
    )  # 12,800 bits, 7,040 - 1,280 left
    elements["model.layers.0.mlp.down_proj"] = 64_000
    assert allocate_bits(recipe, elements, harm).chosen == {"model.layers.0.mlp.up_proj"}
