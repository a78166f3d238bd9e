"""The list of models: sources, short names, near misses."""

import pytest

from mlx_stream.config import read_config
from mlx_stream.errors import SourceError
from mlx_stream.hub.catalog import listed_models, listed_repository
from mlx_stream.hub.repository import HUB_ID
from mlx_stream.hub.resolve import pull, resolve
from mlx_stream.hub.starter import STARTER, STARTER_REPO
from tests.fakes.loopback import never


def test_every_entry_has_its_sources_and_a_config_that_is_read():
    names = [model.name for model in listed_models()]
    assert len({*names}) == len(names) > 10 and names[0] == STARTER
    for model in listed_models():
        for source in (model.seen, model.license, model.license_source, model.shape_source):
            assert len(source) > 5, model.name
        assert (model.bytes is None) == (model.bytes_source is None), model.name
        assert HUB_ID.fullmatch(model.repository) and not HUB_ID.fullmatch(model.name)
        read_config(model.config)
    assert listed_repository(STARTER) == STARTER_REPO


def test_a_short_name_stands_for_its_repository_but_not_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    repository = "mlx-community/Qwen3-4B-4bit"
    for name in ("qwen3-4b", "Qwen3-4B"):
        assert listed_repository(name) == repository
        with pytest.raises(SourceError, match=f"^{repository}: not in the cache"):
            resolve(name, never)
        with pytest.raises(SourceError, match=f"^{repository}: not in the cache"):
            pull(name, "main", never, lambda done, total: None)
    (tmp_path / "qwen3-4b").mkdir()
    assert str(resolve("qwen3-4b", never)) == "qwen3-4b"


@pytest.mark.parametrize(
    ("source", "similar"),
    [("qwen-4b", "qwen3-4b"), ("llama3.2-3b", "llama-3.2-3b"), ("Stater", "starter")],
)
def test_a_near_miss_is_suggested(source, similar):
    for fetch in (resolve, lambda name, told: pull(name, "main", told, lambda done, total: None)):
        with pytest.raises(SourceError, match=rf"{source}' .*; did you mean {similar}\b.*\? exp"):
            fetch(source, never)


def test_what_resembles_nothing_gets_no_suggestion():
    with pytest.raises(SourceError, match="'none' is not a model; expected a folder"):
        resolve("none", never)
