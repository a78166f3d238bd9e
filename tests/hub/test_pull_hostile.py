"""`pull` from a Hub that lies, or has what we do not read: one line, nothing that looks whole."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_stream.hub import transfer
from tests.fakes.loopback import (  # noqa: F401 (pytest)
    CONFIG,
    REPO,
    WEIGHTS,
    Hub,
    home_fixture,
    model_fixture,
    served_fixture,
)
from tests.fakes.pulling import SHARD, blobs, pull, refused
from tests.fakes.shell import edit
from tests.fakes.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.01)


# --- a Hub that lies ---


def test_a_file_that_is_not_what_was_listed_is_not_kept(served: Hub) -> None:
    for name in ("config.json", SHARD, "tokenizer.json"):
        served.sent[name] = lambda content, start: bytes([content[0] ^ 1]) + content[1:]
        assert f"{name} is not what the Hub says it is" in refused()
        del served.sent[name]
        digests = {file: hash_of(path) for file, path in blob_paths().items()}
        assert all(name == digest for name, digest in digests.items())
    pull()


def blob_paths() -> dict[str, Path]:
    return {path.name: path for path in transfer.storage_of(REPO).glob("blobs/*")}


def hash_of(path: Path) -> str:
    file = transfer.File(path.name, path.stat().st_size, path.name)
    with path.open("rb") as opened:
        return transfer.digest_of(opened, file)


@pytest.mark.parametrize("name", [SHARD, "config.json"])
@pytest.mark.parametrize("less", [-1, 1, 100])
def test_a_listed_size_that_is_not_the_files(served: Hub, name: str, less: int) -> None:
    entry = served.sibling(name, served.repos[REPO] / name)
    size = entry["size"] - less
    served.listed[name] = {"size": size}
    if "lfs" in entry:
        served.listed[name]["lfs"] = entry["lfs"] | {"size": size}
    line = refused()
    assert ("the Hub sends more of" if less > 0 else "again and again") in line


def test_a_file_without_end_is_cut_off(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, more = served.answer, 50 << 20

    def without_end(path: str, start: int) -> tuple[int, dict, bytes, str]:
        status, headers, content, name = answer(path, start)
        length = {"Content-Length": len(content) + more} if name == SHARD else {}
        return status, headers | length, content, name

    monkeypatch.setattr(served, "answer", without_end)
    served.sent[SHARD] = lambda content, start: content + bytes(more)
    assert f"the Hub sends more of {SHARD}" in refused()
    assert sum(blobs().values()) < 1 << 20


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"blobId": "../../../../x", "lfs": None}, "size and hash of 'model.safetensors'"),
        ({"lfs": {"size": 1, "sha256": "../x", "pointerSize": 1}}, "size and hash"),
        ({"lfs": {"size": -1, "sha256": "0" * 64, "pointerSize": 1}}, "size and hash"),
        ({"blobId": None, "lfs": None}, "size and hash"),
        ({"lfs": {"size": 10**18, "sha256": "0" * 64, "pointerSize": 1}}, "GB left"),
    ],
)
def test_a_listing_is_not_taken_at_its_word(served: Hub, entry: dict, expected: str) -> None:
    served.listed[SHARD] = entry
    assert expected in refused()
    assert not (Path(huggingface_hub.constants.HF_HUB_CACHE).parent / "x").exists()


def test_a_large_small_file_is_refused(served: Hub) -> None:
    served.listed["tokenizer.json"] = {"size": 10**9}
    assert "tokenizer.json of 953 MB, which no such file has" in refused()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/x.safetensors", "a/b.safetensors", "..\\x.safetensors"]
)
def test_names_that_lead_elsewhere_are_not_ours(served: Hub, name: str) -> None:
    served.listed["README.md"] = {"rfilename": name}
    (served.repos[REPO] / "README.md").write_text("x")
    assert {path.name for path in pull().path.iterdir()} == {
        path.name for path in served.repos[REPO].iterdir() if path.name != "README.md"
    }


def test_a_commit_that_is_none(served: Hub) -> None:
    served.commit = "../../main"
    assert "names no commit" in refused()


# --- what is not fetched ---


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["pytorch_model.bin"], "only pickles (.bin, .pt), which are never fetched or read"),
        (["consolidated.00.pth"], "only pickles"),
        (["model-Q4_0.gguf"], "it holds GGUF files ('model-Q4_0.gguf'): download one"),
        (["flax_model.msgpack"], "expected weights in the safetensors format"),
    ],
)
def test_other_formats_are_refused_before_anything_is_fetched(
    served: Hub, files: list[str], expected: str
) -> None:
    (served.repos[REPO] / SHARD).unlink()
    for name in files:
        (served.repos[REPO] / name).write_bytes(b"x")
    assert expected in refused()
    assert served.fetched() == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling.M"}},
            "there is no trust_remote_code here",
        ),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
    ],
)
def test_other_models_are_refused_before_their_weights_are_fetched(
    served: Hub, changes: dict, expected: str
) -> None:
    edit(served.repos[REPO] / "config.json", **changes)
    assert expected in refused()
    assert served.fetched() == {"config.json"}


def test_a_model_without_a_tokenizer(served: Hub) -> None:
    (served.repos[REPO] / "tokenizer.json").unlink()
    assert "this model has no tokenizer.json" in refused()


def test_an_index_that_names_a_missing_shard(served: Hub, tmp_path: Path) -> None:
    served.repos[REPO] = write_tiny(tmp_path / "sharded", CONFIG, WEIGHTS, shards=3)
    (served.repos[REPO] / "model-00002-of-00003.safetensors").unlink()
    assert "no model-00002-of-00003.safetensors, which its index names" in refused()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "accept its terms at"),
        (401, "RepoNotFound", "run `hf auth login`, or set HF_TOKEN"),
        (404, "EntryNotFound", "answered"),
        (500, "", "again and again"),
    ],
)
def test_a_file_the_hub_does_not_give(served: Hub, status: int, code: str, expected: str) -> None:
    served.errors[SHARD] = (status, code)
    assert expected in refused()


def test_a_token_is_sent(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull()
    assert served.tokens == {"Bearer hf_secret"}
