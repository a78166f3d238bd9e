"""Reads a Hugging Face or mlx-lm folder that nobody vouches for; knows files, not modules.

Every safetensors file is checked first by the `safetensors` library (header, offsets, sizes) and
only then handed to `mx.load`, whose own parser trusts what it is given. Pickles are never read.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.errors import CheckpointError, SourceError, TokenizerError, WeightsError, one_line

INDEX = "model.safetensors.index.json"
# The order of preference where a folder has no index.
PATTERNS = ("model.safetensors", "model-*.safetensors", "weights*.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NUMBERED = re.compile(r"(.+-)(\d{5})-of-(\d{5})(\.safetensors)")

# U8 holds the scales of the fp4 and fp8 modes.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}

# Far above any real file (the largest tokenizer.json known has 35 MB): a bound on what a hostile
# file can make us hold.
JSON_BYTES = 8 << 20
HEADER_BYTES = 8 << 20
TOKENIZER_BYTES = 64 << 20
# MLX counts the elements of one dimension in 32 bits.
LARGEST_DIMENSION = 2**31 - 1
# MLX's binding ends the process on a shape of some thousands.
MOST_DIMENSIONS = 8

# What a file declares of one tensor: dtype by its safetensors name, and shape.
Declared = dict[str, tuple[str, list[int]]]


def read_folder(path: Path) -> Checkpoint:
    """Read a folder in the layout of Hugging Face or mlx-lm; its tensors stay lazy.

    Raises:
        SourceError: there is no such folder.
        CheckpointError: config.json, the index or a shard is missing, damaged or truncated.
        WeightsError: tensors are missing, given twice, or of a dtype that is not supported.
        TokenizerError: there is no tokenizer.json, or it is not text.
    """
    try:
        found = path.is_dir()
    except (OSError, ValueError) as error:  # no permission, a name too long, a zero byte
        raise SourceError(f"{path}: cannot be read: {one_line(error)}") from error
    if not found:
        raise SourceError(f"{path}: no such folder")
    if not exists_as_file(path / "config.json"):
        raise CheckpointError(f"{path}: no config.json; expected a folder with a model in it")
    config = read_json(path / "config.json")
    tokenizer = read_tokenizer(path)
    tokenizer_config = read_json_if_there(path / "tokenizer_config.json")
    # transformers writes the template to a file of its own, and lets that file win.
    if exists_as_file(path / "chat_template.jinja"):
        template = read_text_file(path / "chat_template.jinja", JSON_BYTES)
        tokenizer_config["chat_template"] = template
    return Checkpoint(
        config=config,
        tensors=read_shards(path),
        tokenizer=tokenizer,
        tokenizer_config=tokenizer_config,
        generation_config=read_json_if_there(path / "generation_config.json"),
    )


def missing_files(path: Path) -> list[str]:
    """Name the files `read_folder` needs and would not find in `path`, without opening a shard."""
    missing = [
        name for name in ("config.json", "tokenizer.json") if not exists_as_file(path / name)
    ]
    try:
        shards = shard_names(path)
    except CheckpointError:
        return [*missing, "model.safetensors"]
    return missing + [name for name in shards if not exists_as_file(path / name)]


# --- text and JSON ---


def exists_as_file(path: Path) -> bool:
    """Say whether `path` is a regular file: never a folder, nor a pipe that would block."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


def read_bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            # `read` allocates what it is asked for, so it is asked for no more than there is.
            size = os.fstat(file.fileno()).st_size
            data = file.read(size) if size <= limit else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size > limit:
        raise CheckpointError(f"{path}: larger than {limit >> 20} MB, which no such file is")
    return data


