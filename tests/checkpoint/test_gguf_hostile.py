"""Hostile GGUF files: each is read or refused with one line, without allocating what it claims."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mlx_stream.checkpoint.gguf_header import read_header
from mlx_stream.errors import CheckpointError, MlxStreamError, WeightsError
from tests.fakes.gguf_files import array, forged, key, read_all, refused, tensor, text, write_tiny

LLAMA = key("general.architecture", 8, text("llama"))
FOUR = bytes(64)
U64 = 2**64 - 1


FORGED = [
    (b"", "too few"),
    (b"GGUF" + bytes(8), "too few"),
    (b"GGML" + bytes(40), "not a GGUF file"),
    (forged(version=1) + FOUR, "GGUF version 1 is not supported"),
    (forged(version=3 << 24) + FOUR, "big-endian GGUF"),
    (forged(key_count=U64) + FOUR, f"claims {U64} keys"),
    (forged(tensor_count=U64) + FOUR, f"claims {U64} tensors"),
    (forged((LLAMA,), key_count=2), "a metadata key has 0 bytes"),
    (forged((LLAMA, LLAMA)), "occurs twice"),
    (forged((key(b"\xff\xfe", 4, bytes(4)),)), "not UTF-8"),
    (forged((key("a", 8, text(b"\xc3")),)), "not UTF-8"),
    (forged((key("a", 13, bytes(8)),)), "unknown type 13"),
    (forged((key("a", 7, b"\x02"),)) + FOUR, "neither true nor false"),
    (forged((key("a", 9, array(9, 1, array(4, 1, bytes(4)))),)), "array of arrays"),
    (forged((key("a", 9, array(99, 1)),)), "array of unknown type 99"),
    (forged((key("a", 9, array(4, 2**62)),)), "truncated"),
    (forged((key("a", 9, array(0, U64)),)), "truncated"),
    (forged((key("a", 9, array(8, 2**61)),)), f"claims {2**61} strings"),
    (forged((key("a", 9, array(8, U64)),)), f"claims {U64} strings"),
    (forged((key("a", 9, array(8, 1, b"\xff" * 8)),)), "truncated"),
    (forged((key("", 4, bytes(4)),)) + FOUR, "a metadata key has 0 bytes"),
    (forged((key("a" * 70_000, 4, bytes(4)),)), "a metadata key has 70000 bytes"),
    (forged((LLAMA,), (tensor("w", (4,)),) * 2, FOUR), "'w' occurs twice"),
    (forged((LLAMA,), (tensor("w", ()),), FOUR), "0 dimensions"),
    (forged((LLAMA,), (tensor("w", (1,) * 5),), FOUR), "5 dimensions"),
    (forged((LLAMA,), (tensor("w", (4,), kind=77),), FOUR), "unknown type 77"),
    (forged((LLAMA,), (tensor("w", (0, 4)),), FOUR), "has shape (4, 0)"),
    (forged((LLAMA,), (tensor("w", (2**32,) * 4),), FOUR), "has shape"),
    (forged((LLAMA,), (tensor("w", (U64,) * 4),), FOUR), "has shape"),
    (forged((LLAMA,), (tensor("w", (33,), kind=2),), FOUR), "type Q4_0 has shape (33,)"),
    (forged((LLAMA,), (tensor("w", (2**40,)),), FOUR), "truncated"),
    (forged((LLAMA,), (tensor("w", (4,), offset=2**63),), FOUR), "truncated"),
    (forged((LLAMA,), (tensor("w", (4,), offset=U64),), FOUR), "not aligned"),
    (forged((LLAMA,), (tensor("w", (4,), offset=8),), FOUR), "not aligned"),
    (forged((LLAMA,), (tensor("v", (4,)), tensor("w", (4,))), FOUR), "overlaps"),
    (forged((LLAMA,), (tensor("v", (9,)), tensor("w", (4,), offset=32)), FOUR), "overlaps"),
    (forged((LLAMA,), (tensor("a\nb\u2028", (4,), kind=12),), FOUR), "'a\\nb\\u2028'"),
    (forged((key("general.architecture", 8, text("x\n" * 999)),)), "'x\\nx\\n"),
    (forged((key("general.alignment", 4, b"\0\0\0\0"),)) + FOUR, "general.alignment"),
    (forged((key("general.name", 8, text("x")),)), "no general.architecture"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(("content", "message"), FORGED, ids=[message for _, message in FORGED])
def test_forged_headers_are_refused_without_allocating(path: Path, content: bytes, message: str):
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert message in refused(path, CheckpointError)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_refused(path: Path):
    assert "no such file" in refused(path, CheckpointError)
    path.mkdir()
    assert "no such file" in refused(path, CheckpointError)


def test_a_forged_count_of_layers_ends_at_once(path: Path):
    write_tiny(path, keys={"llama.block_count": 2**31 - 1})
    assert "blk.2.attn_norm.weight is missing" in refused(path, WeightsError)


def test_a_file_cut_anywhere_is_refused(path: Path):
    write_tiny(path)
    content = path.read_bytes()
    size = len(content)
    for length in (*range(300), *range(300, size, 401), *range(size - 20, size)):
        path.write_bytes(content[:length])
        refused(path, CheckpointError)


@pytest.mark.parametrize("seed", range(4))
def test_a_file_with_wrong_bytes_is_read_or_refused_in_one_line(path: Path, seed: int):
    write_tiny(path, ["Q4_0", "Q4_1", "Q8_0", "F16"][seed])
    content = path.read_bytes()
    header_size = min(tensor.offset for tensor in read_header(path).tensors.values())
    random = np.random.default_rng(seed)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(150):
        mutant = bytearray(content)
        # The header's ends are its numbers; between them lie long tables of strings.
        low, high = [(0, 900), (header_size - 2_000, header_size), (0, len(content))][
            int(random.integers(3))
        ]
        for place in random.integers(low, high, int(random.integers(1, 4))).tolist():
            width = int(random.choice([1, 1, 4, 8]))
            forged_bytes = bytes([int(random.choice([0, 1, 127, 255]))]) * width
            chosen = forged_bytes if random.random() < 0.5 else random.bytes(width)
            mutant[place : place + width] = chosen
        path.write_bytes(mutant)
        try:
            read_all(path)
            outcomes["read"] += 1
        except MlxStreamError as error:
            assert len(str(error).splitlines()) == 1
            assert path.name in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes
