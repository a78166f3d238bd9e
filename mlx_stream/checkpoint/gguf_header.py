"""Reads GGUF headers: metadata and the location of each tensor; loads no models or arrays.

The file is untrusted: every count, length and offset is checked against the file's size before use,
and allocations are bounded. Format: ggml's `docs/gguf.md`, versions 2 and 3.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_stream.config import Keys, shorten
from mlx_stream.errors import CheckpointError

# No published header comes close to these limits: Llama 3's, one of the largest, takes 8 MB and has
# 400,000 strings.
MAX_HEADER_BYTES = 64 * 2**20
MAX_STRINGS = 2_000_000
MAX_ENTRIES = 100_000

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}

# Every ggml type by its number: name, elements per block, bytes per block.
TENSOR_TYPES = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 41: ("Q1_0", 128, 18)},
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144)},
    **{13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98)},
    **{19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110)},
    **{22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56)},
    **{34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36)},
}


@dataclass(frozen=True)
class Tensor:
    """The location of one tensor: `size`, and `offset` from the start of the file `path`, in bytes.

    `shape` is in NumPy's order, which is the reverse of GGUF's.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def file(self) -> str:
        return printable_name(self.path)


@dataclass(frozen=True)
class GGUFHeader:
    """A GGUF file without its data; `file` is its name as used in messages."""

    file: str
    metadata: Keys
    tensors: dict[str, Tensor] = field(default_factory=dict)


