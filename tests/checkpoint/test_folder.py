"""What is read from a folder is what was stored; what is damaged or hostile is refused by name."""

import json
import math
import os
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.checkpoint import folder
from mlx_stream.checkpoint.folder import INDEX, missing_files, read_folder
from mlx_stream.errors import CheckpointError, SourceError, TokenizerError, WeightsError
from tests.fakes.tiny import CHAT_TEMPLATE, stored_as, tiny_config, tiny_weights, write_tiny

CONFIG = tiny_config(num_hidden_layers=1)
WEIGHTS = tiny_weights(CONFIG)


def tiny(path: Path, dtype: str = "float32", shards: int = 1) -> Path:
    return write_tiny(path, CONFIG, WEIGHTS, dtype, shards)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny(tmp_path / "sharded", shards=3)


def refused(path: Path, kind: type[Exception] = CheckpointError) -> str:
    """Return the one line with which a folder is refused."""
    with pytest.raises(kind) as error:
        read_folder(path)
    assert error.type is kind
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def edit_index(path: Path, **edits: object) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] |= edits
    (path / INDEX).write_text(json.dumps(index))


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- what is read ---


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_are_those_stored(tmp_path: Path, dtype: str, shards: int) -> None:
    found = read_folder(tiny(tmp_path / "model", dtype, shards))
    expected = stored_as(WEIGHTS, dtype)
    assert found.tensors.keys() == expected.keys()
    for name, array in found.tensors.items():
        assert array.dtype == getattr(mx, dtype)
        np.testing.assert_array_equal(np.array(array.astype(mx.float32)), expected[name])


def test_config_and_tokenizer_come_as_they_are(model: Path) -> None:
    found = read_folder(model)
    assert found.config == json.loads((model / "config.json").read_text())
    assert found.tokenizer == (model / "tokenizer.json").read_text(encoding="utf-8")
    assert found.tokenizer_config["chat_template"] == CHAT_TEMPLATE
    assert found.generation_config["eos_token_id"] == 2


@pytest.mark.parametrize("name", ["model-{}-of-00003", "weights.{}"])
def test_shards_without_an_index_are_found(sharded: Path, name: str) -> None:
    (sharded / INDEX).unlink()
    for i in range(1, 4):
        shard = sharded / f"model-{i:05}-of-00003.safetensors"
        shard.rename(sharded / (name.format(f"{i:05}") + ".safetensors"))
    assert read_folder(sharded).tensors.keys() == WEIGHTS.keys()


def test_symbolic_links_are_followed_as_the_hub_cache_needs(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "blob")
    (model / "model.safetensors").symlink_to("../blob")
    assert read_folder(model).tensors.keys() == WEIGHTS.keys()
    (model.parent / "blob").unlink()
    assert missing_files(model) == ["model.safetensors"]


def test_a_template_file_overrides_the_tokenizer_config(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    assert read_folder(model).tokenizer_config["chat_template"] == "{{ 'é' }}"
    assert read_folder(model).tokenizer_config["bos_token"] == "<|im_start|>"


def test_optional_files_may_be_missing_and_named_templates_are_kept(model: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_folder(model).tokenizer_config == {"chat_template": named}
    (model / "tokenizer_config.json").unlink()
    (model / "generation_config.json").unlink()
    assert read_folder(model).tokenizer_config == {}
    assert read_folder(model).generation_config == {}


# --- what is missing ---


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none", SourceError)
    assert "no such folder" in refused(Path(__file__), SourceError)
    refused(Path("x" * 5_000), SourceError)


def test_a_missing_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert "config.json" in refused(model)
    os.mkfifo(model / "config.json")  # would block whoever opens it
    assert "config.json" in refused(model)


def test_a_missing_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_bytes(b"{\xff}")
    assert "UTF-8" in refused(model, TokenizerError)
    (model / "tokenizer.json").unlink()
    message = refused(model, TokenizerError)
    assert "no tokenizer.json" in message
    assert "transformers" in message


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, "expected weights in the safetensors format"),
        ("pytorch_model.bin", "pickles"),
        ("consolidated.00.pth", "never read"),
        ("tiny.Q4_1.gguf", "'tiny.Q4_1.gguf': name that file instead"),
    ],
)
def test_missing_weights(model: Path, file: str | None, expected: str) -> None:
    (model / "model.safetensors").unlink()
    if file is not None:
        (model / file).write_bytes(b"never opened")
    assert expected in refused(model)


