"""A saved stream goes on with the same bits, is whole or not there, and is never trusted."""

import json
import math
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
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import Model
from tests.fakes.tiny_models import some_ids

Make = Callable[..., Model]


def new(model: Model, sinks: int = 2, window: int = 20, spare: int = 0) -> TokenStream:
    return TokenStream(model, model.new_cache(sinks, window, spare))


def read(stream: TokenStream, ids: list[int], chunk: int = 7) -> np.ndarray:
    return np.array(stream.read(ids, chunk).astype(mx.float32))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("length", [0, 1, 9, 70])
def test_a_stream_goes_on_as_if_it_had_never_been_closed(
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
    assert other.attended_ids() == stream.attended_ids()
    assert np.array_equal(read(other, ids[length:]), read(stream, ids[length:]))
    assert other.attended_ids() == stream.attended_ids()


def test_saving_does_not_disturb_the_stream(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model()
    saved, plain, ids = new(model), new(model), some_ids(90)
    last = np.array(math.nan)
    for start in range(0, 90, 9):
        read(saved, ids[start : start + 9], 3)
        snapshot.save_snapshot(tmp_path / "s", saved, "m", {})
        last = read(plain, ids[start : start + 9], 3)
    assert np.array_equal(read(saved, [5]), read(plain, [5]))
    assert np.isfinite(last).all()


def test_numbers_of_any_stream_survive(tiny_model: Make, tmp_path: Path) -> None:
    stream = new(tiny_model())
    read(stream, some_ids(60))
    state = stream.state()
    far = 2**62 - int(state["length"])  # type: ignore[arg-type]
    ring = 20
    state |= {"length": int(state["length"]) + far - far % ring}  # type: ignore[arg-type]
    state["floor"] = int(state["floor"]) + far - far % ring  # type: ignore[arg-type]
    stream.restore(state)
    snapshot.save_snapshot(tmp_path / "s", stream, "m", {})
    assert snapshot.load_snapshot(tmp_path / "s").state["length"] == state["length"]


def test_only_the_user_may_read_it_and_nothing_else_is_left(
    tiny_model: Make, tmp_path: Path
) -> None:
    stream = new(tiny_model())
    read(stream, [1, 2, 3])
    path = tmp_path / "deep" / "saved.state"
    for _ in range(2):
        snapshot.save_snapshot(path, stream, "m", {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tiny_model: Make, tmp_path: Path) -> None:
    stream = new(tiny_model())
    read(stream, [1])
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="could not be written"):
        snapshot.save_snapshot(tmp_path / "file" / "s", stream, "m", {})


def test_what_was_saved_before_survives_a_full_disk(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = new(tiny_model())
    read(stream, [1, 2, 3])
    path = tmp_path / "s"
    snapshot.save_snapshot(path, stream, "m", {"turn": 1})
    before = path.read_bytes()

    def full(name: str, arrays: object, metadata: object) -> None:
        Path(name).write_bytes(before[:100])
        raise RuntimeError("[write] Unable to write 4096 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(SnapshotError, match="could not be written"):
        snapshot.save_snapshot(path, stream, "m", {"turn": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


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
    # JSON has spaces that mean nothing, and safetensors a padding.
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


def test_what_is_larger_than_it_may_be(saved: Path) -> None:
    size = saved.stat().st_size
    assert snapshot.load_snapshot(saved, size).model == "m"
    with pytest.raises(SnapshotError, match=f"{size:,} bytes, more than"):
        snapshot.load_snapshot(saved, size - 1)
    with pytest.raises(SnapshotError, match="header is too long"):
        snapshot.load_snapshot(saved, longest=100)


def test_a_missing_file_a_folder_and_a_model(tmp_path: Path, tiny: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, tiny / "model.safetensors"):
        with pytest.raises(SnapshotError, match="not a saved stream"):
            snapshot.load_snapshot(path)


def test_a_newer_version_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["header"])
    header["__metadata__"]["header"] = json.dumps(inner | {"version": 2})
    text = json.dumps(header).encode()
    newer = tmp_path / "newer"
    newer.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(SnapshotError, match="version 2"):
        snapshot.load_snapshot(newer)


def test_a_state_of_another_shape_changes_nothing(tiny_model: Make, saved: Path) -> None:
    model = tiny_model()
    stream = new(model, window=24)
    expected, ids = new(model, window=24), some_ids(50, seed=4)
    for one in (stream, expected):
        read(one, ids)
    with pytest.raises(ValueRefused, match="not a state of this stream"):
        stream.restore(snapshot.load_snapshot(saved).state)
    assert np.array_equal(read(stream, [3]), read(expected, [3]))


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
    assert stream.attended_ids() == expected.attended_ids()
    assert np.array_equal(read(stream, [3]), read(expected, [3]))


def test_fingerprints_tell_models_apart(tiny_model: Make, tiny: Path) -> None:
    model = tiny_model()
    same = snapshot.fingerprint(model)
    assert snapshot.fingerprint(tiny_model()) == same and len(same) == 16
    others = [
        tiny_model(seed=1),
        tiny_model(mx.float16),
        tiny_model(rms_norm_eps=1e-3),
        tiny_model(num_hidden_layers=1),
    ]
    assert len({same, *map(snapshot.fingerprint, others)}) == 5


def test_a_fingerprint_sees_one_changed_layer(tiny_model: Make) -> None:
    model = tiny_model()
    before = snapshot.fingerprint(model)
    layer: Any = model.network.layers[-1].mlp.down_proj
    layer.weight = layer.weight * 1.0001
    assert snapshot.fingerprint(model) != before
