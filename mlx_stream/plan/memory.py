"""Sizes of weights, ring and workspace, from the shapes in a config; opens and allocates nothing.

Weights and ring are exact. The workspace is the peak of one prefill chunk: the arrays that
`models/layers.py` and `cache/steps` hold at once, term by term. It agrees with measurements on the
CPU backend (`tests/measure/plan_memory.py`); on Metal it has not been measured.
"""

from mlx_stream.cache.geometry import BLOCK, STEP_LENGTHS, pad_length
from mlx_stream.cache.stream import CLOCK_LIMIT, MASK_BYTES
from mlx_stream.config import QUANTIZATION_MODES, ModelConfig, Quantization
from mlx_stream.errors import ValueRefused
from mlx_stream.models.layers import Projection
from mlx_stream.models.layout import Layout, QuantizationOf, part_bytes, weights_bytes
from mlx_stream.models.window import PREFILL_CHUNK

# Head dimensions for which Metal attends to a chunk without holding its scores.
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)
NOT_QUANTIZED = 16
# Highest first; 16 means that the weights are not quantized.
BITS = (NOT_QUANTIZED, *sorted(QUANTIZATION_MODES["affine"][0], reverse=True))
GROUP_SIZES = QUANTIZATION_MODES["affine"][1]
DEFAULT_GROUP_SIZE = 64

# --- weights ---


def uniform_quantization(bits: int, group_size: int = DEFAULT_GROUP_SIZE) -> QuantizationOf:
    """Return the quantization of matrices at `bits`; those not divisible into groups stay floats.

    Raises:
        ValueRefused: MLX does not support this number of bits or this group size.
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


def loading_bytes(
    layout: Layout, on_disk: QuantizationOf, in_memory: QuantizationOf, itemsize: int, file: int
) -> int:
    """Return the peak size while loading: the finished modules, and the parts of one module.

    The parts are read, converted if their format differs, and joined. `on_disk` is the files'
    quantization, and `file` is the size in bytes of a float in them.
    """
    made = peak = 0
    for module in layout.modules:
        matrices = [part for part in module if isinstance(part, Projection)]
        read = sum(part_bytes(part, on_disk(part), file) for part in matrices)
        parts = sum(part_bytes(part, in_memory(part), itemsize) for part in matrices)
        copies = (read != parts) + (len(matrices) > 1)
        peak = max(peak, made + read + copies * parts)
        made += parts
    return max(peak, made + layout.vector_numbers * itemsize)


# --- workspace ---


def is_fused(config: ModelConfig, metal: bool) -> bool:
    """Return whether a chunk's attention runs without holding its scores in memory."""
    return metal and config.head_dim in FUSED_HEAD_DIMS


def longest_moving_chunk(config: ModelConfig, sinks: int, window: int) -> int:
    """Return the cache's longest chunk once the ring is full and the oldest token moves."""
    rows = sinks + window
    limit = max(CLOCK_LIMIT, 2 * rows) - rows
    row_bytes = 4 * config.num_attention_heads * (rows + STEP_LENGTHS[-1])
    limit = min(limit, PREFILL_CHUNK, max(1, MASK_BYTES // row_bytes))
    return max(length for length in STEP_LENGTHS if length <= limit)


def workspace_bytes(
    config: ModelConfig,
    sinks: int,
    window: int,
    itemsize: int,
    fused: bool = False,
    kv_bits: int | None = None,
) -> int:
    """Return the peak memory a chat needs beyond weights and ring: one chunk with a full ring.

    A one-token step needs less than a hundredth of this. Rotating the ring back, once every 10,000
    tokens, holds two copies of one layer's keys, which is also less.
    """
    filling = pad_length(min(PREFILL_CHUNK, sinks + window))
    needed = chunk_bytes(config, filling, itemsize)
    needed += attention_bytes(config, filling, sinks + window + filling, itemsize, fused)
    if sinks:
        moving = longest_moving_chunk(config, sinks, window)
        later = chunk_bytes(config, moving, itemsize)
        later += moving_attention_bytes(config, moving, sinks + window + moving, itemsize, fused)
        needed = max(needed, later)
    return needed + (0 if kv_bits is None else unpacking_bytes(config, window, itemsize, fused))


def unpacking_bytes(config: ModelConfig, window: int, itemsize: int, fused: bool) -> int:
    """Return the size in bytes of one layer's quantized ring once it is unpacked to floats.

    Metal unpacks it in one kernel. The CPU backend does so in steps, which take 15 bytes per
    number, as measured.
    """
    numbers = config.num_key_value_heads * config.head_dim * window
    return numbers * (2 * itemsize if fused else 15)


def chunk_bytes(config: ModelConfig, rows: int, itemsize: int) -> int:
    """Return the size in bytes of a chunk of T rows at the last layer, without its attention.

    Each layer's new queries, keys and values, unrotated and rotated, are held until the ring is
    written. In addition, there are gate, up and their product, and the norms' float32 arrays.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    waiting = config.num_hidden_layers * config.head_dim * (2 * heads + 3 * kv_heads) * itemsize
    inner = 3 * config.intermediate_size * itemsize
    norms = (28 if itemsize == 4 else 34) * config.hidden_size
    return rows * (waiting + inner + norms)


def attention_bytes(
    config: ModelConfig, rows: int, attended: int, itemsize: int, fused: bool
) -> int:
    """Return the bytes T rows need to attend to N before the oldest token moves: K, V, a mask."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    scores = 0 if fused else heads * rows * attended * itemsize
    joined = 2 * kv_heads * attended * config.head_dim * itemsize
    turned = rows * (3 * heads + 4 * kv_heads) * config.head_dim * itemsize
    return scores + joined + rows * attended + turned


def moving_attention_bytes(
    config: ModelConfig, rows: int, attended: int, itemsize: int, fused: bool
) -> int:
    """Return the bytes needed once the oldest token moves: all in float32, in blocks of rows.

    Each block has a mask that carries the sinks' scores. Scores exist for two blocks at a time:
    those of the next block are allocated while one is computed.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    seen = attended - rows + min(rows, BLOCK)
    masks = heads * rows * seen * 4
    scores = 0 if fused else heads * min(rows, 2 * BLOCK) * seen * 4
    joined = 2 * kv_heads * attended * config.head_dim * (4 if itemsize == 4 else 4 + itemsize)
    turned = 2 * rows * (heads + kv_heads) * config.head_dim * 4
    return masks + scores + joined + 4 * rows * seen + turned


# --- a step ---


def step_bytes(
    config: ModelConfig, layout: Layout, in_memory: QuantizationOf, itemsize: int, ring: int
) -> int:
    """Return how many bytes are read to generate one token: all weights and the ring.

    An embedding that is not also the head is left out, as only one of its rows is read.
    """
    weights = weights_bytes(layout, in_memory, itemsize)
    if config.tie_word_embeddings:
        return weights + ring
    table = next(layout.matrices)
    return weights + ring - part_bytes(table, in_memory(table), itemsize)
