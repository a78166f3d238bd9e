"""Saves and loads a stream's state as one safetensors file; independent of conversations.

The file holds the arrays of `TokenStream.state()`. Its metadata holds the integers of the state,
the caller's notes, the model's fingerprint and a checksum over everything. A snapshot is untrusted:
all of it is checked before any of it is used.
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
VERSION = 2  # version 1 has a different kind of fingerprint and different notes
LONGEST_HEADER = 16 * 2**20  # bytes; real headers take a few kilobytes
State = dict[str, mx.array | int]
STATE_DTYPES = {**DTYPES, "uint32": mx.uint32}


@dataclass(frozen=True)
class Snapshot:
    """A saved stream.

    Attributes:
        state: the argument of `TokenStream.restore`.
        about: the caller's notes, as plain JSON values.
        model: the fingerprint of the model it belongs to.
        version: the version of the file format, from 1.
    """

    state: State
    about: dict[str, Any]
    model: str
    version: int = VERSION


def save_snapshot(path: Path, stream: TokenStream, model: str, about: dict[str, Any]) -> None:
    """Write a stream to `path`, replacing any file there; only this user may read it.

    The replacement is atomic, and on disk when this returns.

    Args:
        model: the model's fingerprint.
        about: notes to save with it, as plain JSON values.

    Raises:
        SnapshotError: it could not be written; the previous file is unchanged.
    """
    path = path.absolute()
    state = stream.state()
    arrays = {name: value for name, value in state.items() if isinstance(value, mx.array)}
    # safetensors has no empty tensors, such as the sinks of a stream without sinks.
    empty = {name: array for name, array in arrays.items() if not array.size}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "numbers": {name: value for name, value in state.items() if isinstance(value, int)},
        "empty": {n: [a.shape, str(a.dtype).removeprefix("mlx.core.")] for n, a in empty.items()},
        "about": about,
    }
    arrays = {name: array for name, array in arrays.items() if name not in empty}
    text = json.dumps(header)
    metadata = {"header": text, "checksum": checksum(text, arrays)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(path.parent, path.name) as folder:
            written = folder / "stream.safetensors"  # MLX would append another suffix
            written.touch(mode=0o600)
            mx.save_safetensors(str(written), arrays, metadata)
            check_shard(written)
            flush(written)
            written.replace(path)
            flush(path.parent)
    except (OSError, RuntimeError, CheckpointError) as error:
        raise SnapshotError(f"{path}: could not be written: {one_line(error)}") from error


def load_snapshot(path: Path, most: int | None = None, longest: int = LONGEST_HEADER) -> Snapshot:
    """Read a snapshot. Its arrays are evaluated, so the file may be replaced afterwards.

    Args:
        most: the largest file to accept, in bytes. Default: this device's memory budget.
        longest: the longest header to accept, in bytes; once parsed, it takes more memory.

    Raises:
        SnapshotError: the file is missing, damaged, too large or not a snapshot.
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
            raise ValueError("its checksum does not match")
        if not all(mx.isfinite(array).all().item() for array in arrays.values()):
            raise ValueError("keys or values are not finite")
        empty = {name: empty_array(*kind) for name, kind in header["empty"].items()}
        state: State = {**header["numbers"], **arrays, **empty}
        if len(state) < len(header["numbers"]) + len(arrays) + len(empty):
            raise ValueError("two values have the same name")
        version = int(header["version"])
        return Snapshot(state, dict(header["about"]), str(header["model"]), version)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{path}: not a saved stream: unrecognised header") from error
    except (OSError, CheckpointError, RuntimeError, ValueError, MemoryError) as error:
        reason = "it does not exist" if not os.path.lexists(path) else one_line(error)
        raise SnapshotError(f"{path}: not a saved stream: {reason}") from error


def check_file(path: Path, most: int) -> None:
    """Check that `path` is a file of at most `most` bytes, not a pipe that would block."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size:,} bytes, more than the {most:,} that this stream can have")


def empty_array(shape: Any, dtype: Any) -> mx.array:
    """Return an array that has no elements."""
    sizes = [*shape]
    # The shape is checked before allocation: a forged one could have any size.
    if 0 not in sizes or not all(type(n) is int and 0 <= n <= LARGEST_DIMENSION for n in sizes):
        raise ValueError("an array without values has a shape that is not empty")
    if dtype not in STATE_DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    return mx.zeros(sizes, STATE_DTYPES[dtype])


def sweep_partial(path: Path) -> None:
    """Remove the partial files left behind by processes killed while writing `path`."""
    with suppress(OSError):  # leftovers do no harm
        sweep_partial_folders(path.parent.absolute(), path.name)


def is_snapshot(path: Path) -> bool:
    """Return whether a file looks like a snapshot, judging by its header; it may be damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return FORMAT.encode() in file.read(min(length, LONGEST_HEADER))
    except OSError:
        return False


def checksum(header: str, arrays: dict[str, mx.array]) -> str:
    """Return the SHA-256 of the header and of every array's name, shape, dtype and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(raw_bytes(array))
    return digest.hexdigest()
