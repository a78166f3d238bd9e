"""Finds, checks, reads and writes safetensors shards and their index; independent of models.

Each file is checked by the `safetensors` library (header, offsets, sizes) before `mx.load` opens
it, because MLX's parser trusts the file. Pickles are never read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_stream.checkpoint.json_files import exists_as_file, read_json, write_json
from mlx_stream.errors import CheckpointError, WeightsError, one_line

INDEX = "model.safetensors.index.json"
# In order of preference, for a folder without an index.
PATTERNS = ("model.safetensors", "model-*.safetensors", "weights*.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHARD_BYTES = 10**9  # the maximum size of a shard that we write

# U8 holds the scales of the fp4 and fp8 modes; I32 and F8_E4M3, which MLX opens as bytes, are other
# tools' quantized weights.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "I32": mx.int32,
    "F8_E4M3": mx.uint8,
}
HEADER_BYTES = 8 << 20
# MLX counts the elements of one dimension in 32 bits.
LARGEST_DIMENSION = 2**31 - 1
# MLX's binding crashes the process on a shape with a few thousand dimensions.
MOST_DIMENSIONS = 8

# The tensors that a header declares: dtype, by its safetensors name, and shape.
Declared = Mapping[str, tuple[str, list[int]]]


# --- finding ---


def shard_names(path: Path) -> list[str]:
    """Return the names of a folder's safetensors files: those in its index, or else those found."""
    if exists_as_file(path / INDEX):
        return sorted(set(read_weight_map(path / INDEX).values()))
    for pattern in PATTERNS:
        if names := sorted(file.name for file in path.glob(pattern)):
            return names
    raise CheckpointError(f"{path}: {explain_no_weights(file.name for file in path.glob('*'))}")


def explain_no_weights(names: Iterable[str]) -> str:
    """Return why files with these names are not a model's weights."""
    found = sorted(names)
    if any(name.endswith(PICKLES) for name in found):
        return (
            "no model.safetensors, only pickles (.bin, .pt), which are never read because they can "
            "run code; save the model with transformers' save_pretrained"
        )
    if gguf := [name for name in found if name.endswith(".gguf")]:
        return f"no model.safetensors; download {gguf[0]!r} and give the path of that file instead"
    return "no model.safetensors; expected weights in the safetensors format"