def read_text_file(path: Path, limit: int) -> str:
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> dict[str, Any]:
    text = read_text_file(path, JSON_BYTES)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply to be read") from error
    except ValueError as error:  # JSONDecodeError, or a number with thousands of digits
        raise CheckpointError(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, not {json.dumps(value)[:40]}")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if exists_as_file(path) else {}


def read_tokenizer(path: Path) -> str:
    file = path / "tokenizer.json"
    if not exists_as_file(file):
        raise TokenizerError(
            f"{path}: no tokenizer.json; convert it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        return read_text_file(file, TOKENIZER_BYTES)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


# --- shards ---


def read_shards(path: Path) -> dict[str, mx.array]:
    """Open every shard of a folder, and hold its index to what the shards really have."""
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
                    f"{path}: {INDEX} says {name!r} is in {shard!r}, which does not have it"
                )
    if not tensors:
        raise WeightsError(f"{path}: its safetensors files hold no tensors")
    return tensors


def shard_names(path: Path) -> list[str]:
    """Name the safetensors files of a folder: those of its index, or else those in it."""
    if exists_as_file(path / INDEX):
        return sorted(set(read_weight_map(path / INDEX).values()))
    for pattern in PATTERNS:
        if names := sorted(file.name for file in path.glob(pattern)):
            return sorted({name for found in names for name in whole_set(found)})
    raise CheckpointError(f"{path}: no model.safetensors{explain_no_weights(path)}")


def whole_set(name: str) -> Iterator[str]:
    """Name all shards of the set that `name` counts itself into, so that a gap is noticed."""
    match = NUMBERED.fullmatch(name)
    # A count that no model reaches is not taken at its word.
    if match is None or int(match[3]) > 1_000:
        yield name
        return
    stem, _, count, suffix = match.groups()
    yield from (f"{stem}{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1))
    yield name


def explain_no_weights(path: Path) -> str:
    if any(file for pattern in PICKLES for file in path.glob(pattern)):
        return (
            ", only pickles (.bin, .pt), which are never read because they can run code; "
            "save it with transformers' save_pretrained"
        )
    if gguf := sorted(file.name for file in path.glob("*.gguf")):
        return f"; it holds {gguf[0]!r}: name that file instead"
    return " and no shards of one; expected weights in the safetensors format"


def read_weight_map(index: Path) -> dict[str, str]:
    """Read which shard holds which tensor; every shard must be a plain name in the same folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: expected an object weight_map from tensors to files")
    for shard in table.values():
        if not isinstance(shard, str) or not is_plain_shard(shard):
            raise CheckpointError(
                f"{index}: {shard!r} is not the name of a safetensors file beside the index"
            )
    return table


def is_plain_shard(name: str) -> bool:
    """Say whether `name` cannot lead out of its folder: no separator of any system, no device."""
    return name.endswith(".safetensors") and not any(c in name for c in "/\\:\0")


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
    """See that MLX read a header as it was checked: two parsers may read one in two ways."""
    opened = {name: (array.dtype, list(array.shape)) for name, array in arrays.items()}
    if opened != {name: (DTYPES[dtype], shape) for name, (dtype, shape) in declared.items()}:
        raise CheckpointError(f"{path}: its header is ambiguous; fetch the model again")


def check_shard(path: Path) -> Declared:
    """Check header, offsets and size of a safetensors file; return what it declares."""
    try:
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > HEADER_BYTES:
            raise CheckpointError(
                f"{path}: damaged or truncated, fetch it again (a header of {length} bytes, more "
                f"than {HEADER_BYTES})"
            )
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            declared = {n: (str(s.get_dtype()), list(s.get_shape())) for n, s in slices.items()}
    # MemoryError: it claims to be larger than what can be mapped.
    except (SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated, fetch it again ({one_line(error)})"
        ) from error
    for name, (dtype, shape) in declared.items():
        if dtype not in DTYPES:
            raise WeightsError(
                f"{path}: {name!r} is {dtype}; expected one of {', '.join(DTYPES)}"
                " (a model in float32, float16, bfloat16 or quantized by mlx-lm)"
            )
        if len(shape) > MOST_DIMENSIONS or not all(1 <= n <= LARGEST_DIMENSION for n in shape):
            raise WeightsError(f"{path}: {name!r} has the impossible shape {shape}")
    return declared
