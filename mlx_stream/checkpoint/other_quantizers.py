"""Converts matrices that other tools quantized (AWQ, GPTQ, fp8) to MLX's format, one at a time.

AWQ and GPTQ codes are repacked into affine groups without rounding:

GPTQ, 4 bits    qweight (inputs / 8, outputs): input 8 r + k in bits 4 k of row r
AWQ             qweight (inputs, outputs / 8): outputs 0, 2, 4, 6, 1, 3, 5, 7 in bits 0, 4, 8, ...
both            qzeros (groups, outputs / 8), scales (groups, outputs); scale * (code - zero)

fp8 becomes floats: E4M3 weights (outputs, inputs) times one scale per matrix, row or block.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.gguf_blocks import pack_codes
from mlx_stream.config import OTHER_QUANTIZERS, QUANTIZATION_MODES, Keys, read_config
from mlx_stream.errors import ConfigError, WeightsError
from mlx_stream.models.layout import layout_of

FP8_SCALES = ("weight_scale_inv", "weight_scale")
# Scales of activations and of the cache, neither of which is quantized here.
NOT_READ = ("activation_scale", "input_scale", "k_scale", "v_scale")
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of each of eight outputs
# Suffixes of the tensors that are read for a matrix; any others are unknown to the model, which
# refuses them.
ENDS = ("weight", *FP8_SCALES, "qweight", "qzeros", "scales", "g_idx")
# How many numbers are converted at a time.
CHUNK = 2**22
GROUPS = QUANTIZATION_MODES["affine"][1]


def in_mlx_bits(checkpoint: Checkpoint, dtype: mx.Dtype) -> Checkpoint:
    """Return a checkpoint with its matrices in MLX's format; other checkpoints are unchanged.

    Args:
        dtype: the dtype of matrices that were fp8; the scales of others are float32 for now and
            are narrowed to this dtype later.

    Raises:
        ConfigError: the format is not supported.
        WeightsError: tensors of a matrix are missing or (raised when reading it) inconsistent.
    """
    entry = checkpoint.config.get("quantization_config")
    if not isinstance(entry, Mapping):
        return checkpoint
    method = entry.get("quant_method")
    if checkpoint.config.get("quantization") is not None or method not in OTHER_QUANTIZERS:
        return checkpoint
    keys = Keys(entry, "config: quantization_config")
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if method == "fp8":
        blocks = read_blocks(keys)
        parts = partial(fp8_parts, blocks, dtype)
        tensors = MadeTensors(checkpoint.tensors, FP8_SCALES, parts)
        return replace(checkpoint, config=config, tensors=tensors)
    packing = read_packing(keys, method)
    tensors = MadeTensors(checkpoint.tensors, ("qweight",), packing.parts)
    config["quantization"] = {"group_size": packing.group, "bits": packing.bits, "mode": "affine"}
    known = frozenset(layout_of(read_config(config)).tensor_names())
    for name in [name for name in tensors if name.endswith(".bias") and name not in known]:
        if not tensors[name].any().item():  # AutoGPTQ gives every matrix a bias
            del tensors[name]
    name = str(dtype).removeprefix("mlx.core.")
    return replace(checkpoint, config=config, tensors=tensors, dtype=name)


Tensors = Mapping[str, mx.array]
Make = Callable[[], mx.array]


class MadeTensors(MutableMapping[str, mx.array]):
    """A checkpoint's tensors, each built on access; deleting one releases its sources.

    Args:
        marks: a matrix that was quantized has a tensor whose name ends in one of these.
        parts: maps such a matrix's module path and its tensors, by the last part of their names,
            to functions that build the new tensors.
    """

    def __init__(
        self,
        source: Tensors,
        marks: tuple[str, ...],
        parts: Callable[[str, Tensors], dict[str, Make]],
    ):
        paths = {name.rpartition(".")[0] for name in source if name.endswith(marks)}
        matrices: dict[str, dict[str, mx.array]] = {path: {} for path in sorted(paths)}
        self._made: dict[str, Make] = {}
        for name, tensor in source.items():
            path, _, end = name.rpartition(".")
            if path in matrices and end in ENDS:
                matrices[path][end] = tensor
            elif not name.endswith(NOT_READ):
                self._made[name] = partial(same, tensor)
        for path, tensors in matrices.items():
            self._made |= {f"{path}.{end}": m for end, m in parts(path, tensors).items()}

    def __getitem__(self, name: str) -> mx.array:
        return self._made[name]()

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __setitem__(self, name: str, tensor: mx.array) -> None:
        raise TypeError("a checkpoint's tensors cannot be replaced")

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def same(tensor: mx.array) -> mx.array:
    return tensor


def take(
    path: str, tensors: Tensors, end: str, dtypes: tuple[mx.Dtype, ...], dims: int
) -> mx.array:
    """Return a tensor of a matrix after checking its dtype and dimensions."""
    tensor = tensors.get(end)
    if tensor is None:
        raise WeightsError(f"weights: tensor '{path}.{end}' is missing")
    if tensor.dtype not in dtypes or tensor.ndim > dims or (dims == 2 and tensor.ndim < dims):
        raise WeightsError(f"weights: '{path}.{end}' is {tensor.dtype} of shape {tensor.shape}")
    return tensor


# --- fp8 ---

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def read_blocks(keys: Keys) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, or None."""
    size = keys.raw.get("weight_block_size")
    if size is None:
        return None
    whole = isinstance(size, list) and all(type(n) is int and 1 <= n < 2**20 for n in size)
    if not whole or len(size) != 2:
        raise keys.wrong("weight_block_size", "an array of two whole numbers")
    return size[0], size[1]


