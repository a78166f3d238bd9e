"""Saves and loads a stream's state as one safetensors file; independent of conversations.

The file holds the arrays of `TokenStream.state()`, without the rows at their ends that were never
written. Its metadata holds the integers of the state, the caller's notes, the model's fingerprint
and a checksum over everything. A snapshot is untrusted: all of it is checked before any of it is
used.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.checkpoint.shards import LARGEST_DIMENSION, check_opened, check_shard
from mlx_stream.errors import CheckpointError, SnapshotError, one_line
from mlx_stream.generate.token_stream import IDS, TokenStream
from mlx_stream.models.fingerprint import raw_bytes
from mlx_stream.models.weights import DTYPES
from mlx_stream.program.atomic_replace import flush, partial_folder, sweep_partial_folders

FORMAT = "mlx_stream stream"
# Version 2 stores all rows; version 1 has a different kind of fingerprint and different notes.
VERSION = 3
LONGEST_HEADER = 16 * 2**20  # bytes; real headers take a few kilobytes
State = dict[str, mx.array | int]
STATE_DTYPES = {**DTYPES, "uint32": mx.uint32}
SAFETENSORS_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
}
ALIGNMENT = 8  # bytes; the alignment of the arrays in a safetensors file


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

    The replacement is atomic, and is on disk when this returns.

    Args:
        model: the model's fingerprint.
        about: notes to save with it, as plain JSON values.

    Raises:
        SnapshotError: it could not be written; the previous file is unchanged.
    """
    for _ in save_steps(path, stream, model, about):
        pass


def save_steps(
    path: Path, stream: TokenStream, model: str, about: dict[str, Any]
) -> Generator[None, None, None]:
    """Like `save_snapshot`, but a generator that pauses after each array.

    The stream may be used meanwhile: what is written is its state at the first step. If the
    generator is closed early, the previous file is unchanged.
    """
    path = path.absolute()
    state = stream.state()
    found = {name: value for name, value in state.items() if isinstance(value, mx.array)}
    arrays = {name: first_rows(array, written_rows(name, state)) for name, array in found.items()}
    # safetensors has no empty tensors, such as the sinks of a stream without sinks.
    empty = {name: array for name, array in arrays.items() if not array.size}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "numbers": {name: value for name, value in state.items() if isinstance(value, int)},
        "empty": {n: [a.shape, str(a.dtype).removeprefix("mlx.core.")] for n, a in empty.items()},
        "rows": {n: a.shape[2] for n, a in found.items() if a.shape != arrays[n].shape},
        "about": about,
    }
    arrays = {name: array for name, array in arrays.items() if name not in empty}
    text, digest = json.dumps(header), hashlib.sha256()
    del state, found
    for part in checksum_parts(text, arrays):
        digest.update(part)
        yield
    metadata = {"header": text, "checksum": digest.hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(path.parent, path.name) as folder:
            written = folder / "stream.safetensors"
            yield from write_steps(written, arrays, metadata)
            check_shard(written)
            written.replace(path)
            flush(path.parent)
    except (OSError, RuntimeError, CheckpointError) as error:
        raise SnapshotError(f"{path}: could not be written: {one_line(error)}") from error


def written_rows(name: str, state: State) -> int | None:
    """Return how many of an array's first rows hold keys or values; None if it has no such rows.

    If the first 5 rows hold ids and 2 of them are sinks, the result is 5 for an array of plain
    rows, and 3 for one of quantized rows, which does not include the sinks.
    """
    ids: Any = state[IDS]
    kind, _, part = name.partition(".")
    if kind not in ("keys", "values") or part.endswith(".sinks"):
        return None
    sinks: Any = state["sinks"] if "." in part else None
    return max(0, ids.size - (sinks.shape[2] if "." in part else 0))


def first_rows(array: mx.array, count: int | None) -> mx.array:
    return array if count is None or count >= array.shape[2] else array[:, :, :count]


def write_steps(
    path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]
) -> Iterator[None]:
    """Write a safetensors file; a generator that pauses after each array, once it is on disk."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        kind = SAFETENSORS_DTYPES[array.dtype]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(opened, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(raw_bytes(array))
            file.flush()
            os.fsync(file.fileno())
            yield


def load_snapshot(path: Path, most: int | None = None, longest: int = LONGEST_HEADER) -> Snapshot:
    """Read a snapshot. Its arrays are evaluated, so the file may be replaced afterwards.

    Args:
        most: the largest file and the largest state to accept, in bytes. Default: this device's
            memory budget.
        longest: the longest header to accept, in bytes; once parsed, it takes more memory.

    Raises:
        SnapshotError: the file is missing, damaged, too large or not a snapshot.
    """
    most = backend.memory_budget() if most is None else most
    try:
        check_file(path, most)
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
        all_rows = with_all_rows({**arrays, **empty}, header.get("rows", {}), most)
        state: State = {**header["numbers"], **all_rows}
        if len(state) < len(header["numbers"]) + len(arrays) + len(empty):
            raise ValueError("two values have the same name")
        version = int(header["version"])
        return Snapshot(state, dict(header["about"]), str(header["model"]), version)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{path}: not a saved stream: unrecognized header") from error
    except (OSError, CheckpointError, RuntimeError, ValueError, MemoryError) as error:
        reason = "it does not exist" if not os.path.lexists(path) else one_line(error)
        raise SnapshotError(f"{path}: not a saved stream: {reason}") from error


def check_file(path: Path, most: int) -> None:
    """Check that `path` is a file of at most `most` bytes, not a pipe that would block."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size:,} bytes; this stream's has at most {most:,}")


