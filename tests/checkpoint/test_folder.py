"""A folder is read as it was stored; a damaged or hostile one is refused, and the fault named."""

import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.checkpoint import json_files, shards
from mlx_stream.checkpoint.folder import missing_files, read_folder
from mlx_stream.checkpoint.shards import INDEX
from mlx_stream.errors import CheckpointError, SourceError, TokenizerError, WeightsError
from tests.fakes.tiny import CHAT_TEMPLATE, stored_as, tiny_config, tiny_weights, write_tiny

CONFIG = tiny_config(num_hidden_layers=1)
WEIGHTS = tiny_weights(CONFIG)
SECOND = "model-00002-of-00003.safetensors"


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


# --- folders that are read ---


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_are_those_stored(tmp_path, dtype, shards):
    found = read_folder(tiny(tmp_path / "model", dtype, shards))
    expected = stored_as(WEIGHTS, dtype)
    assert found.tensors.keys() == expected.keys()
    for name, array in found.tensors.items():
        assert array.dtype == getattr(mx, dtype)
        np.testing.assert_array_equal(np.array(array.astype(mx.float32)), expected[name])


def test_config_and_tokenizer_are_unchanged(model):
    found = read_folder(model)
    assert found.config == json.loads((model / "config.json").read_text())
    assert found.tokenizer == (model / "tokenizer.json").read_text(encoding="utf-8")
    assert found.tokenizer_config["chat_template"] == CHAT_TEMPLATE
    assert found.generation_config["eos_token_id"] == 2


@pytest.mark.parametrize("name", ["model-{}-of-00003", "weights.{}"])
def test_shards_without_an_index_are_found(sharded, name):
    (sharded / INDEX).unlink()
    for i in range(1, 4):
        shard = sharded / f"model-{i:05}-of-00003.safetensors"
        shard.rename(sharded / (name.format(f"{i:05}") + ".safetensors"))
    assert read_folder(sharded).tensors.keys() == WEIGHTS.keys()


def test_symbolic_links_are_followed_as_the_hub_cache_needs(model):
    (model / "model.safetensors").rename(model.parent / "blob")
    (model / "model.safetensors").symlink_to("../blob")
    assert read_folder(model).tensors.keys() == WEIGHTS.keys()
    (model.parent / "blob").unlink()
    assert missing_files(model) == ["model.safetensors"]


def test_templates_come_from_a_file_or_by_name_and_optional_files_may_be_missing(model):
    (model / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    assert read_folder(model).tokenizer_config["chat_template"] == "{{ 'é' }}"
    assert read_folder(model).tokenizer_config["bos_token"] == "<|im_start|>"
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_folder(model).tokenizer_config == {"chat_template": named}
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "c", "a": 1}))
    assert read_folder(model).tokenizer_config == {"chat_template": named}
    (model / "tokenizer_config.json").write_text('{"chat_template": null, "eos_token": "x"}')
    assert read_folder(model).tokenizer_config == {"chat_template": "c", "eos_token": "x"}
    (model / "chat_template.jinja").write_text("j")
    assert read_folder(model).tokenizer_config["chat_template"] == "j"
    for name in ("chat_template.json", "chat_template.jinja"):
        (model / name).unlink()
    (model / "tokenizer_config.json").unlink()
    (model / "generation_config.json").unlink()
    assert read_folder(model).tokenizer_config == read_folder(model).generation_config == {}


def test_missing_files_names_what_reading_needs(sharded):
    assert missing_files(sharded) == []
    for name in ("tokenizer.json", SECOND):
        (sharded / name).unlink()
    assert missing_files(sharded) == ["tokenizer.json", SECOND]
    (sharded / INDEX).write_text("{")
    assert missing_files(sharded) == ["tokenizer.json", "model.safetensors"]


def test_reading_takes_the_memory_of_the_file_not_of_its_limit(model):
    tracemalloc.start()
    try:
        read_folder(model)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- folders that are refused, in three shards ---