def printable_name(path: Path) -> str:
    return path.name if path.name.isprintable() else repr(path.name)


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file (version 2 or 3, little endian).

    In the metadata, numbers become int, float or bool, strings become str, arrays of strings become
    lists, and other arrays become NumPy arrays.

    Raises:
        CheckpointError: the file is not a GGUF file, is damaged or truncated, or exceeds this
            reader's limits.
    """
    file = printable_name(path)
    try:
        # A named pipe would block forever when opened.
        if not path.is_file():
            raise CheckpointError(f"{file}: there is no such file")
        with path.open("rb") as opened:
            size = opened.seek(0, 2)
            if size < 24:
                raise CheckpointError(f"{file}: too small for a GGUF file ({size} bytes)")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return Parser(data, size, file, path.absolute()).header()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error


PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def read_headers(path: Path) -> GGUFHeader:
    """Read the header of a model in one file, or in parts: `NAME-00001-of-00003.gguf` and so on.

    The first part has the metadata. `path` may be any of the parts.

    Raises:
        CheckpointError: as for `read_header`, or parts are missing or belong to different models.
    """
    named = PART.fullmatch(path.name)
    count = int(named[3]) if named else 1
    paths = [path]
    if named and count:
        paths = [
            path.with_name(f"{named[1]}-{n:05d}-of-{named[3]}.gguf") for n in range(1, count + 1)
        ]
    first = read_header(paths[0])
    parts = first.metadata.count("split.count", 1, least=0)
    if max(parts, 1) != len(paths):
        if parts <= 1:
            return read_header(path)
        raise CheckpointError(
            f"{first.file}: one part of {parts}: download all parts and keep their names "
            f"(NAME-00001-of-{parts:05d}.gguf and so on)"
        )
    tensors = dict(first.tensors)
    for number, place in enumerate(paths[1:], start=1):
        if not place.is_file():
            raise CheckpointError(
                f"{first.file}: part {number + 1} of {count} is missing: download it to the same "
                "folder"
            )
        part = read_header(place)
        numbers = [part.metadata.count(f"split.{key}", 0, least=0) for key in ("no", "count")]
        if numbers != [number, count] or tensors.keys() & part.tensors.keys():
            raise CheckpointError(
                f"{part.file}: not part {number + 1} of {count} of {first.file}: download it again"
            )
        tensors |= part.tensors
    if first.metadata.count("split.tensors.count", len(tensors), least=0) != len(tensors):
        raise CheckpointError(f"{first.file}: its parts lack tensors: download them again")
    return replace(first, tensors=tensors)


class Parser:
    """One pass over a header; `place` is the offset of the next byte to read."""

    def __init__(self, data: mmap.mmap, size: int, file: str, path: Path):
        self.data, self.size, self.file, self.path = data, size, file, path
        self.limit = min(size, MAX_HEADER_BYTES)
        self.place = 0
        self.strings_read = 0

    def header(self) -> GGUFHeader:
        tensor_count, key_count = self.preamble()
        values: dict[str, Any] = {}
        for _ in range(key_count):
            [key] = self.strings("a metadata key", 1)
            if key in values:
                raise self.damaged(f"the key {shorten(key)} occurs twice")
            values[key] = self.value(key, self.scalar("I"))
        metadata = Keys(values, self.file)
        alignment = metadata.count("general.alignment", 32)
        if alignment & (alignment - 1):
            raise self.damaged(f"general.alignment {alignment} is not a power of two")
        tensors: dict[str, Tensor] = {}
        for _ in range(tensor_count):
            tensor = self.tensor()
            if tensor.name in tensors:
                raise self.damaged(f"the tensor {shorten(tensor.name)} occurs twice")
            tensors[tensor.name] = tensor
        return GGUFHeader(self.file, metadata, self.laid_out(tensors, alignment))

    def preamble(self) -> tuple[int, int]:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{self.file}: not a GGUF file (it does not begin with GGUF)")
        self.place = 4
        version = self.scalar("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian GGUF" if swapped in (2, 3) else f"GGUF version {version}"
            raise CheckpointError(
                f"{self.file}: {what} is not supported (supported: versions 2 and 3, little endian)"
            )
        tensor_count, key_count = self.scalar("Q"), self.scalar("Q")
        # The smallest tensor entry takes 32 bytes and the smallest key 14.
        for what, count, least in (("tensors", tensor_count, 32), ("keys", key_count, 14)):
            if count > MAX_ENTRIES or count * least > self.size:
                raise self.damaged(f"it claims {count} {what}")
        return tensor_count, key_count

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.strings(shorten(key), 1)[0]
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise self.damaged(f"{shorten(key)} has a value of unknown type {kind}")
        value = self.scalar(SCALARS[kind])
        if kind == BOOL and value > 1:
            raise self.damaged(f"{shorten(key)} is neither true nor false")
        return bool(value) if kind == BOOL else shortest(value) if kind == 6 else value

    def array(self, key: str) -> list[str] | np.ndarray:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == ARRAY:
            raise self.damaged(f"{shorten(key)} is an array of arrays, which is not supported")
        if kind == STRING:
            return self.strings(shorten(key), count)
        if kind not in SCALARS:
            raise self.damaged(f"{shorten(key)} is an array of unknown type {kind}")
        dtype = np.dtype("<" + SCALARS[kind])
        start = self.take(count * dtype.itemsize, f"the array {shorten(key)}")
        return np.frombuffer(self.data[start : self.place], dtype)

    def strings(self, what: str, count: int) -> list[str]:
        """Read `count` strings in a tight loop: most of the time for a header is spent here."""
        self.strings_read += count
        if self.strings_read > MAX_STRINGS:
            raise self.damaged(f"{what} claims {count} strings, more than a header may hold")
        data, limit, place = self.data, self.limit, self.place
        length_at = struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = place + 8
                if start > limit:
                    raise self.ends_early(what)
                place = start + length_at(data, place)[0]
                if place > limit:
                    raise self.ends_early(what)
                found.append(data[start:place].decode())
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None
        self.place = place
        return found

    def tensor(self) -> Tensor:
        """Read one entry; its offset is still relative to the start of the data."""
        [name] = self.strings("a tensor's name", 1)
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= 4:
            raise self.damaged(f"the tensor {shorten(name)} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        number, offset = self.scalar("I"), self.scalar("Q")
        if number not in TENSOR_TYPES:
            raise self.damaged(f"the tensor {shorten(name)} has the unknown type {number}")
        kind, block, block_bytes = TENSOR_TYPES[number]
        elements = math.prod(shape)
        if not 1 <= elements < 2**60 or shape[-1] % block:
            raise self.damaged(f"the tensor {shorten(name)} of type {kind} has shape {shape}")
        return Tensor(self.path, name, kind, shape, offset, elements // block * block_bytes)

    def laid_out(self, tensors: dict[str, Tensor], alignment: int) -> dict[str, Tensor]:
        """Check that tensors are aligned, disjoint and inside the file; make offsets absolute."""
        begin = end = -(-self.place // alignment) * alignment
        placed = {}
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            name, offset = shorten(tensor.name), begin + tensor.offset
            if tensor.offset % alignment:
                raise self.damaged(f"the tensor {name} is not aligned to {alignment} bytes")
            if offset < end:
                raise self.damaged(f"the tensor {name} overlaps the one before it")
            end = offset + tensor.size
            if end > self.size:
                raise CheckpointError(
                    f"{self.file}: the tensor {name} ends at byte {end}, but the file ends "
                    f"at {self.size}: it is truncated or damaged; download it again"
                )
            placed[tensor.name] = replace(tensor, offset=offset)
        return placed

    def scalar(self, code: str) -> Any:
        start = self.take(struct.calcsize("<" + code), "its header")
        return struct.unpack_from("<" + code, self.data, start)[0]

    def take(self, size: int, what: str) -> int:
        start = self.place
        if size > self.limit - start:
            raise self.ends_early(what)
        self.place = start + size
        return start

    def ends_early(self, what: str) -> CheckpointError:
        if self.limit < self.size:
            return self.damaged(f"{what} runs past the {MAX_HEADER_BYTES} bytes a header may take")
        return CheckpointError(
            f"{self.file}: the file ends inside {what}: it is truncated or damaged; "
            "download it again"
        )

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: damaged GGUF header: {what}")


def shortest(value: float) -> float:
    """Return the shortest decimal equal to a value as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