def test_missing_files_names_what_reading_needs(sharded: Path) -> None:
    assert missing_files(sharded) == []
    shard = "model-00002-of-00003.safetensors"
    for name in ("tokenizer.json", shard):
        (sharded / name).unlink()
    assert missing_files(sharded) == ["tokenizer.json", shard]
    (sharded / INDEX).unlink()  # the names of the others still tell
    assert missing_files(sharded) == ["tokenizer.json", shard]
    (sharded / INDEX).write_text("{")
    assert missing_files(sharded) == ["tokenizer.json", "model.safetensors"]


# --- JSON nobody vouches for ---


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", INDEX]
)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 200_000, "nested too deeply"),
        (b"[1, 2]", "expected a JSON object, not [1, 2]"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "' + b"x" * 5_000_000 + b'"}', "larger than 4 MB"),
    ],
    ids=["empty", "cut", "number", "arrays", "objects", "list", "latin1", "large"],
)
def test_bad_json_is_refused(
    sharded: Path, name: str, content: bytes, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "JSON_BYTES", 4 << 20)
    (sharded / name).write_bytes(content)
    message = refused(sharded)
    assert expected in message
    assert name in message


def test_a_file_takes_the_memory_it_has_not_what_it_might_have(model: Path) -> None:
    tracemalloc.start()
    try:
        read_folder(model)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- indices nobody vouches for ---


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "{parent}/outside.safetensors",
        "sub/inside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "out\0side.safetensors",
        "outside.bin",
        "",
        7,
        None,
        ["a.safetensors"],
    ],
)
def test_an_index_may_not_leave_its_folder(sharded: Path, shard: object) -> None:
    # Both exist and would do, were they read.
    (sharded / "sub").mkdir()
    for target in (sharded.parent / "outside.safetensors", sharded / "sub" / "inside.safetensors"):
        mx.save_safetensors(str(target), {"extra": mx.zeros((2,))})
    if isinstance(shard, str):
        shard = shard.format(parent=sharded.parent)
    edit_index(sharded, extra=shard)
    assert repr(shard) in refused(sharded)
    assert missing_files(sharded)


def test_an_index_must_agree_with_its_shards(sharded: Path) -> None:
    edit_index(sharded, extra="model-00002-of-00003.safetensors")
    message = refused(sharded, WeightsError)
    assert "'extra'" in message
    assert "'model-00002-of-00003.safetensors'" in message


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "'model-00002-of-00003.safetensors' is missing" in refused(sharded)
    (sharded / INDEX).unlink()
    assert "'model-00002-of-00003.safetensors' is missing" in refused(sharded)


def test_a_tensor_given_twice_is_refused(sharded: Path) -> None:
    mx.save_safetensors(str(sharded / "more.safetensors"), {"model.norm.weight": mx.zeros((64,))})
    edit_index(sharded, **{"model.norm.weight": "more.safetensors"})
    assert "'model.norm.weight' is in both" in refused(sharded, WeightsError)