def fp8_parts(
    blocks: tuple[int, int] | None, dtype: mx.Dtype, path: str, tensors: Tensors
) -> dict[str, Make]:
    return {"weight": partial(fp8_weight, blocks, dtype, path, tensors)}


def fp8_weight(
    blocks: tuple[int, int] | None, dtype: mx.Dtype, path: str, tensors: Tensors
) -> mx.array:
    """Return a matrix as floats, computed in float32, some rows at a time."""
    weight = take(path, tensors, "weight", (mx.uint8,), 2)
    end = next(end for end in FP8_SCALES if end in tensors)
    scale = tensors[end]
    rows, columns = weight.shape
    high, wide = (min(blocks[0], rows), min(blocks[1], columns)) if blocks else (1, columns)
    shape = (-(-rows // high), -(-columns // wide))
    if scale.dtype not in FLOATS or (scale.size != 1 and scale.shape != shape):
        raise WeightsError(
            f"weights: '{path}.{end}' is {scale.dtype} of shape {scale.shape}, expected floats of "
            f"shape {shape}, or a single number"
        )
    scale = mx.broadcast_to(scale.reshape(1), shape) if scale.size == 1 else scale
    step = max(1, CHUNK // columns // high)  # rows of blocks
    done: list[mx.array] = []
    for start in range(0, shape[0], step):
        part = mx.from_fp8(weight[start * high : (start + step) * high], mx.float32)
        factors = mx.repeat(scale[start : start + step].astype(mx.float32), high, 0)[: len(part)]
        factors = factors if wide == columns else mx.repeat(factors, wide, 1)[:, :columns]
        done.append((part * factors).astype(dtype))
        mx.eval(done)
    return mx.concatenate(done)


# --- AWQ and GPTQ ---


def read_packing(keys: Keys, method: str) -> "Packing":
    bits = keys.count("bits", 4)
    group = keys.raw.get("group_size", 128)
    form = keys.raw.get("version" if method == "awq" else "checkpoint_format")
    forms = ("gemm",) if method == "awq" else ("gptq", "gptq_v2")
    if form not in (None, *forms) or bits not in ((4,) if method == "awq" else (2, 4, 8)):
        raise ConfigError(
            f"config: quantization_config: {method} with {bits} bits in format {str(form)[:40]!r} "
            "is not supported"
        )
    if group != -1:
        group = keys.count("group_size", 128)
        if group not in GROUPS and group % GROUPS[-1]:
            raise ConfigError(
                f"config: quantization_config: group_size {group} is not supported (supported: "
                f"{', '.join(map(str, GROUPS))}, multiples of {GROUPS[-1]}, and -1)"
            )
    lowest = 1 if method == "gptq" and form != "gptq_v2" else 0
    return Packing(method == "awq", bits, group, lowest)


@dataclass(frozen=True)
class Packing:
    """How the codes of a model are packed.

    Attributes:
        awq: whether codes are packed along the outputs in AWQ's order, not along the inputs.
        group_size: the number of inputs that share a scale; -1 means all of them.
        lowest: the number to add to a stored zero point.
    """

    awq: bool
    bits: int
    group_size: int
    lowest: int

    @property
    def group(self) -> int:
        """The group size in MLX: larger groups are split into groups with the same scale."""
        return self.group_size if self.group_size in GROUPS else GROUPS[-1]

    def parts(self, path: str, tensors: Tensors) -> dict[str, Make]:
        return {
            end: partial(make, path, tensors)
            for end, make in (
                ("weight", self.weight),
                ("scales", self.scales),
                ("biases", self.biases),
            )
        }

    def shape(self, path: str, tensors: Tensors) -> tuple[int, int, int]:
        """Return the inputs, outputs and groups of a matrix after checking its tensors' shapes."""
        per = 32 // self.bits
        packed = take(path, tensors, "qweight", (mx.int32,), 2).shape
        inputs, outputs = (packed[0], packed[1] * per) if self.awq else (packed[0] * per, packed[1])
        size = inputs if self.group_size == -1 else self.group_size
        groups = inputs // size
        expected = {"scales": (groups, outputs), "qzeros": (groups, outputs // per)}
        for end, shape in expected.items():
            dtypes = (mx.int32,) if end == "qzeros" else FLOATS
            if take(path, tensors, end, dtypes, 2).shape != shape or inputs % size:
                raise WeightsError(
                    f"weights: '{path}.{end}' has shape {tensors[end].shape}, expected {shape}"
                )
        return inputs, outputs, groups

    def weight(self, path: str, tensors: Tensors) -> mx.array:
        """Return the codes as `mx.quantize` packs them: (outputs, inputs * bits / 32) uint32."""
        inputs, outputs, groups = self.shape(path, tensors)
        order = tensors.get("g_idx")
        if order is not None:
            plain = np.arange(inputs) // (inputs // groups)
            if order.shape != (inputs,) or not np.array_equal(np.array(order), plain):
                raise WeightsError(
                    f"weights: {path} has reordered inputs (act-order, desc_act), which "
                    "is not supported: use the model without it, or unquantized"
                )
        words = np.array(tensors["qweight"], copy=False)
        found = np.empty((outputs, inputs * self.bits // 32), "<u4")
        per = 32 // self.bits
        step = max(1, CHUNK // inputs // per) * per  # outputs at a time
        for start in range(0, outputs, step):
            end = min(start + step, outputs)
            if self.awq:
                codes = self.unpack(words[:, start // per : end // per]).T
            else:
                codes = self.unpack(words[:, start:end].T)
            packed = pack_codes(np.ascontiguousarray(codes), self.bits)
            found[start:end] = packed.view("<u4").reshape(end - start, -1)
        return mx.array(found)

    def scales(self, path: str, tensors: Tensors) -> mx.array:
        inputs, _, groups = self.shape(path, tensors)
        scales = tensors["scales"].T.astype(mx.float32)
        return mx.repeat(scales, inputs // groups // self.group, 1)

    def biases(self, path: str, tensors: Tensors) -> mx.array:
        inputs, _, groups = self.shape(path, tensors)
        stored = np.array(tensors["qzeros"], copy=False)
        zeros = self.unpack(stored) + np.uint8(self.lowest) & np.uint8(2**self.bits - 1)
        biases = tensors["scales"].T.astype(mx.float32) * -mx.array(zeros.T.astype(np.float32))
        return mx.repeat(biases, inputs // groups // self.group, 1)

    def unpack(self, words: np.ndarray) -> np.ndarray:
        """Unpack int32 words (rows, words) into uint8 codes (rows, words * 32 / bits)."""
        packed = np.ascontiguousarray(words).view(np.uint32)
        per, mask = 32 // self.bits, np.uint32(2**self.bits - 1)
        codes = np.empty((*packed.shape, per), np.uint8)
        for place in range(per):
            shift = self.bits * (AWQ_PLACES[place] if self.awq else place)
            codes[..., place] = packed >> np.uint32(shift) & mask
        return codes.reshape(len(packed), -1)
