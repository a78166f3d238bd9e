"""A written folder is the same when read again, and appears complete or not at all."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_stream.checkpoint import Checkpoint, write
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.checkpoint.write import write_folder
from mlx_stream.errors import CheckpointError, WeightsError
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

CONFIG = tiny_config(num_hidden_layers=1)
WEIGHTS = tiny_weights(CONFIG)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", CONFIG, WEIGHTS)


def same(left: Mapping[str, mx.array], right: Mapping[str, mx.array]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == right[name].dtype and mx.array_equal(a, right[name]).item()
        for name, a in left.items()
    )


def quantized_checkpoint(source: Path) -> Checkpoint:
    """Return the tiny model with affine 4-bit attention and mxfp4 elsewhere."""
    found = read_folder(source)
    tensors: dict[str, mx.array] = {}
    modes: dict[str, dict] = {}
    for name, array in found.tensors.items():
        module = name.removesuffix(".weight")
        if array.ndim != 2:
            tensors[name] = array
            continue
        mode = "affine" if "attn" in name or "embed" in name else "mxfp4"
        parts = mx.quantize(array, 32, 4, mode=mode)
        keys = ("weight", "scales", "biases")
        tensors |= {f"{module}.{key}": part for key, part in zip(keys, parts, strict=False)}
        modes[module] = {"group_size": 32, "bits": 4, "mode": mode}
    quantization = {"group_size": 32, "bits": 4, "mode": "affine", **modes}
    return replace(found, config={**found.config, "quantization": quantization}, tensors=tensors)


def nothing_but(parent: Path, *names: str) -> bool:
    return sorted(path.name for path in parent.iterdir()) == sorted(names)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_and_read_again_is_the_same(tmp_path, dtype):
    before = read_folder(write_tiny(tmp_path / "model", CONFIG, WEIGHTS, dtype))
    assert write_folder(before, tmp_path / "new" / "out")
    after = read_folder(tmp_path / "new" / "out")
    assert same(before.tensors, after.tensors)
    assert replace(before, tensors={}) == replace(after, tensors={})
    assert nothing_but(tmp_path / "new", "out")


def test_written_quantized_and_read_again_is_the_same(model, tmp_path):
    before = quantized_checkpoint(model)
    assert write_folder(replace(before, generation_config={}), tmp_path / "out")
    after = read_folder(tmp_path / "out")
    assert same(before.tensors, after.tensors)
    assert after.config["quantization"] == before.config["quantization"]
    assert after.config["quantization_config"] == before.config["quantization"]
    assert nothing_but(
        tmp_path / "out",
        *("config.json", "model.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    )


class Failing(dict[str, mx.array]):
    """Tensors that fail when they are read."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(w=mx.zeros(1))
        self.error = error

    def __getitem__(self, name: str) -> mx.array:
        raise self.error


FAULT = OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("where", "raised", "seen"),
    [
        ("tensors", KeyboardInterrupt(), KeyboardInterrupt),
        ("tensors", OSError(28, "No space left on device"), CheckpointError),
        ("tensors", WeightsError("w: no"), WeightsError),
        ("fsync", FAULT, CheckpointError),
        ("rename", FAULT, CheckpointError),
    ],
)
def test_a_failed_write_leaves_nothing(model, tmp_path, monkeypatch, where, raised, seen):
    def fail(*_: object) -> None:
        raise raised

    found = read_folder(model)
    if where == "tensors":
        found = replace(found, tensors=Failing(raised))
    else:
        monkeypatch.setattr(write.os if where == "fsync" else Path, where, fail)
    with pytest.raises(seen, match="Input/output" if raised is FAULT else None):
        write_folder(found, tmp_path / "out")
    assert nothing_but(tmp_path, "model")


def test_everything_is_flushed_before_it_appears(model, tmp_path, monkeypatch):
    events: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(write, "flush", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    write_folder(read_folder(model), tmp_path / "out")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {path.name for path in (tmp_path / "out").iterdir()} < set(before)
    assert before[-1].endswith(".partial")
    assert after == [tmp_path.name]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.checkpoint.write import write_folder
from mlx_stream.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    write_folder(read_folder(Path(sys.argv[1])), Path(sys.argv[2]))
except CheckpointError as error:
    sys.exit(0 if "could not be written" in str(error) and "\\n" not in str(error) else 2)
sys.exit(3)
"""


def test_a_disk_that_fills_up_leaves_nothing(model, tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(model), str(tmp_path / "out")]
    assert subprocess.run(command).returncode == 0
    assert nothing_but(tmp_path, "model")


def test_an_existing_folder_is_kept(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").touch()
    assert write_folder(read_folder(model), tmp_path / "out") is None
    assert nothing_but(tmp_path / "out", "theirs")
    assert nothing_but(tmp_path, "model", "out")


MLX_LM = """
import sys
import mlx.core as mx
import mlx_lm
model, tokenizer = mlx_lm.load(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantizedLinear"
assert model.model.layers[0].mlp.up_proj.mode == "mxfp4"
assert mx.isfinite(model(mx.array([tokenizer.encode("the house")]))).all().item()
"""


def test_mlx_lm_loads_what_is_written(model, tmp_path):
    write_folder(quantized_checkpoint(model), tmp_path / "out")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run([sys.executable, "-c", MLX_LM, str(tmp_path / "out")], env=env, check=True)
