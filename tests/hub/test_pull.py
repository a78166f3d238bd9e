"""`pull` from a Hub on loopback, over connections that break: a complete model, or one line."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.hub import hub_cache, repository, transfer
from mlx_stream.hub.listing import cached_models
from mlx_stream.hub.resolve import pull as pull_from_hub
from mlx_stream.hub.resolve import resolve
from tests.fakes.loopback import COMMIT, NOBODY, REPO, WEIGHTS, never, silent, use_endpoint
from tests.fakes.pulling import SHARD, blobs, pull, refused
from tests.fakes.shell import GREEDY, edit, parsed, program
from tests.fakes.shell import run as run_here

pytestmark = pytest.mark.usefixtures("home")

OTHER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.01)


# --- a whole model ---


def test_a_model_is_pinned_to_a_commit_and_opens_without_the_hub(served, monkeypatch):
    found = pull()
    assert (found.name, found.revision, found.commit) == (REPO, "main", COMMIT)
    assert found.path.name == COMMIT
    assert (hub_cache.storage_of(REPO) / "refs" / "main").read_text() == COMMIT
    assert found.bytes == sum(path.stat().st_size for path in served.repos[REPO].iterdir())
    assert all(path.is_symlink() for path in found.path.iterdir())
    served.server.shutdown()
    served.server.server_close()
    use_endpoint(monkeypatch, NOBODY)
    assert resolve(REPO, never) == found.path
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve(REPO, never) == found.path
    asked = run_here("chat", REPO, *GREEDY, "--max-tokens", 3, stdin="Hello\n")
    assert (asked.code, asked.err) == (0, "")
    assert read_folder(found.path).tensors.keys() == WEIGHTS.keys()


def test_huggingface_hub_finds_the_fetched_model(served):
    found = pull()
    served.asked.clear()
    own = huggingface_hub.snapshot_download(
        REPO, allow_patterns=repository.FILES, local_files_only=True
    )
    assert Path(own) == found.path
    files = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE)
    assert [repo.size_on_disk for repo in files.repos] == [found.bytes] and not files.warnings
    assert served.asked == []


def test_pulling_again_fetches_only_what_is_new(served):
    first = pull()
    served.asked.clear()
    assert pull() == first and served.fetched() == set()
    served.commit = OTHER
    edit(served.repos[REPO] / "generation_config.json", eos_token_id=1)
    second = pull()
    assert second.commit == OTHER and served.fetched() == {"generation_config.json"}
    assert resolve(REPO, never) == second.path != first.path
    assert read_folder(first.path).generation_config["eos_token_id"] == 2


def test_a_revision_is_a_branch_a_tag_or_a_commit(served):
    assert pull("v1").commit == COMMIT
    assert (hub_cache.storage_of(REPO) / "refs" / "v1").read_text() == COMMIT
    assert pull(COMMIT).path == pull("v1").path
    assert not (hub_cache.storage_of(REPO) / "refs" / COMMIT).exists()
    assert hub_cache.find_in_cache(REPO) is None  # main was not asked for


def test_offline_the_cached_model_is_used(served, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it" in refused()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found = pull()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    lines: list[str] = []
    assert pull_from_hub(REPO, "main", lines.append, lambda *_: None) == found
    assert "may be old" in lines[0]


# --- connections that break ---


def broken_after(count: int) -> Callable[[bytes, int], bytes]:
    return lambda content, start: content[:count]


def test_a_download_resumes_where_the_connection_broke(served):
    size = (served.repos[REPO] / SHARD).stat().st_size
    step = size // 5
    served.sent[SHARD] = broken_after(step)
    assert read_folder(pull().path).tensors.keys() == WEIGHTS.keys()
    assert served.ranges == [(SHARD, start) for start in range(step, size, step)]


def test_a_damaged_partial_file_is_fetched_again(served):
    served.sent[SHARD] = lambda content, start: bytes(1_000) if start == 0 else b""
    refused()
    served.sent.clear()
    assert read_folder(pull().path).tensors.keys() == WEIGHTS.keys()


def test_a_hub_that_knows_no_ranges_sends_all_again(served, monkeypatch):
    served.sent[SHARD] = lambda content, start: content[: 1_000 if start == 0 else 0]
    refused()
    served.sent.clear()
    answer = served.answer
    monkeypatch.setattr(served, "answer", lambda path, start: answer(path, 0))
    assert read_folder(pull().path).tensors.keys() == WEIGHTS.keys()


def test_a_busy_hub_is_asked_again(served, monkeypatch):
    busy = iter([(503, {}, b"", ""), (429, {}, b"", "")])
    answer = served.answer
    monkeypatch.setattr(
        served,
        "answer",
        lambda path, start: (next(busy, None) if SHARD in path else None) or answer(path, start),
    )
    pull()
    assert next(busy, None) is None


KILLED = """
import os, sys
from mlx_stream.hub import repository
from mlx_stream.hub.resolve import pull

def stop(done, total):
    if done > 3 * total // 4:
        os._exit(9)

pull(sys.argv[1], "main", print, stop)
"""


def test_a_killed_download_looks_like_none_and_is_resumed(served):
    served.sent[SHARD] = broken_after(50_000)
    env = {**os.environ, "HF_ENDPOINT": served.endpoint}
    killed = subprocess.run([sys.executable, "-c", KILLED, REPO], env=env, capture_output=True)
    assert killed.returncode == 9, killed.stderr
    assert cached_models() == [] and hub_cache.find_in_cache(REPO) is None
    served.ranges.clear()
    pull()
    assert served.ranges[0][1] > 0
    assert not any(name.endswith(".incomplete") for name in blobs())


def test_two_processes_fetch_each_file_once(served):
    def once_both_have_begun(content: bytes, start: int) -> bytes:
        until = time.monotonic() + 30
        while "".join(served.asked).count("/revision/") < 2 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        return content

    served.sent["config.json"] = served.sent[SHARD] = once_both_have_begun
    env = {**os.environ, "HF_ENDPOINT": served.endpoint}
    both = [
        subprocess.Popen(program("pull", REPO), env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(paths) == 1
    fetched = [path for path in served.asked if "/resolve/" in path]
    assert len(fetched) == len(set(fetched)) == len(list(served.repos[REPO].iterdir()))


# --- the verb ---


def test_the_verb_prints_the_commit_and_json(served):
    found = pull()
    result = run_here("pull", REPO)
    assert (result.code, result.err) == (0, "")
    assert (
        result.out
        == f"{REPO} at commit {COMMIT}: {found.bytes / 1e6:,.1f} MB on disk, in {found.path}\n"
    )
    assert parsed(run_here("pull", REPO, "--revision", "v1", "--json").out) == {
        "name": REPO,
        "revision": "v1",
        "commit": COMMIT,
        "bytes": found.bytes,
        "path": str(found.path),
    }


@pytest.mark.parametrize("source", [".", "none", "a/b/c", "model.gguf"])
def test_a_source_that_is_not_on_the_hub(source):
    result = run_here("pull", source)
    assert (result.code, result.out) == (1, "")
    assert f"{source!r} is not on the Hub; expected a Hub id org/name" in result.err


def test_progress_is_in_bytes(served):
    told: list[tuple[int, int]] = []
    total = pull_from_hub(REPO, "main", silent, lambda *count: told.append(count)).bytes
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted(d for d, _ in told)
