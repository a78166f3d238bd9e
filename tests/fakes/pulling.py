"""Pulls the model from the Hub on loopback, and checks what the cache then holds."""

import pytest

from mlx_stream.errors import MlxStreamError
from mlx_stream.hub import hub_cache, resolve
from mlx_stream.hub.listing import cached_models
from mlx_stream.hub.resolve import PulledModel
from tests.fakes.loopback import REPO, silent

SHARD = "model.safetensors"


def pull(revision: str = "main") -> PulledModel:
    return resolve.pull(REPO, revision, silent, lambda done, total: None)


def refused(revision: str = "main") -> str:
    """Return why a model was not fetched; check that nothing looks fetched."""
    with pytest.raises(MlxStreamError) as error:
        pull(revision)
    assert "\n" not in str(error.value) and str(error.value).startswith((REPO, "--revision"))
    storage = hub_cache.storage_of(REPO)
    assert list(storage.glob("refs/*")) == []
    assert hub_cache.find_in_cache(REPO) is None
    assert cached_models() == []
    return str(error.value)


def blobs() -> dict[str, int]:
    """Return what the cache holds, by name."""
    return {path.name: path.stat().st_size for path in hub_cache.storage_of(REPO).glob("blobs/*")}
