"""A saved stream continues bit for bit, is complete or absent, and is never trusted."""

import errno
import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from tests.fakes.tiny_models import some_ids

Make = Callable[..., Model]


def new(model: Model, sinks: int = 2, window: int = 20, spare: int = 0) -> TokenStream:
    return TokenStream(model, model.new_cache(sinks, window, spare))


def read(stream: TokenStream, ids: list[int], chunk: int = 7) -> np.ndarray:
    return np.array(stream.read(ids, chunk).astype(mx.float32))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("length", [0, 1, 9, 70])
def test_a_restored_stream_continues_with_the_same_bits(
    tiny_model: Make, tmp_path: Path, dtype: mx.Dtype, sinks: int, length: int
) -> None:
    model = tiny_model(dtype)
    stream, ids = new(model, sinks), some_ids(120)
    if length:
        read(stream, ids[:length])
    path = tmp_path / "saved"
    snapshot.save_snapshot(path, stream, "model", {"turn": 3})
    loaded = snapshot.load_snapshot(path)
    other = new(model, sinks)
    other.restore(loaded.state)
    assert (loaded.about, loaded.model) == ({"turn": 3}, "model")
    assert other.ids.attended() == stream.ids.attended()
    assert np.array_equal(read(other, ids[length:]), read(stream, ids[length:]))
    assert other.ids.attended() == stream.ids.attended()


