"""A separate Hub on loopback, whose caches and indices are not the user's."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from mlx_stream.errors import SourceError
from mlx_stream.hub.resolve import resolve
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

CONFIG = tiny_config(num_hidden_layers=1)
WEIGHTS = tiny_weights(CONFIG)
REPO = "org/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOBODY = "http://127.0.0.1:9"  # refuses immediately


class Hub:
    """Serves folders in the Hub's wire format, and records the requests.

    Attributes:
        repos: folders by name; all their files are listed, safetensors as large ones (LFS).
        asked: the paths of requests; `ranges` are those that asked for a part, with its start.
        errors: status and error code, by model or file name.
        listed: changes to a file's entry in listings, by its name, to make it false.
        sent: by a file's name, a function from (content, start) to the bytes that are sent instead;
            if they are too few, the connection ends early.
        commit: the commit of every branch.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.asked: list[str] = []
        self.ranges: list[tuple[str, int]] = []
        self.errors: dict[str, tuple[int, str]] = {}
        self.listed: dict[str, dict] = {}
        self.sent: dict[str, Callable[[bytes, int], bytes]] = {}
        self.commit = COMMIT
        self.tokens: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.reply(body=False)

            def do_GET(self) -> None:
                self.reply(body=True)

            def reply(self, body: bool) -> None:
                outer.tokens.add(self.headers.get("Authorization"))
                start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
                status, headers, content, name = outer.answer(self.path, start)
                self.send_response(status)
                for key, value in {"Content-Length": len(content), **headers}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                if not body:
                    return
                change = outer.sent.get(name)
                sent = change(content, start) if change else content
                with suppress(ConnectionError):  # a client that has read enough hangs up
                    self.wfile.write(sent)
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def answer(self, path: str, start: int) -> tuple[int, dict, bytes, str]:
        path = path.split("?")[0]
        self.asked.append(path)
        for repo, folder in self.repos.items():
            for wanted, (status, code) in self.errors.items():
                if repo in path and (wanted == repo or path.endswith(f"/{wanted}")):
                    return status, {"X-Error-Code": code}, b"{}", ""
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            table = {str(p.relative_to(folder)): p for p in files}
            if match := re.fullmatch(f"/api/models/{repo}/revision/(.+)", path):
                if match[1] not in ("main", "v1", self.commit):
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}", ""
                siblings = [self.sibling(name, path) for name, path in table.items()]
                info = {"id": repo, "sha": self.commit, "siblings": siblings}
                return 200, {}, json.dumps(info).encode(), ""
            if path == f"/api/models/{repo}/tree/{self.commit}":
                tree = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": digest(p)}
                    for n, p in table.items()
                ]
                return 200, {}, json.dumps(tree).encode(), ""
            name = path.removeprefix(f"/{repo}/resolve/{self.commit}/")
            if name in table:
                headers = {"ETag": f'"{digest(table[name])}"', "X-Repo-Commit": self.commit}
                if start:
                    self.ranges.append((name, start))
                content = table[name].read_bytes()[start:]
                return 206 if start else 200, headers, content, name
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}", ""

    def sibling(self, name: str, path: Path) -> dict:
        size = path.stat().st_size
        entry: dict = {"rfilename": name, "size": size, "blobId": git_digest(path)}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"size": size, "sha256": digest(path), "pointerSize": 130}
        return entry | self.listed.get(name, {})

    def fetched(self) -> set[str]:
        return {path.split(self.commit + "/")[1] for path in self.asked if "/resolve/" in path}


def digest(path: Path) -> str:
    """Return the hash a file is listed by: SHA-256 for large files, Git's for others."""
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return git_digest(path)


def git_digest(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# --- fixtures ---


@pytest.fixture(name="model")
def model_fixture(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", CONFIG, WEIGHTS)


@pytest.fixture(name="home")
def home_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point caches, indices and Hub at `tmp_path` or a closed port; return the package's cache."""
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


@pytest.fixture(name="served")
def served_fixture(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    server.repos[REPO] = model
    use_endpoint(monkeypatch, server.endpoint)
    yield server
    huggingface_hub.utils.close_session()
    server.server.shutdown()
    server.thread.join()
    server.server.server_close()


# --- what the tests in both files need ---


def refused(source: str) -> str:
    with pytest.raises(SourceError) as error:
        resolve(source, silent)
    assert "\n" not in str(error.value)
    return str(error.value)


def silent(_: str) -> None:
    pass


def never(_: str) -> None:
    raise AssertionError("nothing was to be fetched")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
