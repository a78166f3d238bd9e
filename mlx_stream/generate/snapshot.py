"""A stream's state <-> one safetensors file, written atomically; knows no conversation.

Everything that saves a stream does it here. The file holds the arrays of `TokenStream.state()`;
its metadata the whole numbers, what the writer wants to remember, whose model it is, and a
checksum over all of it. A snapshot is untrusted: nothing in it is used before it was checked.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.checkpoint.shards import LARGEST_DIMENSION, check_opened, check_shard
from mlx_stream.errors import CheckpointError, SnapshotError, one_line
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.models.fingerprint import raw_bytes
from mlx_stream.models.weights import DTYPES
from mlx_stream.program.atomic_replace import flush, partial_folder, sweep_partial_folders

FORMAT = "mlx_stream stream"
VERSION = 2  # in version 1 the fingerprint, and what writers remember, were others
# A header of more than this is nobody's: the numbers and notes of a stream are a few kilobytes.
LONGEST_HEADER = 16 * 2**20
State = dict[str, mx.array | int]
STATE_DTYPES = {**DTYPES, "uint32": mx.uint32}


@dataclass(frozen=True)
class Snapshot:
    """A stream's state as it was saved.

    Attributes:
        state: for `TokenStream.restore`.
        about: what the writer wanted to remember, as plain JSON values.
        model: fingerprint of the model it belongs to.
        version: of the file, from 1.
    """

    state: State
    about: dict[str, Any]
    model: str
    version: int = VERSION


def save_snapshot(path: Path, stream: TokenStream, model: str, about: dict[str, Any]) -> None:
    """Write a stream to `path`, in place of what was there; only this user may read it.

    It is whole or not there: written beside it, flushed to disk, renamed, the folder flushed.

    Args:
        model: the model's fingerprint.
        about: plain JSON values to remember with it.

    Raises:
        SnapshotError: it could not be written; what was there before still is.
    """
    path = path.absolute()
    state = stream.state()
    arrays = {name: value for name, value in state.items() if isinstance(value, mx.array)}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "numbers": {name: value for name, value in state.items() if isinstance(value, int)},
        # A file of tensors holds none without values, such as the sinks of a stream without sinks.
        "empty": {n: [a.shape, dtype_name(a)] for n, a in arrays.items() if not a.size},
        "about": about,
    }
    arrays = {name: array for name, array in arrays.items() if array.size}
    text = json.dumps(header)
    metadata = {"header": text, "checksum": checksum(text, arrays)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(path.parent, path.name) as folder:
            written = folder / path.name
            written.touch(mode=0o600)
            # MLX names the file itself if it does not end so.
            unnamed = folder / "stream.safetensors"
            written.rename(unnamed)
            mx.save_safetensors(str(unnamed), arrays, metadata)
            check_shard(unnamed)
            unnamed.chmod(0o600)
            flush(unnamed)
            unnamed.replace(path)
            flush(path.parent)
    except (OSError, RuntimeError, CheckpointError) as error:
        raise SnapshotError(f"{path}: could not be written: {one_line(error)}") from error


def load_snapshot(path: Path, most: int | None = None, longest: int = LONGEST_HEADER) -> Snapshot:
    """Read a snapshot; its arrays are evaluated, so the file may be replaced.

    Args:
        most: bytes the file may have; by default, what this device's memory holds.
        longest: bytes that its numbers and notes may have; as Python's values they take more.

    Raises:
        SnapshotError: it is missing, damaged, larger, or not a stream's.
    """
    try:
        check_file(path, backend.memory_budget() if most is None else most)
        declared = check_shard(path)
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        check_opened(path, declared, arrays)
        text = metadata["header"]
        if len(text) > longest:
            raise ValueError("its header is too long")
        header = json.loads(text)
        if header["format"] != FORMAT or header["version"] not in range(1, VERSION + 1):
            raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
        if metadata["checksum"] != checksum(text, arrays):
            raise ValueError("its checksum does not agree")
        if not all(mx.isfinite(array).all().item() for array in arrays.values()):
            raise ValueError("keys or values are not numbers")
        empty = {name: empty_array(*kind) for name, kind in header["empty"].items()}
        state: State = {**header["numbers"], **arrays, **empty}
        if len(state) < len(header["numbers"]) + len(arrays) + len(empty):
            raise ValueError("two values have one name")
        version = int(header["version"])
        return Snapshot(state, dict(header["about"]), str(header["model"]), version)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{path}: not a saved stream: its header is none of ours") from error
    except (OSError, CheckpointError, RuntimeError, ValueError, MemoryError) as error:
        reason = "is not there" if not os.path.lexists(path) else one_line(error)
        raise SnapshotError(f"{path}: not a saved stream: {reason}") from error


def check_file(path: Path, most: int) -> None:
    """See that `path` is a file, not a pipe that would block, of at most so many bytes."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size:,} bytes, more than the {most:,} of a stream here")


def empty_array(shape: Any, dtype: Any) -> mx.array:
    """Return an array without values."""
    sizes = [*shape]
    # Asked before one is made: a forged one could be of any size.
    if 0 not in sizes or not all(type(n) is int and 0 <= n <= LARGEST_DIMENSION for n in sizes):
        raise ValueError("an array without values has some")
    if dtype not in STATE_DTYPES:
        raise ValueError(f"no such type: {dtype!r}")
    return mx.zeros(sizes, STATE_DTYPES[dtype])


def sweep_partial(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` left beside it."""
    # It is in nobody's way, so what cannot be removed may stay.
    with suppress(OSError):
        sweep_partial_folders(path.parent.absolute(), path.name)


def is_snapshot(path: Path) -> bool:
    """Return whether `save` wrote a file, as far as its header tells; it may be damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return FORMAT.encode() in file.read(min(length, LONGEST_HEADER))
    except OSError:
        return False


def checksum(header: str, arrays: dict[str, mx.array]) -> str:
    """Return the SHA-256 of the header and of every array: name, shape, type and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(raw_bytes(array))
    return digest.hexdigest()


def dtype_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")
