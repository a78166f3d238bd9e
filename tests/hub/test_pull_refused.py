"""`pull` from a Hub that lies or uses other formats: one line, and nothing looks complete."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_stream.hub import hub_cache, transfer
from tests.fakes.loopback import CONFIG, REPO, WEIGHTS, Hub
from tests.fakes.pulling import SHARD, blobs, pull, refused
from tests.fakes.shell import edit
from tests.fakes.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.01)


def lists(name: str, **entry: object) -> Callable[[Hub], object]:
    return lambda served: served.listed.update({name: entry})


def lists_less(name: str, less: int) -> Callable[[Hub], object]:
    """List a file as shorter than it is."""

    def change(served: Hub) -> None:
        entry = served.sibling(name, served.repos[REPO] / name)
        size = entry["size"] - less
        large = {"lfs": entry["lfs"] | {"size": size}} if "lfs" in entry else {}
        served.listed[name] = {"size": size, **large}

    return change


def answers(name: str, status: int, code: str) -> Callable[[Hub], object]:
    return lambda served: served.errors.update({name: (status, code)})


def holds_only(name: str) -> Callable[[Hub], object]:
    return lambda served: (served.repos[REPO] / SHARD).rename(served.repos[REPO] / name)


def says(**changes: object) -> Callable[[Hub], object]:
    return lambda served: edit(served.repos[REPO] / "config.json", **changes)


def lacks_a_shard(served: Hub) -> None:
    folder = served.repos[REPO].parent / "sharded"
    served.repos[REPO] = write_tiny(folder, CONFIG, WEIGHTS, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


ZEROS = "0" * 64
NOTHING: set[str] = set()
# A change to the Hub, the text of the refusal, and the only files that may be fetched.
REFUSED: list[tuple[Callable[[Hub], object], str, set[str] | None]] = [
    (answers(REPO, 403, "GatedRepo"), "accept its terms", NOTHING),
    (answers(REPO, 404, "RepoNotFound"), "no such model", NOTHING),
    (answers(REPO, 401, "RepoNotFound"), "hf auth login", NOTHING),
    (answers(REPO, 503, ""), "try again later", NOTHING),
    (answers(SHARD, 403, "GatedRepo"), "accept its terms at", None),
    (answers(SHARD, 401, "RepoNotFound"), "run `hf auth login`, or set HF_TOKEN", None),
    (answers(SHARD, 404, "EntryNotFound"), "answered", None),
    (answers(SHARD, 500, ""), "keeps stopping at", None),
    *(
        (lists_less(name, less), "the Hub sent more of" if less > 0 else "keeps stopping at", None)
        for name in (SHARD, "config.json")
        for less in (-1, 1, 100)
    ),
    (lists(SHARD, blobId="../../../../x", lfs=None), "size and hash of 'model.safetensors'", None),
    (lists(SHARD, lfs={"size": 1, "sha256": "../x", "pointerSize": 1}), "size and hash", None),
    (lists(SHARD, lfs={"size": -1, "sha256": ZEROS, "pointerSize": 1}), "size and hash", None),
    (lists(SHARD, blobId=None, lfs=None), "size and hash", None),
    (lists(SHARD, lfs={"size": 10**18, "sha256": ZEROS, "pointerSize": 1}), "GB left", None),
    (
        lists("tokenizer.json", size=10**9),
        "tokenizer.json is too large: 953 MB; the limit is",
        None,
    ),
    (lambda served: setattr(served, "commit", "../../main"), "does not list a commit", NOTHING),
    (holds_only("pytorch_model.bin"), "only pickles (.bin, .pt), which are never read", NOTHING),
    (holds_only("consolidated.00.pth"), "only pickles", NOTHING),
    (holds_only("model-Q4_0.gguf"), "download 'model-Q4_0.gguf' and give", NOTHING),
    (holds_only("flax_model.msgpack"), "expected weights in the safetensors format", NOTHING),
    (
        says(auto_map={"AutoModelForCausalLM": "modeling.M"}),
        *("there is no trust_remote_code here", {"config.json"}),
    ),
    (says(model_type="gpt2"), "model_type 'gpt2' is not supported", {"config.json"}),
    (says(num_hidden_layers=10**9), "num_hidden_layers must be", {"config.json"}),
    (
        lambda served: (served.repos[REPO] / "tokenizer.json").unlink(),
        *("this model has no tokenizer.json", None),
    ),
    (lacks_a_shard, "no model-00002-of-00003.safetensors, which its index lists", None),
]


@pytest.mark.parametrize(("change", "why", "fetched"), REFUSED)
def test_a_hostile_or_unsupported_model_is_refused_in_one_line(served, change, why, fetched):
    change(served)
    assert why in refused()
    assert fetched is None or served.fetched() == fetched
    assert not (Path(huggingface_hub.constants.HF_HUB_CACHE).parent / "x").exists()


@pytest.mark.parametrize("revision", ["none", "../main", "/main", "", "-x", "a b"])
def test_an_unknown_revision(served, revision):
    line = refused(revision)
    assert repr(revision) in line and "branch" in line and "commit" in line


def test_a_file_that_is_not_what_was_listed_is_not_kept(served):
    for name in ("config.json", SHARD, "tokenizer.json"):
        served.sent[name] = lambda content, start: bytes([content[0] ^ 1]) + content[1:]
        assert f"{name} does not have the hash that the Hub lists" in refused()
        del served.sent[name]
        for path in hub_cache.storage_of(REPO).glob("blobs/*"):
            file = hub_cache.File(path.name, path.stat().st_size, path.name)
            with path.open("rb") as opened:
                assert transfer.digest_of(opened, file) == path.name
    pull()


def test_a_file_without_end_is_cut_off(served, monkeypatch):
    answer, more = served.answer, 50 << 20

    def without_end(path: str, start: int) -> tuple[int, dict, bytes, str]:
        status, headers, content, name = answer(path, start)
        length = {"Content-Length": len(content) + more} if name == SHARD else {}
        return status, headers | length, content, name

    monkeypatch.setattr(served, "answer", without_end)
    served.sent[SHARD] = lambda content, start: content + bytes(more)
    assert f"the Hub sent more of {SHARD}" in refused()
    assert sum(blobs().values()) < 1 << 20


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/x.safetensors", "a/b.safetensors", "..\\x.safetensors"]
)
def test_names_that_lead_elsewhere_are_skipped(served, name):
    served.listed["README.md"] = {"rfilename": name}
    (served.repos[REPO] / "README.md").write_text("x")
    assert {path.name for path in pull().path.iterdir()} == {
        path.name for path in served.repos[REPO].iterdir() if path.name != "README.md"
    }


def test_a_token_is_sent(served, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull()
    assert served.tokens == {"Bearer hf_secret"}
