"""Bytes of weights, ring and workspace, from the shapes in a config; opens and allocates nothing.

A forged config that asks for terabytes is a number here. Weights and ring are exact. The workspace
is the peak of one prefill chunk, term by term what `models/layers.py` and `cache/steps.py` hold at
once, and held to measurements on the CPU backend (`tests/plan_measured.py`); for Metal it follows
from the same code, and nobody has measured it there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.nn as nn

from mlx_stream.cache import stream_bytes
from mlx_stream.cache.plan import BLOCK, STEP_LENGTHS, padded
from mlx_stream.cache.stream import CLOCK_LIMIT, MASK_BYTES, check_quantizable
from mlx_stream.checkpoint.recipes import matrix_bytes as quantized_bytes
from mlx_stream.config import QUANTIZATION_MODES, ModelConfig, Quantization
from mlx_stream.errors import ValueRefused
from mlx_stream.models import MODELS
from mlx_stream.models.layers import Projection

CHUNK = 128  # tokens of a prefill step at most: `generate.PREFILL_CHUNK`, which comes after this
# Head dimensions for which Metal attends to a chunk without holding its scores.
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)
NOT_QUANTIZED = 16
# The most bits first: 16 stands for the weights as floats.
BITS = (NOT_QUANTIZED, *sorted(QUANTIZATION_MODES["affine"][0], reverse=True))
GROUP_SIZES = QUANTIZATION_MODES["affine"][1]
DEFAULT_GROUP_SIZE = 64

# How one matrix is held: quantized, or None as floats.
Held = Callable[[Projection], Quantization | None]


@dataclass
class Shapes:
    """The tensors of a model, collected where its modules would be made (see `models.Weights`).

    Attributes:
        modules: matrices by module, in the order they are loaded; those of one are joined.
        vectors: numbers in norms and biases, which are never quantized.
    """

    modules: list[tuple[Projection, ...]] = field(default_factory=list)
    vectors: int = 0

    def linear(self, *parts: Projection) -> nn.Module:
        self.modules.append(parts)
        self.vectors += sum(part.outputs for part in parts if part.bias)
        return nn.Identity()

    def embedding(self, path: str, count: int, size: int) -> nn.Embedding:
        self.modules.append((Projection(path, count, size),))
        return nn.Embedding(1, 1)

    def norm(self, path: str, size: int, eps: float) -> nn.Module:
        self.vectors += size
        return nn.Identity()

    @property
    def matrices(self) -> Iterator[Projection]:
        return (part for module in self.modules for part in module)

    @property
    def parameters(self) -> int:
        return self.vectors + sum(part.outputs * part.inputs for part in self.matrices)


def shapes_of(config: ModelConfig) -> Shapes:
    """Return every tensor of a model; a head tied to the embedding is there once."""
    shapes = Shapes()
    MODELS[config.model_type](config, shapes)
    return shapes


# --- weights ---


def uniform(bits: int, group_size: int = DEFAULT_GROUP_SIZE) -> Held:
    """Return how matrices are held at `bits`; those that groups do not divide stay floats.

    Raises:
        ValueRefused: bits or a group size MLX does not have.
    """
    if bits not in BITS:
        raise ValueRefused(
            f"--bits must be one of {', '.join(map(str, sorted(BITS)))} "
            f"({NOT_QUANTIZED}: not quantized), not {bits}"
        )
    if group_size not in GROUP_SIZES:
        raise ValueRefused(
            f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}, not {group_size}"
        )
    if bits == NOT_QUANTIZED:
        return lambda part: None
    quantization = Quantization(group_size, bits)
    return lambda part: None if part.inputs % group_size else quantization


def matrix_bytes(part: Projection, held: Quantization | None, itemsize: int) -> int:
    """Return the bytes of one matrix: packed integers, and scales (and biases) for each group."""
    numbers = part.outputs * part.inputs
    return numbers * itemsize if held is None else quantized_bytes(numbers, held, itemsize)


def weights_bytes(shapes: Shapes, held: Held, itemsize: int) -> int:
    """Return the bytes of all weights, as `weights.build` holds them in the end."""
    matrices = sum(matrix_bytes(part, held(part), itemsize) for part in shapes.matrices)
    return matrices + shapes.vectors * itemsize


def loading_bytes(shapes: Shapes, stored: Held, held: Held, itemsize: int, file: int) -> int:
    """Return the peak while loading: what is made so far, and one module's parts beside it.

    They are read, converted where they are not yet as they will be held, and joined. `stored` says
    how the files hold them, and `file` the bytes of a float there.
    """
    made = peak = 0
    for module in shapes.modules:
        read = sum(matrix_bytes(part, stored(part), file) for part in module)
        parts = sum(matrix_bytes(part, held(part), itemsize) for part in module)
        copies = (read != parts) + (len(module) > 1)
        peak = max(peak, made + read + copies * parts)
        made += parts
    return max(peak, made + shapes.vectors * itemsize)


# --- keys and values ---


def ring_bytes(
    config: ModelConfig,
    sinks: int,
    window: int,
    itemsize: int,
    kv_bits: int | None = None,
    spare: int = 0,
) -> int:
    """Return the bytes of one stream: keys and values of S + W + X tokens, and the sinks again.

    The sinks' keys are held a second time before rotation. With `kv_bits` the ring is quantized in
    groups of 64 along the head, scales and biases in 16 bits, and the sinks stay as they are.

    Raises:
        ValueRefused: bits other than 8 and 4, or a head that groups of 64 do not divide.
    """
    if kv_bits is not None:
        check_quantizable(config.head_dim, kv_bits)
    ring = window + spare
    return config.num_hidden_layers * stream_bytes(
        config.num_key_value_heads, config.head_dim, itemsize, sinks, ring, kv_bits
    )


# --- workspace ---


def is_fused(config: ModelConfig, metal: bool) -> bool:
    """Say whether a chunk's attention runs without its scores in memory: METAL.md 1 to 10."""
    return metal and config.head_dim in FUSED_HEAD_DIMS