def read_weight_map(index: Path) -> dict[str, str]:
    """Read which shard holds which tensor; every shard must be a file name in the same folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: expected a weight_map object that maps tensors to files")
    for shard in table.values():
        # Allow no drive, and no path separator of any system, so that the name cannot lead out of
        # its folder.
        plain = isinstance(shard, str) and not any(c in shard for c in "/\\:\0")
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {shard!r} is not the name of a safetensors file beside the index"
            )
    return table


# --- reading ---


def read_shards(path: Path) -> dict[str, mx.array]:
    """Open every shard of a folder lazily; its index must agree with the shards."""
    tensors: dict[str, mx.array] = {}
    origin: dict[str, str] = {}
    for shard in shard_names(path):
        if not exists_as_file(path / shard):
            raise CheckpointError(f"{path}: shard {shard!r} is missing; fetch the model again")
        for name, array in read_shard(path / shard).items():
            if name in origin:
                raise WeightsError(f"{path}: {name!r} is in both {origin[name]!r} and {shard!r}")
            tensors[name], origin[name] = array, shard
    if exists_as_file(path / INDEX):
        for name, shard in read_weight_map(path / INDEX).items():
            if origin.get(name) != shard:
                raise WeightsError(
                    f"{path}: {INDEX} says {name!r} is in {shard!r}, which does not contain it"
                )
    if not tensors:
        raise WeightsError(f"{path}: its safetensors files hold no tensors")
    return tensors


def read_shard(path: Path) -> dict[str, mx.array]:
    """Check one safetensors file and open it lazily."""
    declared = check_shard(path)
    try:
        arrays = cast(dict[str, mx.array], mx.load(str(path)))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: MLX cannot open it: {one_line(error)}") from error
    check_opened(path, declared, arrays)
    return arrays


def check_opened(path: Path, declared: Declared, arrays: Mapping[str, mx.array]) -> None:
    """Make sure MLX read the header that was checked: two parsers may interpret it differently."""
    opened = {name: (array.dtype, list(array.shape)) for name, array in arrays.items()}
    if opened != {name: (DTYPES[dtype], shape) for name, (dtype, shape) in declared.items()}:
        raise CheckpointError(f"{path}: its header is ambiguous; fetch the model again")


def check_shard(path: Path) -> Declared:
    """Check the header, offsets and size of a safetensors file; return what it declares."""
    damaged = f"{path}: damaged or truncated; fetch it again"
    try:
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > HEADER_BYTES:
            raise CheckpointError(
                f"{damaged} (its header has {length} bytes; the limit is {HEADER_BYTES})"
            )
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            declared = {n: (str(s.get_dtype()), list(s.get_shape())) for n, s in slices.items()}
    # MemoryError: it claims to be larger than can be mapped.
    except (SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(f"{damaged} ({one_line(error)})") from error
    check_declared(declared, str(path))
    return declared


def check_declared(declared: Mapping[str, tuple[str, list[int]]], where: str) -> None:
    """Reject dtypes and shapes that MLX cannot represent.

    Raises:
        WeightsError: a tensor has such a dtype or shape.
    """
    for name, (dtype, shape) in declared.items():
        if dtype not in DTYPES:
            raise WeightsError(
                f"{where}: {name!r} is {dtype}; expected one of {', '.join(DTYPES)}"
                " (a model in float32, float16, bfloat16 or quantized by mlx-lm)"
            )
        possible = all(isinstance(n, int) and 1 <= n <= LARGEST_DIMENSION for n in shape)
        if len(shape) > MOST_DIMENSIONS or not possible:
            raise WeightsError(f"{where}: {name!r} has the impossible shape {shape!r:.80}")


# --- writing ---


@dataclass
class Shards:
    """What was written: how many files, and the tensor bytes in all files and in the largest."""

    count: int = 0
    tensor_bytes: int = 0
    largest: int = 0


def write_shards(
    tensors: Iterable[tuple[str, mx.array]], folder: Path, limit: int = SHARD_BYTES
) -> Shards:
    """Write tensors in order as `model.safetensors`, or as numbered shards, and an index.

    A shard holds at most `limit` bytes of tensors, or a single tensor; it is released before the
    next tensor is requested.
    """
    written = Shards()
    placed: dict[str, int] = {}
    shard: dict[str, mx.array] = {}
    for name, array in tensors:
        if shard and bytes_of(shard) + array.nbytes > limit:
            write_shard(shard, folder, written)
        placed[name], shard[name] = written.count, array
        del array
    write_shard(shard, folder, written)
    names = ["model.safetensors"]
    if (count := written.count) > 1:
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for place, name in enumerate(names):
        temporary(folder, place).replace(folder / name)
    index = {
        "metadata": {"total_size": written.tensor_bytes},
        "weight_map": {name: names[place] for name, place in sorted(placed.items())},
    }
    write_json(index, folder / INDEX)
    return written


def write_shard(shard: dict[str, mx.array], folder: Path, written: Shards) -> None:
    """Write one shard to a temporary file, check the file, and clear the shard."""
    path, size = temporary(folder, written.count), bytes_of(shard)
    mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
    shard.clear()
    mx.clear_cache()
    check_shard(path)
    written.count += 1
    written.tensor_bytes += size
    written.largest = max(written.largest, size)


def temporary(folder: Path, place: int) -> Path:
    return folder / f"shard-{place}.safetensors"


def bytes_of(tensors: Mapping[str, mx.array]) -> int:
    return sum(array.nbytes for array in tensors.values())
