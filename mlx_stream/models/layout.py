"""The shapes and sizes of a model's tensors, without loading them.

A model family builds its model from a `Layout` instead of weights, so the tensors that are counted,
planned, quantized or converted are exactly those of the model. Nothing is allocated here: a config
that asks for terabytes merely yields a number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.nn as nn

from mlx_stream.cache import stream_bytes
from mlx_stream.cache.stream import check_quantizable
from mlx_stream.config import ModelConfig, Quantization
from mlx_stream.models.layers import Projection
from mlx_stream.models.registry import MODELS

# How a matrix is stored: quantized, or as floats (None).
QuantizationOf = Callable[[Projection], Quantization | None]


@dataclass(frozen=True)
class Vector:
    """A norm's weight and its name in a checkpoint: `path.weight` is (size,), never quantized."""

    path: str
    size: int


@dataclass
class Layout:
    """The tensors of a model, in loading order.

    Attributes:
        modules: each is one norm, or the matrices whose outputs are concatenated.
    """

    modules: list[tuple[Projection | Vector, ...]] = field(default_factory=list)

    def linear(self, *parts: Projection) -> nn.Module:
        self.modules.append(parts)
        return nn.Identity()

    def embedding(self, path: str, count: int, size: int) -> nn.Embedding:
        self.modules.append((Projection(path, count, size),))
        return nn.Embedding(1, 1)

    def norm(self, path: str, size: int, eps: float) -> nn.Module:
        self.modules.append((Vector(path, size),))
        return nn.Identity()

    @property
    def parts(self) -> Iterator[Projection | Vector]:
        """Every matrix and norm, in order."""
        return (part for module in self.modules for part in module)

    @property
    def matrices(self) -> Iterator[Projection]:
        return (part for part in self.parts if isinstance(part, Projection))

    @property
    def vector_numbers(self) -> int:
        """How many numbers the norms and biases contain; these are never quantized."""
        return sum(
            part.size if isinstance(part, Vector) else part.bias * part.outputs
            for part in self.parts
        )

    @property
    def parameters(self) -> int:
        """The number of parameters in the model."""
        return self.vector_numbers + sum(part.outputs * part.inputs for part in self.matrices)

    def tensor_names(self) -> Iterator[str]:
        """Yield the name of every tensor that a checkpoint may have, quantized or not."""
        for part in self.parts:
            yield from (f"{part.path}.{end}" for end in ("weight", "scales", "biases"))
            if isinstance(part, Projection) and part.bias:
                yield f"{part.path}.bias"


def layout_of(config: ModelConfig) -> Layout:
    """Return the tensors of a model; a head tied to the embedding counts once."""
    layout = Layout()
    MODELS[config.model_type](config, layout)
    return layout


def matrix_bytes(numbers: int, quantization: Quantization | None, itemsize: int) -> int:
    """Return a matrix's size in bytes; affine groups have a scale and a bias.

    Args:
        numbers: how many elements the matrix has.
        itemsize: bytes per float, including scales and biases.
    """
    if quantization is None:
        return numbers * itemsize
    group = 2 * itemsize if quantization.mode == "affine" else 1
    return numbers * quantization.bits // 8 + numbers // quantization.group_size * group


def part_bytes(part: Projection, quantization: Quantization | None, itemsize: int) -> int:
    """Return the size of one matrix in bytes, without its bias."""
    return matrix_bytes(part.outputs * part.inputs, quantization, itemsize)


def weights_bytes(layout: Layout, quantization_of: QuantizationOf, itemsize: int) -> int:
    """Return the size of all weights in bytes, once `weights.build` is done."""
    matrices = sum(part_bytes(part, quantization_of(part), itemsize) for part in layout.matrices)
    return matrices + layout.vector_numbers * itemsize


def ring_bytes(
    config: ModelConfig,
    sinks: int,
    window: int,
    itemsize: int,
    kv_bits: int | None = None,
    spare: int = 0,
) -> int:
    """Return the size of one stream in bytes, with keys and values of S + W + X tokens.

    The size also covers a copy of the sinks' keys before rotation. With `kv_bits`, the ring is
    quantized in groups of 64 along the head, with 16-bit scales and biases, and the sinks are not
    quantized.

    Raises:
        ValueRefused: `kv_bits` is neither 8 nor 4, or the head dimension is not divisible by 64.
    """
    if kv_bits is not None:
        check_quantizable(config.head_dim, kv_bits)
    ring = window + spare
    return config.num_hidden_layers * stream_bytes(
        config.num_key_value_heads, config.head_dim, itemsize, sinks, ring, kv_bits
    )