def longest_moving_chunk(config: ModelConfig, sinks: int, window: int) -> int:
    """Return the longest chunk once the ring is full and the oldest token moves, as `take` does."""
    rows = sinks + window
    limit = max(CLOCK_LIMIT, 2 * rows) - rows
    row_bytes = 4 * config.num_attention_heads * (rows + STEP_LENGTHS[-1])
    limit = min(limit, CHUNK, max(1, MASK_BYTES // row_bytes))
    return max(length for length in STEP_LENGTHS if length <= limit)


def workspace_bytes(
    config: ModelConfig,
    sinks: int,
    window: int,
    itemsize: int,
    fused: bool = False,
    kv_bits: int | None = None,
) -> int:
    """Return the most a chat holds beyond weights and ring: one chunk, where the ring is full.

    A step of one token holds less than a hundredth of it. What happens once in 10,000 tokens,
    turning the ring back, holds one layer's keys twice, which is less too.
    """
    filling = padded(min(CHUNK, sinks + window))
    needed = chunk_bytes(config, filling, itemsize)
    needed += attention_bytes(config, filling, sinks + window + filling, itemsize, fused)
    if sinks:
        moving = longest_moving_chunk(config, sinks, window)
        later = chunk_bytes(config, moving, itemsize)
        later += moving_attention_bytes(config, moving, sinks + window + moving, itemsize, fused)
        needed = max(needed, later)
    return needed + (0 if kv_bits is None else unpacking_bytes(config, window, itemsize, fused))


def unpacking_bytes(config: ModelConfig, window: int, itemsize: int, fused: bool) -> int:
    """Return what a chunk holds of one layer's quantized ring as floats: its keys, its values.

    Metal does it in one kernel; the CPU backend in steps, with 15 bytes a number measured.
    """
    numbers = config.num_key_value_heads * config.head_dim * window
    return numbers * (2 * itemsize if fused else 15)


def chunk_bytes(config: ModelConfig, rows: int, itemsize: int) -> int:
    """Return what a chunk of T rows holds whatever it attends to, at the last layer.

    Each layer's new queries, keys and values, unrotated and rotated, wait until the ring is
    written. Beside them: gate, up and their product, and the norms' float32.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    waiting = config.num_hidden_layers * config.head_dim * (2 * heads + 3 * kv_heads) * itemsize
    inner = 3 * config.intermediate_size * itemsize
    norms = (28 if itemsize == 4 else 34) * config.hidden_size
    return rows * (waiting + inner + norms)


def attention_bytes(
    config: ModelConfig, rows: int, attended: int, itemsize: int, fused: bool
) -> int:
    """Return what attention of T rows to N holds before o moves: keys and values joined, a mask."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    scores = 0 if fused else heads * rows * attended * itemsize
    joined = 2 * kv_heads * attended * config.head_dim * itemsize
    turned = rows * (3 * heads + 4 * kv_heads) * config.head_dim * itemsize
    return scores + joined + rows * attended + turned


def moving_attention_bytes(
    config: ModelConfig, rows: int, attended: int, itemsize: int, fused: bool
) -> int:
    """Return what it holds once o moves: all in float32, in blocks of rows.

    Each block has a mask that carries the sinks' scores; two at a time have scores, as the next
    one's are allocated while one is computed.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    seen = attended - rows + min(rows, BLOCK)
    masks = heads * rows * seen * 4
    scores = 0 if fused else heads * min(rows, 2 * BLOCK) * seen * 4
    joined = 2 * kv_heads * attended * config.head_dim * (4 if itemsize == 4 else 4 + itemsize)
    turned = 2 * rows * (heads + kv_heads) * config.head_dim * 4
    return masks + scores + joined + 4 * rows * seen + turned


# --- a step ---


def step_bytes(config: ModelConfig, shapes: Shapes, held: Held, itemsize: int, ring: int) -> int:
    """Return what writing one token reads: all weights and the ring.

    Of an embedding that is not the head too, one row is read, which does not count.
    """
    weights = weights_bytes(shapes, held, itemsize)
    if config.tie_word_embeddings:
        return weights + ring
    table = next(shapes.matrices)
    return weights + ring - matrix_bytes(table, held(table), itemsize)