def without_weights(file: str) -> Callable[[Path], object]:
    """Return a change that deletes the weights and writes a file of this name instead."""

    def change(path: Path) -> None:
        for weights in path.glob("model*"):
            weights.unlink()
        (path / file).write_bytes(b"never opened")

    return change


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def entry(dtype: str, shape: list[int], size: int) -> Callable[[Path], object]:
    """Return a function that writes a shard with one tensor, `odd`."""
    header = {"odd": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    return written(SECOND, safetensors(header, bytes(size)))


def twice(path: Path) -> None:
    mx.save_safetensors(str(path / "more.safetensors"), {"model.norm.weight": mx.zeros((64,))})
    edit_index(path, **{"model.norm.weight": "more.safetensors"})


def long_header(length: int) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        (path / SECOND).write_bytes(length.to_bytes(8, "little"))
        os.truncate(path / SECOND, 2 * shards.HEADER_BYTES)  # sparse

    return change


def remove_config(path: Path) -> None:
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")  # opening it would block


JSONS = [
    (b"", "not valid JSON"),
    (b'{"a": 1', "not valid JSON"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    (b'{"a": ' * 200_000, "nested too deeply"),
    (b"[1, 2]", "expected a JSON object, not [1, 2]"),
    (b'{"a": "\xff"}', "not UTF-8"),
    (b'{"a": "' + b"x" * 5_000_000 + b'"}', "too large; the limit is 4 MB"),
]
JSON_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", INDEX)
REFUSED: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (remove_config, CheckpointError, "config.json"),
    (written("tokenizer.json", b"{\xff}"), TokenizerError, "UTF-8"),
    (lambda path: (path / "tokenizer.json").unlink(), TokenizerError, "with transformers"),
    (without_weights("x"), CheckpointError, "expected weights in the safetensors format"),
    (without_weights("pytorch_model.bin"), CheckpointError, "pickles"),
    (without_weights("consolidated.00.pth"), CheckpointError, "never read"),
    (without_weights("tiny.Q4_1.gguf"), CheckpointError, "download 'tiny.Q4_1.gguf' and give"),
    *((written(name, text), CheckpointError, why) for name in JSON_FILES for text, why in JSONS),
    *(
        (written(INDEX, json.dumps({"weight_map": table}).encode()), CheckpointError, "weight_map")
        for table in (None, {}, [], "model.safetensors")
    ),
    (lambda path: edit_index(path, extra=SECOND), WeightsError, f"'extra' is in '{SECOND}', which"),
    (lambda path: (path / SECOND).unlink(), CheckpointError, f"'{SECOND}' is missing"),
    (twice, WeightsError, "'model.norm.weight' is in both"),
    *(
        (entry(dtype, [8], 8 * size), WeightsError, f"'odd' is {dtype}")
        for dtype, size in (("F64", 8), ("I64", 8), ("BOOL", 1), ("F8_E5M2", 1))
    ),
    *(
        (entry("F32", shape, 4 * math.prod(shape)), WeightsError, "'odd' has the impossible shape")
        for shape in ([0], [0, 2**40], [2, 0], [1] * 9, [1] * 2_000)
    ),
    *(
        (long_header(length), CheckpointError, f"its header has {length} bytes")
        for length in (shards.HEADER_BYTES + 1, 2**40, 2**63, 2**64 - 1)
    ),
]


@pytest.mark.parametrize(("change", "kind", "why"), REFUSED)
def test_the_fault_of_a_folder_is_named(sharded, monkeypatch, change, kind, why):
    monkeypatch.setattr(json_files, "JSON_BYTES", 4 << 20)
    change(sharded)
    assert why in refused(sharded, kind)


def test_a_missing_folder(tmp_path):
    assert "no such folder" in refused(tmp_path / "none", SourceError)
    assert "no such folder" in refused(Path(__file__), SourceError)
    refused(Path("x" * 5_000), SourceError)


OUTSIDE = ("../outside.safetensors", "{parent}/outside.safetensors", "sub/inside.safetensors")
OUTSIDE += ("..\\outside.safetensors", "C:outside.safetensors", "out\0side.safetensors", "a.bin")


@pytest.mark.parametrize("shard", [*OUTSIDE, "", 7, None, ["a.safetensors"]])
def test_an_index_may_not_leave_its_folder(sharded, shard):
    # Both exist and would be accepted if they were read.
    (sharded / "sub").mkdir()
    for target in (sharded.parent / "outside.safetensors", sharded / "sub" / "inside.safetensors"):
        mx.save_safetensors(str(target), {"extra": mx.zeros((2,))})
    if isinstance(shard, str):
        shard = shard.format(parent=sharded.parent)
    edit_index(sharded, extra=shard)
    assert repr(shard) in refused(sharded)
    assert missing_files(sharded)


# --- untrusted shards ---


def test_a_truncated_shard_is_refused_at_any_length(model):
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


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", INDEX]
)
@pytest.mark.parametrize("target", ["/dev/zero", "pipe", "loop", "nowhere", "."])
def test_a_link_that_leads_to_no_file_is_missing(sharded, name, target):
    (sharded / name).unlink(missing_ok=True)
    os.mkfifo(sharded / "pipe")
    (sharded / "loop").symlink_to("loop")
    (sharded / name).symlink_to(target)
    kinds = {"config.json": CheckpointError, "tokenizer.json": TokenizerError}
    if name in kinds:
        assert f"no {name}" in refused(sharded, kinds[name])
    else:  # without it the folder is valid
        assert read_folder(sharded).tensors.keys() == WEIGHTS.keys()


def test_no_tensors_at_all_is_refused(model):
    (model / "model.safetensors").write_bytes(safetensors({"__metadata__": {"format": "pt"}}))
    assert "no tensors" in refused(model, WeightsError)


@pytest.mark.parametrize("order", [1, -1])
def test_a_header_that_two_parsers_read_differently_is_refused(model, order):
    entries = [
        b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        b'"w":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}',
    ][::order]
    # Whichever of the two a parser uses, the file is refused or both parsers agree.
    (model / "model.safetensors").write_bytes(
        safetensors(b"{" + b",".join(entries) + b"}", b"1234")
    )
    try:
        found = read_folder(model).tensors["w"]
    except CheckpointError:
        return
    declared = shards.check_shard(model / "model.safetensors")
    assert declared["w"] == ("F32", list(found.shape))


def test_what_the_checker_and_mlx_see_must_agree(model, monkeypatch):
    loaded = mx.load(str(model / "model.safetensors"))
    assert isinstance(loaded, dict)
    loaded["model.norm.weight"] = loaded["model.norm.weight"][:-1]
    monkeypatch.setattr(shards.mx, "load", lambda _: loaded)
    assert "ambiguous" in refused(model)
