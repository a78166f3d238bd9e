"""Builds modules from a checkpoint's tensors: checked, quantized or not, and joined."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_stream.config import ModelConfig, Quantization
from mlx_stream.errors import WeightsError
from mlx_stream.models.layers import CausalLM, Projection
from mlx_stream.models.layout import Vector, layout_of, weights_bytes
from mlx_stream.models.registry import MODELS

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FLOATS = tuple(DTYPES.values())


def build(
    config: ModelConfig,
    tensors: MutableMapping[str, mx.array],
    dtype: mx.Dtype,
    keep_quantized: bool,
) -> CausalLM:
    """Build the model and take its weights out of `tensors`, which is empty afterwards.

    Args:
        tensors: lazy arrays by name. Each is dropped once its module is built, so that at most one
            module's parts are in memory twice.
        dtype: the type of all computation; quantized weights stay integers.
        keep_quantized: compute with the quantized weights instead of dequantizing them here.

    Raises:
        WeightsError: a tensor, which the message names, is missing, unknown, or of the wrong shape
            or type.
    """
    weights = CheckpointWeights(config, tensors, dtype, keep_quantized)
    model = MODELS[config.model_type](config, weights)
    refuse_unknown(config, tensors)
    model.named_tensors = partial(named_tensors, weights.made)
    return model


def refuse_unknown(config: ModelConfig, tensors: MutableMapping[str, Any]) -> None:
    """Drop leftover tensors that no model needs.

    Raises:
        WeightsError: there are other leftover tensors.
    """
    for name in list(tensors):
        # Buffers from old exports, and copies of a tied embedding.
        if name.endswith("rotary_emb.inv_freq") or (
            config.tie_word_embeddings and name.startswith("lm_head.")
        ):
            tensors.pop(name)
    if tensors:
        raise WeightsError(
            f"weights: unknown tensor {min(tensors)!r} ({len(tensors)} in all): the files do not "
            f"match the {config.model_type} model in config.json"
        )


class RemainingTensors(MutableMapping[str, mx.array]):
    """The tensors of a checkpoint that no module has taken yet; each is read only when it is taken.

    If the source is mutable, a taken tensor is deleted from it; otherwise it would be in memory
    twice.
    """

    def __init__(self, source: Mapping[str, mx.array]):
        self.source, self.names = source, dict.fromkeys(source)

    def __getitem__(self, name: str) -> mx.array:
        return self.source[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names  # the default implementation would read the tensor

    def __delitem__(self, name: str) -> None:
        del self.names[name]
        if isinstance(self.source, MutableMapping):
            del self.source[name]

    def __setitem__(self, name: str, tensor: mx.array) -> None:
        raise TypeError("a checkpoint's tensors cannot be replaced")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Part:
    """One weight of a checkpoint, ready to be joined with others."""

    tensors: dict[str, mx.array]
    quantization: Quantization | None


class CheckpointWeights:
    """Build modules from a checkpoint's tensors. If `dtype` is None, tensors keep their own."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: MutableMapping[str, mx.array],
        dtype: mx.Dtype | None,
        keep_quantized: bool,
    ):
        self.config, self.tensors = config, tensors
        self.dtype, self.keep_quantized = dtype, keep_quantized
        self.made: list[tuple[tuple[Projection | Vector, ...], nn.Module]] = []

    def linear(self, *parts: Projection) -> nn.Module:
        read = [self.part(p.path, p.outputs, p.inputs, p.bias) for p in parts]
        if all(part.quantization == read[0].quantization for part in read):
            module = self._module(read)
            self.made.append((parts, module))
            return module
        modules = [self._module([part]) for part in read]
        self.made += [((part,), module) for part, module in zip(parts, modules, strict=True)]
        return SideBySide(modules)

    def embedding(self, path: str, count: int, size: int) -> nn.Embedding | nn.QuantizedEmbedding:
        part = self.part(path, count, size, False)
        if part.quantization is None:
            module = nn.Embedding(1, 1)
            module.weight = part.tensors["weight"]
        else:
            module = nn.QuantizedEmbedding(
                1, _smallest(part.quantization), **_settings(part.quantization)
            )
            module.num_embeddings, module.dims = count, size
            _set_quantized(module, part.tensors)
        mx.eval(module.parameters())
        self.made.append(((Projection(path, count, size),), module))
        return module

    def norm(self, path: str, size: int, eps: float) -> nn.Module:
        module = nn.RMSNorm(1, eps)
        module.weight = self.floats(f"{path}.weight", (size,))
        mx.eval(module.parameters())
        self.made.append(((Vector(path, size),), module))
        return module

    def _module(self, parts: list[Part]) -> nn.Module:
        """Join parts of one kind along their outputs by stacking rows; no group spans two rows."""
        names = parts[0].tensors
        joined = {
            name: parts[0].tensors[name]
            if len(parts) == 1
            else mx.concatenate([part.tensors[name] for part in parts])
            for name in names
        }
        quantization = parts[0].quantization
        if quantization is None:
            module = Linear(joined["weight"])
        else:
            module = QuantizedLinear(
                _smallest(quantization), 1, bias="bias" in joined, **_settings(quantization)
            )
            _set_quantized(module, joined)
        if "bias" in joined:
            module.bias = joined["bias"]
        # Evaluated here to free the parts, and so that no traced function recomputes them.
        mx.eval(module.parameters())
        return module

    def part(self, path: str, outputs: int, inputs: int, bias: bool) -> Part:
        """Take one weight with its scales and its bias, quantized or dequantized."""
        tensors = {"bias": self.floats(f"{path}.bias", (outputs,))} if bias else {}
        if f"{path}.scales" not in self.tensors:
            tensors["weight"] = self.floats(f"{path}.weight", (outputs, inputs))
            return Part(tensors, None)
        quantization = self.config.quantized(path)
        if quantization is None:
            raise WeightsError(
                f"weights: {path}.scales exists, but config.json does not say how it is quantized"
            )
        packed = self._take_quantized(path, outputs, inputs, quantization)
        if self.keep_quantized:
            return Part(tensors | packed, quantization)
        full = dequantize(packed, quantization)
        return Part(tensors | {"weight": self._cast(full)}, None)

    def _take_quantized(
        self, path: str, outputs: int, inputs: int, quantization: Quantization
    ) -> dict[str, mx.array]:
        """Take a quantized weight: uint32 words, and a scale (and bias) per group."""
        group, bits = quantization.group_size, quantization.bits
        if inputs % group or inputs * bits % 32:
            raise WeightsError(
                f"weights: {path} has {inputs} inputs, not divisible into groups of {group} at "
                f"{bits} bits"
            )
        weight = self._take(f"{path}.weight", (outputs, inputs * bits // 32), (mx.uint32,))
        groups = (outputs, inputs // group)
        if quantization.mode != "affine":
            scales = self._take(f"{path}.scales", groups, (mx.uint8,))
            return {"weight": weight, "scales": scales}
        scales = self._take(f"{path}.scales", groups, FLOATS)
        biases = self._take(f"{path}.biases", groups, FLOATS)
        if self.keep_quantized:  # these get the model's dtype
            scales, biases = self._cast(scales), self._cast(biases)
        return {"weight": weight, "scales": scales, "biases": biases}

    def floats(self, name: str, shape: tuple[int, ...]) -> mx.array:
        """Take a float tensor."""
        return self._cast(self._take(name, shape, FLOATS))

    def _cast(self, array: mx.array) -> mx.array:
        return array if self.dtype is None else array.astype(self.dtype)

    def _take(self, name: str, shape: tuple[int, ...], dtypes: tuple[mx.Dtype, ...]) -> mx.array:
        if name not in self.tensors:
            raise WeightsError(f"weights: tensor {name!r} is missing")
        tensor = self.tensors.pop(name)
        if tensor.shape != shape:
            raise WeightsError(
                f"weights: tensor {name!r} has shape {tensor.shape}, but config.json needs {shape}"
            )
        if tensor.dtype not in dtypes:
            raise WeightsError(
                f"weights: tensor {name!r} is {tensor.dtype}, not "
                f"{' or '.join(str(dtype) for dtype in dtypes)}"
            )
        return tensor


def named_tensors(
    made: Iterable[tuple[tuple[Projection | Vector, ...], nn.Module]],
) -> Iterator[tuple[str, mx.array]]:
    """Yield the tensors that the modules compute with, under the checkpoint's names.

    A part of a joined matrix is a view of its rows.
    """
    for parts, module in made:
        row = 0
        for part in parts:
            rows = part.size if isinstance(part, Vector) else part.outputs
            for name in ("weight", "scales", "biases", "bias"):
                if name in module:
                    yield f"{part.path}.{name}", module[name][row : row + rows]
            row += rows


class Linear(nn.Module):
    """Map (T, inputs) to (T, outputs). The weight is transposed once, not in every step's graph.

    Args:
        weight: (outputs, inputs).
    """

    def __init__(self, weight: mx.array):
        super().__init__()
        self.set_weight(weight)

    def set_weight(self, weight: mx.array) -> None:
        self.weight, self._turned = weight, weight.T  # a view of the same buffer, not a parameter
        mx.eval(self._turned)

    def __call__(self, x: mx.array) -> mx.array:
        if "bias" in self:
            return mx.addmm(self["bias"], x, self._turned)
        return x @ self._turned

    def add_to(self, residual: mx.array, x: mx.array) -> mx.array:
        """Return `residual` plus the mapped `x`."""
        if "bias" in self:
            return residual + self(x)
        return mx.addmm(residual, x, self._turned)


class QuantizedLinear(nn.QuantizedLinear):
    """Map (T, inputs) to (T, outputs) with a quantized weight."""

    def add_to(self, residual: mx.array, x: mx.array) -> mx.array:
        return residual + self(x)


class SideBySide(nn.Module):
    """Projections that cannot be joined (different bits or groups), run one after another."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = parts

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)

    def add_to(self, residual: mx.array, x: mx.array) -> mx.array:
        return residual + self(x)


def weight_bytes(
    config: ModelConfig, names: Mapping[str, mx.array], dtype: mx.Dtype, keep_quantized: bool
) -> int:
    """Return the size of the weights in bytes once `build` is done."""
    scales = frozenset(name.removesuffix(".scales") for name in names if name.endswith(".scales"))

    def quantization_of(part: Projection) -> Quantization | None:
        return config.quantized(part.path) if keep_quantized and part.path in scales else None

    return weights_bytes(layout_of(config), quantization_of, dtype.size)


def dequantize(packed: Mapping[str, mx.array], quantization: Quantization) -> mx.array:
    """Return a weight as floats; affine weights as float32, which is exact for 16-bit scales."""
    settings = _settings(quantization)
    if quantization.mode != "affine":
        return mx.dequantize(packed["weight"], packed["scales"], **settings)
    scales, biases = (packed[name].astype(mx.float32) for name in ("scales", "biases"))
    return mx.dequantize(packed["weight"], scales, biases, **settings)


def _smallest(quantization: Quantization) -> int:
    """Return the length of the shortest row that MLX can build a module from."""
    return max(quantization.group_size, 32)


def _settings(quantization: Quantization) -> dict[str, Any]:
    return {
        "group_size": quantization.group_size,
        "bits": quantization.bits,
        "mode": quantization.mode,
    }


def _set_quantized(module: nn.Module, tensors: dict[str, mx.array]) -> None:
    module.weight, module.scales = tensors["weight"], tensors["scales"]
    module.biases = tensors.get("biases")
