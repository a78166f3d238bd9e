"""Converts a checkpoint's tensors to a different precision, one matrix at a time; writes nothing.

A matrix that is already stored as requested is copied bit for bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.config import ModelConfig, Quantization, read_config
from mlx_stream.errors import ValueRefused, WeightsError
from mlx_stream.load import named_dtype, stored_dtype
from mlx_stream.models.layers import Projection
from mlx_stream.models.layout import Layout, layout_of
from mlx_stream.models.weights import (
    DTYPES,
    CheckpointWeights,
    Part,
    RemainingTensors,
    dequantize,
    refuse_unknown,
)
from mlx_stream.quantize.recipes import Recipe

# The number of elements of a matrix that are converted at a time.
BLOCK = 2**18
# How a matrix is written if MLX does not support its own type.
WIDEST = Quantization(32, 8)
# Config keys left out: paths on the author's machine, and code that is not copied.
LEFT_OUT = ("_name_or_path", "name_or_path", "auto_map")


@dataclass
class Conversion:
    """A planned conversion.

    Attributes:
        checkpoint: the source, with the config of the result.
        config: the source's config.
        quantized: how each matrix will be stored, by module path; None for floats.
        dtype: the type of floats, including scales; None keeps each tensor's own, but narrows
            scales to the checkpoint's `dtype` if it names one.
        largest: size in bytes of the largest matrix so far, in the source or the result.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    layout: Layout
    quantized: Mapping[str, Quantization | None]
    dtype: mx.Dtype | None
    largest: int = 0

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Yield the result's tensors, evaluated; the source's are taken out of the checkpoint.

        Raises:
            WeightsError: a tensor is missing or of the wrong shape, or its values do not fit its
                new type.
        """
        source = CheckpointWeights(
            self.config, RemainingTensors(self.checkpoint.tensors), None, True
        )
        for part in self.layout.parts:
            if isinstance(part, Projection):
                yield from self._matrix(source, part).items()
            else:
                name = f"{part.path}.weight"
                yield name, self._to_dtype(name, source.floats(name, (part.size,)))

    def _matrix(self, source: CheckpointWeights, at: Projection) -> dict[str, mx.array]:
        part = source.part(at.path, at.outputs, at.inputs, at.bias)
        mx.eval(part.tensors)
        self._track_largest(part.tensors)
        wanted = self.quantized[at.path]
        bias = {"bias": part.tensors.pop("bias")} if at.bias else {}
        as_it_is = part.quantization == wanted
        tensors = part.tensors if as_it_is else self._in_blocks(part, wanted, at)
        self._track_largest(tensors)
        del part
        return {
            f"{at.path}.{name}": self._to_dtype(f"{at.path}.{name}", array)
            for name, array in (tensors | bias).items()
        }

    def _in_blocks(
        self, part: Part, wanted: Quantization | None, at: Projection
    ) -> dict[str, mx.array]:
        """Return a matrix stored in a different way, converted a few rows at a time.

        To quantize on the CPU, MLX needs up to 80 bytes per element; an unpacked matrix takes up
        eight times its packed size.
        """
        blocks: list[dict[str, mx.array]] = []
        rows = max(1, BLOCK // at.inputs)
        for start in range(0, at.outputs, rows):
            block = {name: array[start : start + rows] for name, array in part.tensors.items()}
            if part.quantization is not None:
                block = {"weight": dequantize(block, part.quantization)}
            weight = self._to_dtype(f"{at.path}.weight", block["weight"])
            blocks.append({"weight": weight} if wanted is None else quantize(weight, wanted))
            mx.eval(blocks[-1])
        joined = {name: mx.concatenate([one[name] for one in blocks]) for name in blocks[0]}
        mx.eval(joined)
        return joined

    def _track_largest(self, tensors: Mapping[str, mx.array]) -> None:
        self.largest = max(self.largest, sum(array.nbytes for array in tensors.values()))

    def _to_dtype(self, name: str, array: mx.array) -> mx.array:
        """Return an array in its new type, evaluated; refuse values that are not finite."""
        dtype = self.dtype
        if dtype is None and array.dtype == mx.float32 and name.endswith((".scales", ".biases")):
            dtype = named_dtype(self.checkpoint.dtype)
        if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
            mx.eval(array)
            return array
        array = array.astype(dtype)
        if not mx.isfinite(mx.stack([array.min(), array.max()])).all().item():
            raise WeightsError(
                f"weights: {name} has values that are not finite or do not fit "
                f"{name_of(dtype)}: try --dtype float32"
            )
        return array


def quantize(weight: mx.array, wanted: Quantization) -> dict[str, mx.array]:
    """Return a matrix as `mx.quantize` packs it: weight, scales and, in affine mode, biases."""
    parts = mx.quantize(weight, wanted.group_size, wanted.bits, mode=wanted.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def prepare_conversion(
    checkpoint: Checkpoint, recipe: Recipe | None, dtype: str | None
) -> Conversion:
    """Decide how to store each tensor of a checkpoint, without reading any of them.

    Args:
        recipe: how to quantize. None leaves quantized weights as they are, or dequantizes them if a
            dtype is given. Without a dtype, matrices of types that MLX lacks become `WIDEST`.
        dtype: the type of all floats: float32, float16 or bfloat16. Default: the model's own with a
            recipe, each tensor's own without one.

    Raises:
        ConfigError: the config is not supported.
        WeightsError: there are unknown tensors.
        ValueRefused: the dtype is unknown, or no matrix can be divided into the recipe's groups.
    """
    named_dtype(dtype)
    config = read_config(checkpoint.config)
    layout, names = layout_of(config), frozenset(checkpoint.tensors)
    refuse_unknown(config, dict.fromkeys(names - frozenset(layout.tensor_names())))
    if recipe is not None:
        dtype = dtype or own_dtype(checkpoint)
        quantized = {at.path: fit(recipe, at, config) for at in layout.matrices}
        if not any(quantized.values()):
            raise ValueRefused(
                f"no matrix of this model can be divided into groups of {recipe.base.group_size}: "
                "use a smaller --group-size"
            )
    else:
        kept = {at.path for at in layout.matrices if f"{at.path}.scales" in names and not dtype}
        quantized = {
            at.path: config.quantized(at.path) if at.path in kept else None
            for at in layout.matrices
        }
        quantized |= dict.fromkeys(() if dtype else checkpoint.dequantized, WIDEST)
    base = recipe.base if recipe else (config.quantization or {"": WIDEST})[""]
    raw = rewrite_config(checkpoint.config, base, quantized, dtype)
    tokenizer_config = {k: v for k, v in checkpoint.tokenizer_config.items() if k not in LEFT_OUT}
    result = replace(checkpoint, config=raw, tokenizer_config=tokenizer_config)
    return Conversion(result, config, layout, quantized, named_dtype(dtype))


def fit(recipe: Recipe, at: Projection, config: ModelConfig) -> Quantization | None:
    """Return how a recipe stores a matrix: as floats if a row does not divide into groups."""
    wanted = recipe.quantized(at.path, config.num_hidden_layers)
    return None if at.inputs % wanted.group_size else wanted


def own_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that a checkpoint's config names, or else that of its embedding."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(named, str) and named in DTYPES:
        return named
    return name_of(stored_dtype(checkpoint))


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


# --- config.json ---


def rewrite_config(
    raw: Mapping[str, Any],
    base: Quantization | None,
    quantized: Mapping[str, Quantization | None],
    dtype: str | None,
) -> dict[str, Any]:
    """Return the result's config.json."""
    gone = ("quantization", "quantization_config", *LEFT_OUT)
    config = {key: value for key, value in raw.items() if key not in gone}
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config]
        config |= dict.fromkeys(keys or ["torch_dtype"], dtype)
    config |= older_rope(config)
    if base is not None and any(quantized.values()):
        others = {
            path: asdict(kind) if kind else False
            for path, kind in quantized.items()
            if kind != base
        }
        config["quantization"] = {**asdict(base), **others}
    return config


def older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings under mlx-lm's keys, if only transformers 5's are present."""
    newer = dict(config.get("rope_parameters") or {})
    theta = newer.pop("rope_theta", None)
    found: dict[str, Any] = {}
    if theta is not None and "rope_theta" not in config:
        found["rope_theta"] = theta
    if newer.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        found["rope_scaling"] = newer
    return found