@pytest.mark.parametrize("table", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map_is_refused(sharded: Path, table: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": table}))
    assert "weight_map" in refused(sharded)


# --- shards nobody vouches for ---


def test_a_truncated_shard_is_refused_at_any_length(model: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = {*range(24), *range(24, header, 41), header - 1, header, header + 1}
    lengths |= {*range(header, len(whole), 9_973), len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        message = refused(model)
        assert "damaged or truncated" in message
        assert "model.safetensors" in message
    path.write_bytes(whole + b"\0")
    assert "damaged or truncated" in refused(model)
    path.write_bytes(whole)
    assert read_folder(model).tensors.keys() == WEIGHTS.keys()


def test_a_flipped_header_is_refused_or_harmless(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = {"b": mx.ones((3, 5), mx.bfloat16), "w": mx.arange(12, dtype=mx.uint32)}
    mx.save_safetensors(str(path), tensors, metadata={"format": "mlx"})
    whole = path.read_bytes()
    size = sum(array.nbytes for array in tensors.values())
    refusals = 0
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        for bit in (1, 4, 32, 128):
            flipped = bytearray(whole)
            flipped[place] ^= bit
            path.write_bytes(flipped)
            try:
                found = read_folder(model).tensors
            except CheckpointError as error:
                refusals += 1
                assert "\n" not in str(error)
                continue
            # Only a name or a dtype of the same size can have changed.
            mx.eval(list(found.values()))
            assert sum(array.nbytes for array in found.values()) == size
    assert refusals > 400


@pytest.mark.parametrize("dtype", ["F64", "I64", "I32", "BOOL", "F8_E4M3"])
def test_other_dtypes_are_refused_by_name(model: Path, dtype: str) -> None:
    bytes_each = {"F64": 8, "I64": 8, "I32": 4}.get(dtype, 1)
    header = {"odd": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8 * bytes_each]}}
    (model / "model.safetensors").write_bytes(safetensors(header, bytes(8 * bytes_each)))
    message = refused(model, WeightsError)
    assert f"'odd' is {dtype}" in message


@pytest.mark.parametrize("shape", [[0], [0, 2**40], [2, 0], [1] * 9, [1] * 2_000])
def test_impossible_shapes_are_refused(model: Path, shape: list[int]) -> None:
    size = 4 * math.prod(shape)
    header = {"odd": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    (model / "model.safetensors").write_bytes(safetensors(header, bytes(size)))
    assert "'odd' has the impossible shape" in refused(model, WeightsError)


def test_a_header_is_not_believed_about_its_length(model: Path) -> None:
    path = model / "model.safetensors"
    for length in (folder.HEADER_BYTES + 1, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little"))
        os.truncate(path, 2 * folder.HEADER_BYTES)  # sparse
        assert f"a header of {length} bytes" in refused(model)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", INDEX]
)
@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "loop", "nowhere", "."])
def test_a_link_that_leads_to_no_file_is_none(sharded: Path, name: str, target: str) -> None:
    (sharded / name).unlink(missing_ok=True)
    os.mkfifo(sharded / "pipe")
    (sharded / "loop").symlink_to("loop")
    (sharded / name).symlink_to(target)
    kinds = {"config.json": CheckpointError, "tokenizer.json": TokenizerError}
    if name in kinds:
        assert f"no {name}" in refused(sharded, kinds[name])
    else:  # without it the folder is what it is
        assert read_folder(sharded).tensors.keys() == WEIGHTS.keys()


def test_no_tensors_at_all_is_refused(model: Path) -> None:
    (model / "model.safetensors").write_bytes(safetensors({"__metadata__": {"format": "pt"}}))
    assert "no tensors" in refused(model, WeightsError)


@pytest.mark.parametrize("order", [1, -1])
def test_a_header_that_two_parsers_read_differently_is_refused(model: Path, order: int) -> None:
    entries = [
        b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        b'"w":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}',
    ][::order]
    # Whichever of the two each parser takes, the answer is not in doubt: refused, or the same.
    (model / "model.safetensors").write_bytes(
        safetensors(b"{" + b",".join(entries) + b"}", b"1234")
    )
    try:
        found = read_folder(model).tensors["w"]
    except CheckpointError:
        return
    declared = folder.check_shard(model / "model.safetensors")
    assert declared["w"] == ("F32", list(found.shape))


def test_what_the_checker_and_mlx_see_must_agree(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = mx.load(str(model / "model.safetensors"))
    assert isinstance(loaded, dict)
    loaded["model.norm.weight"] = loaded["model.norm.weight"][:-1]
    monkeypatch.setattr(folder.mx, "load", lambda _: loaded)
    assert "ambiguous" in refused(model)