def empty_array(shape: Any, dtype: Any) -> mx.array:
    """Return an array that has no elements."""
    sizes = [*shape]
    # The shape is checked before allocation: a forged one could have any size.
    if 0 not in sizes or not all(type(n) is int and 0 <= n <= LARGEST_DIMENSION for n in sizes):
        raise ValueError("an empty array has an invalid shape")
    if dtype not in STATE_DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    return mx.zeros(sizes, STATE_DTYPES[dtype])


def with_all_rows(
    arrays: dict[str, mx.array], rows: dict[str, Any], most: int
) -> dict[str, mx.array]:
    """Return arrays with the omitted rows of zeros restored.

    Args:
        rows: how many rows some of them have; it may be forged.
    """
    total = sum(array.nbytes for array in arrays.values())
    for name, count in rows.items():
        array = arrays[name]
        if type(count) is not int or array.ndim != 4 or not array.shape[2] < count:
            raise ValueError(f"{name!r} cannot have {count!r:.40} rows")
        row_bytes = array.itemsize * math.prod(array.shape[:2]) * array.shape[3]
        total += row_bytes * (count - array.shape[2])
    if total > most:
        raise ValueError(f"it would take {total:,} bytes; the limit is {most:,}")
    return {
        name: mx.pad(array, [(0, 0), (0, 0), (0, rows[name] - array.shape[2]), (0, 0)])
        if name in rows
        else array
        for name, array in arrays.items()
    }


def sweep_partial(path: Path) -> None:
    """Remove the partial files left behind by processes killed while writing `path`."""
    with suppress(OSError):  # leftovers do no harm
        sweep_partial_folders(path.parent.absolute(), path.name)


def read_about(path: Path) -> dict[str, Any]:
    """Return a snapshot's notes without reading its arrays; only `load_snapshot` verifies them.

    Raises:
        SnapshotError: the file is missing, or not a snapshot of this version.
    """
    try:
        check_file(path, sys.maxsize)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(json.loads(file.read(length))["__metadata__"]["header"])
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {header['format']!r:.40}, version {header['version']!r:.40}")
        return dict(header["about"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SnapshotError(f"{path}: not a saved stream: unrecognized header") from error
    except (OSError, ValueError, MemoryError) as error:
        raise SnapshotError(f"{path}: not a saved stream: {one_line(error)}") from error


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
    digest = hashlib.sha256()
    for part in checksum_parts(header, arrays):
        digest.update(part)
    return digest.hexdigest()


def checksum_parts(header: str, arrays: dict[str, mx.array]) -> Iterator[bytes | memoryview]:
    yield header.encode()
    for name in sorted(arrays):
        array = arrays[name]
        yield f"{name} {array.shape} {array.dtype}".encode()
        yield raw_bytes(array)
