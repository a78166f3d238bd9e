"""Recipes: how many bits each of a model's matrices gets; handles module paths, not arrays."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mlx_stream.config import QUANTIZATION_MODES, Quantization
from mlx_stream.errors import ValueRefused
from mlx_stream.models.layout import matrix_bytes

DEFAULT_GROUP = 64
# Every token passes through these, and no other matrix can make up for their errors.
ENDS = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Recipe:
    """How each matrix is quantized.

    Attributes:
        name: the name on the command line.
        base: how to quantize the matrices that the rule does not choose.
        high: how to quantize those it chooses; None if all are treated alike.
        rule: `mlx-lm` chooses layers by position, as its mixed recipes do. `sensitive` chooses
            the embedding, the head, and the paths in `chosen`.
        chosen: the paths found by measuring (see `allocate_bits`); None before that.
    """

    name: str
    base: Quantization
    high: Quantization | None = None
    rule: Literal["uniform", "mlx-lm", "sensitive"] = "uniform"
    chosen: frozenset[str] | None = None

    def quantized(self, path: str, layers: int) -> Quantization:
        """Return how the matrix of module `path` is quantized in a model with this many layers."""
        if self.high is None:
            return self.base
        if self.rule == "mlx-lm":
            return self.high if mlx_lm_gives_more(path, layers) else self.base
        return self.high if path in ENDS or path in (self.chosen or ()) else self.base


def mlx_lm_gives_more(path: str, layers: int) -> bool:
    """Return whether mlx-lm's `mixed_quant_predicate_builder` gives a path more bits.

    It does for an untied head, and for v_proj and down_proj in the first and last eighth of the
    layers and in every third layer in between.
    """
    if path == "lm_head":
        return True
    if not path.endswith(("v_proj", "down_proj")):
        return False
    layer, eighth = int(path.split(".")[2]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def uniform_recipe(bits: int, group_size: int = DEFAULT_GROUP, mode: str = "affine") -> Recipe:
    """Return the recipe that gives every matrix the same number of bits.

    Raises:
        ValueRefused: MLX does not support this combination.
    """
    name = f"uniform_{bits}" if mode == "affine" else mode
    return Recipe(name, check_quantization(bits, group_size, mode))


def check_quantization(bits: int, group_size: int, mode: str) -> Quantization:
    if mode not in QUANTIZATION_MODES:
        raise ValueRefused(f"--mode must be one of {', '.join(QUANTIZATION_MODES)}, not {mode!r}")
    all_bits, groups = QUANTIZATION_MODES[mode]
    if bits not in all_bits:
        raise ValueRefused(f"--bits must be {one_of(all_bits)} in mode {mode}, not {bits}")
    if group_size not in groups:
        raise ValueRefused(
            f"--group-size must be {one_of(groups)} in mode {mode}, not {group_size}"
        )
    return Quantization(group_size, bits, mode)


def one_of(numbers: Collection[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def mixed_recipe(kind: Literal["mlx-lm", "sensitive"], low: int, high: int) -> Recipe:
    name = f"{'mixed' if kind == 'mlx-lm' else kind}_{low}_{high}"
    base, more = (Quantization(DEFAULT_GROUP, bits) for bits in (low, high))
    return Recipe(name, base, more, kind)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        *(uniform_recipe(bits) for bits in QUANTIZATION_MODES["affine"][0]),
        *(
            uniform_recipe(QUANTIZATION_MODES[mode][0][0], QUANTIZATION_MODES[mode][1][0], mode)
            for mode in ("mxfp4", "mxfp8", "nvfp4")
        ),
        *(mixed_recipe("mlx-lm", low, high) for low, high in ((2, 6), (3, 4), (3, 6), (4, 6))),
        *(mixed_recipe("sensitive", low, high) for low, high in ((3, 6), (4, 6), (4, 8))),
    )
}


def recipe_named(name: str, group_size: int | None = None) -> Recipe:
    """Return a recipe by name, with a different group size if one is given.

    Raises:
        ValueRefused: there is no such recipe, or it cannot have that group size.
    """
    if name not in RECIPES:
        raise ValueRefused(f"--recipe must be one of {', '.join(RECIPES)}, not {name!r}")
    recipe = RECIPES[name]
    if group_size is None:
        return recipe
    base = check_quantization(recipe.base.bits, group_size, recipe.base.mode)
    high = recipe.high and check_quantization(recipe.high.bits, group_size, recipe.high.mode)
    return replace(recipe, base=base, high=high)


# --- presets ---


@dataclass(frozen=True)
class Preset:
    """A recipe and dtype for a kind of device; `calibrated` is used with a calibration text."""

    recipe: str
    calibrated: str | None = None
    dtype: str | None = None

    def recipe_for(self, calibration: str | None) -> str:
        return self.recipe if calibration is None else self.calibrated or self.recipe


PRESETS = {
    # Every phone's GPU supports float16. With a calibration text, the embedding, the head and the
    # most sensitive parts get 6 bits, without exceeding the size of 5 bits throughout.
    "phone": Preset("uniform_4", "sensitive_4_6", "float16"),
    "laptop": Preset("uniform_6"),
}


def preset_named(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ValueRefused: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueRefused(f"--preset must be one of {', '.join(PRESETS)}, not {name!r}")
    return PRESETS[name]


# --- measured recipes ---


def allocate_bits(
    recipe: Recipe, elements: Mapping[str, int], sensitivity: Mapping[tuple[str, ...], float]
) -> Recipe:
    """Return a sensitive recipe that gives more bits to the parts where a byte helps most.

    The embedding and the head always get more bits. The budget is one extra bit per weight; the
    rest goes to the parts where quantization does the most harm per byte.

    Args:
        elements: the number of elements of each matrix, by path.
        sensitivity: how much quantizing each part with `base` harms the model's output; the
            keys are the parts' paths.
    """
    assert recipe.high is not None
    high, ceiling = recipe.high, replace(recipe.base, bits=recipe.base.bits + 1)

    def extra(count: int, quantization: Quantization) -> int:
        return matrix_bytes(count, quantization, 2) - matrix_bytes(count, recipe.base, 2)

    left = sum(extra(count, ceiling) for count in elements.values())
    left -= sum(extra(elements[path], high) for path in ENDS if path in elements)
    chosen: set[str] = set()
    costs = {part: sum(extra(elements[path], high) for path in part) for part in sensitivity}
    for part in sorted(sensitivity, key=lambda part: (-sensitivity[part] / costs[part], part)):
        if sensitivity[part] > 0 and costs[part] <= left:
            chosen.update(part)
            left -= costs[part]
    return replace(recipe, chosen=frozenset(chosen))