def test_the_last_snapshot_survives_a_full_disk(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = new(tiny_model())
    read(stream, [1, 2, 3])
    path = tmp_path / "s"
    snapshot.save_snapshot(path, stream, "m", {"turn": 1})
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SnapshotError, match=r"could not be written: .*No space"):
            snapshot.save_snapshot(path, stream, "m", {"turn": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SnapshotError, match="could not be written"):
        snapshot.save_snapshot(path / "s", stream, "m", {})


def test_a_save_that_is_given_up_keeps_the_file(tiny_model: Make, tmp_path: Path) -> None:
    stream, path = new(tiny_model()), tmp_path / "s"
    read(stream, [1, 2, 3])
    snapshot.save_snapshot(path, stream, "m", {"turn": 1})
    steps = snapshot.save_steps(path, stream, "m", {"turn": 2})
    count = sum(1 for _ in snapshot.save_steps(tmp_path / "other", stream, "m", {}))
    for _ in range(count - 1):
        next(steps)
    assert len([*tmp_path.iterdir()]) == 3
    steps.close()
    assert snapshot.load_snapshot(path).about == {"turn": 1}
    assert {one.name for one in tmp_path.iterdir()} == {"s", "other"}


def test_a_stream_may_be_used_while_it_is_saved(tiny_model: Make, tmp_path: Path) -> None:
    """The saved state is the state at the moment saving began."""
    model, path, ids = tiny_model(), tmp_path / "s", some_ids(90)
    stream, twin, other = new(model), new(model), new(model)
    for one in (stream, twin):
        read(one, ids[:30])
    steps = snapshot.save_steps(path, stream, "m", {})
    next(steps)
    read(stream, ids[30:60])
    for _ in steps:
        read(stream, [3])
    other.restore(snapshot.load_snapshot(path).state)
    assert other.ids.attended() == twin.ids.attended()
    assert np.array_equal(read(other, ids[60:]), read(twin, ids[60:]))


@pytest.mark.parametrize("bits", [None, 8])
def test_rows_that_were_never_written_take_no_space(
    tiny_model: Make, tmp_path: Path, bits: int | None
) -> None:
    model = tiny_model(head_dim=64, max_position_embeddings=4_096)
    stream, other = (TokenStream(model, model.new_cache(4, 2_000, kv_bits=bits)) for _ in "ab")
    path, sizes = tmp_path / "s", []
    for ids in ([3], some_ids(90)):
        read(stream, ids)
        snapshot.save_snapshot(path, stream, "m", {})
        sizes.append(path.stat().st_size)
        arrays = [value for value in stream.state().values() if isinstance(value, mx.array)]
        whole = sum(array.nbytes for array in arrays)
        with pytest.raises(SnapshotError, match="the limit is"):
            snapshot.load_snapshot(path, whole - 1)
        other.restore(snapshot.load_snapshot(path, whole).state)
        assert other.ids.attended() == stream.ids.attended()
    assert sizes[0] < sizes[1] < sum(array.nbytes for array in stream.cache.arrays()) // 5
    assert np.array_equal(read(other, [5, 6]), read(stream, [5, 6]))


@pytest.mark.parametrize("rows", [5, "9", 3_000_000, 2**60, True, [30]])
def test_forged_numbers_of_rows_are_refused(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any
) -> None:
    stream, path = new(tiny_model(), window=400), tmp_path / "s"
    read(stream, some_ids(9))
    dumps = json.dumps

    def forged(value: Any, **options: Any) -> str:
        if "rows" in value:
            value = {**value, "rows": {**value["rows"], "keys.0": rows}}
        return dumps(value, **options)

    monkeypatch.setattr(snapshot.json, "dumps", forged)
    snapshot.save_snapshot(path, stream, "m", {})
    with pytest.raises(SnapshotError, match="not a saved stream"):
        snapshot.load_snapshot(path, 10**8)


@pytest.fixture(scope="module")
def saved(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stream = new(tiny_model())
    read(stream, some_ids(40))
    path = tmp_path_factory.mktemp("snapshots") / "saved"
    snapshot.save_snapshot(path, stream, "m", {"turn": 1})
    return path


@given(st.data())
def test_a_flipped_byte_is_found(saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = saved.with_name("damaged")
    damaged.write_bytes(content)
    try:
        loaded = snapshot.load_snapshot(damaged)
    except SnapshotError as error:
        assert str(damaged) in str(error) and "\n" not in str(error)
        return
    # Damage to spaces in JSON or to padding in safetensors is harmless.
    whole = snapshot.load_snapshot(saved)
    assert (loaded.about, loaded.model) == (whole.about, whole.model)
    assert loaded.state.keys() == whole.state.keys()
    for name, value in whole.state.items():
        assert np.array_equal(np.array(loaded.state[name]), np.array(value)), name


@pytest.mark.parametrize("size", [0, 7, 8, 500, -1])
def test_a_truncated_file(saved: Path, tmp_path: Path, size: int) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(SnapshotError, match="not a saved stream"):
        snapshot.load_snapshot(cut)


def test_a_file_or_header_over_its_limit_is_refused(saved: Path) -> None:
    size = saved.stat().st_size
    assert snapshot.load_snapshot(saved, size).model == "m"
    with pytest.raises(SnapshotError, match=f"{size:,} bytes; .* at most"):
        snapshot.load_snapshot(saved, size - 1)
    with pytest.raises(SnapshotError, match="header is too long"):
        snapshot.load_snapshot(saved, longest=100)


def test_a_missing_file_a_folder_and_a_model(tmp_path: Path, tiny: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, tiny / "model.safetensors"):
        with pytest.raises(SnapshotError, match="not a saved stream"):
            snapshot.load_snapshot(path)


@pytest.mark.parametrize("version", [0, 4, 2**70, -1, 1.5, "1", None, [1]])
def test_another_version_is_refused_by_name(saved: Path, tmp_path: Path, version: Any) -> None:
    content = saved.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["header"])
    assert inner["version"] == snapshot.VERSION == 3
    header["__metadata__"]["header"] = json.dumps(inner | {"version": version})
    text = json.dumps(header).encode()
    newer = tmp_path / "newer"
    newer.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(SnapshotError, match=re.escape(f"version {version!r}")):
        snapshot.load_snapshot(newer)


def save_version_1(path: Path, stream: TokenStream, model: str, about: dict[str, Any]) -> None:
    """Write a stream as the first version of the program did."""
    state = stream.state()
    arrays = {name: value for name, value in state.items() if isinstance(value, mx.array)}
    header = {
        "format": "mlx_stream stream",
        "version": 1,
        "model": model,
        "numbers": {name: value for name, value in state.items() if isinstance(value, int)},
        "empty": {
            name: [array.shape, str(array.dtype).removeprefix("mlx.core.")]
            for name, array in arrays.items()
            if not array.size
        },
        "about": about,
    }
    arrays = {name: array for name, array in arrays.items() if array.size}
    text = json.dumps(header)
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.array(array.astype(mx.float32)).astype(STORED[array.dtype]).tobytes())
    unnamed = path.with_name("stream.safetensors")
    metadata = {"header": text, "checksum": digest.hexdigest()}
    mx.save_safetensors(str(unnamed), arrays, metadata)
    unnamed.rename(path)


STORED = {mx.float32: np.float32, mx.float16: np.float16, mx.uint32: np.uint32}


@pytest.mark.parametrize("dtype", STORED.keys() - {mx.uint32}, ids=str)
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_snapshot_of_version_1_continues(
    tiny_model: Make, tmp_path: Path, dtype: mx.Dtype, sinks: int
) -> None:
    model = tiny_model(dtype)
    stream, ids = new(model, sinks, spare=7), some_ids(90)
    read(stream, ids[:60])
    path = tmp_path / "saved"
    save_version_1(path, stream, model.fingerprint(1), {"turn": 3})
    assert snapshot.is_snapshot(path)
    loaded = snapshot.load_snapshot(path)
    assert (loaded.version, loaded.about) == (1, {"turn": 3})
    assert model.is_fingerprint(loaded.model)
    assert not tiny_model(dtype, seed=1).is_fingerprint(loaded.model)
    names = {"length", "floor", "clock", "sinks_at", "since", "lag", "sinks", "ids"}
    names |= {f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(2)}
    assert loaded.state.keys() == names
    other = new(model, sinks, spare=7)
    other.restore(loaded.state)
    assert other.ids.attended() == stream.ids.attended()
    assert np.array_equal(read(other, ids[60:]), read(stream, ids[60:]))
    # When saved again, it has this version and the same contents.
    snapshot.save_snapshot(path, other, model.fingerprint(), {})
    again = snapshot.load_snapshot(path)
    assert again.version == 3 and model.is_fingerprint(again.model)
    assert again.state.keys() == names


@pytest.mark.parametrize("ids", [None, [], [1, 2], [2**31] * 22])
def test_token_ids_that_do_not_fit_change_nothing(
    tiny_model: Make, saved: Path, ids: list[int] | None
) -> None:
    model = tiny_model()
    stream, expected = new(model), new(model)
    for one in (stream, expected):
        read(one, some_ids(33, seed=5))
    state = snapshot.load_snapshot(saved).state
    state["ids"] = 3 if ids is None else mx.array(ids, mx.uint32)
    with pytest.raises(ValueRefused, match="token ids"):
        stream.restore(state)
    assert stream.ids.attended() == expected.ids.attended()
    assert np.array_equal(read(stream, [3]), read(expected, [3]))
