"""`rm` removes what it names, after a yes, and nothing else."""

from pathlib import Path

import pytest

from mlx_stream.hub.hub_cache import storage_of
from mlx_stream.hub.listing import cached_models
from tests.fakes.refusals import one_line
from tests.fakes.shell import done
from tests.fakes.terminals import ENTER, Terminal

REPO = "org/name"


@pytest.fixture
def cached(whole: Path) -> Path:
    """Cache two models, each with a blob and a link to it; return the folder of one."""
    for name in (REPO, "org/other"):
        blobs, snapshot = storage_of(name) / "blobs", storage_of(name) / "snapshots" / ("0" * 40)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (blobs / "a").write_bytes(bytes(1000))
        (snapshot / "config.json").symlink_to(blobs / "a")
    return storage_of(REPO)


def test_a_cached_model_is_removed_and_its_bytes_are_counted_once(cached: Path) -> None:
    assert done("rm", REPO, "--yes").out == f"removed {REPO}: 0.0 MB\n"
    assert not cached.exists() and storage_of("org/other").exists()
    assert one_line("rm", REPO, "--yes").startswith(f"{REPO} is not on this machine; ")


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("n", False), ("", False)])
def test_it_asks_first(cached: Path, answer: str, removed: bool) -> None:
    assert one_line("rm", REPO) == f"rm would remove {cached} (0.0 MB): add --yes"
    terminal = Terminal("-m", "mlx_stream", "rm", REPO)
    terminal.see("? y or n: ")
    terminal.type(*answer, ENTER)
    terminal.end()
    assert cached.exists() != removed


def test_a_converted_folder_is_listed_and_removed(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    done("convert", tiny, out)
    [model] = cached_models()
    assert (model.name, model.path, model.kind) == (str(out), out, "converted")
    assert str(out) in done("ls").out
    (out / "note.txt").touch()
    assert cached_models() == []
    assert "delete it yourself" in one_line("rm", out, "--yes")
    (out / "note.txt").unlink()
    done("rm", out, "--yes")
    assert not out.exists() and cached_models() == []


def test_a_folder_of_someone_else_stays(tiny: Path) -> None:
    assert "not a folder that `mlx_stream convert` wrote" in one_line("rm", tiny, "--yes")
    assert tiny.is_dir()


def test_a_folder_that_cannot_be_recorded_is_converted_all_the_same(
    tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_STREAM_HOME", str(tmp_path / "file"))
    assert "`mlx_stream ls` will not list" in done("convert", tiny, tmp_path / "out").err
    assert (tmp_path / "out" / "config.json").exists()
