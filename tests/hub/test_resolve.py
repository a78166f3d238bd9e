"""Sources of models: paths, and a Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.hub.listing import CachedModel, cached_models
from mlx_stream.hub.resolve import resolve
from mlx_stream.hub.starter import starter_folder
from tests.fakes.loopback import (
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
    other.unlink()  # as another program may have it
    other.write_text(json.dumps({**CONFIG, "model_type": "gpt2"}))
    write_tiny(starter_folder(), CONFIG, WEIGHTS)
    size = sum(path.stat().st_size for path in model.iterdir())
    assert cached_models() == [
        CachedModel(REPO, found, size, "hub"),
        CachedModel("starter", starter_folder(), size, "starter"),
    ]
    (found / "model.safetensors").unlink()
    (starter_folder() / "model.safetensors").write_bytes(b"cut")
    assert cached_models() == []
