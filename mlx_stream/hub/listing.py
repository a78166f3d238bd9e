"""Lists the models on this machine that open without the network; fetches nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_stream.checkpoint.folder import missing_files
from mlx_stream.checkpoint.json_files import read_json
from mlx_stream.checkpoint.text_model import text_config
from mlx_stream.config import ARCHITECTURES
from mlx_stream.errors import CheckpointError
from mlx_stream.hub.hub_cache import find_in_cache
from mlx_stream.hub.repository import HUB_ID
from mlx_stream.hub.starter import STARTER, is_complete, size_of, starter_folder


@dataclass(frozen=True)
class CachedModel:
    """A model that opens without the network: its name for `resolve`, and bytes on disk."""

    name: str
    path: Path
    bytes: int
    kind: Literal["hub", "starter"]


def cached_models() -> list[CachedModel]:
    """List the models `resolve` opens without the network: the Hub's cache, then the starter."""
    models = list(cached_hub_models())
    if is_complete(folder := starter_folder()):
        models.append(CachedModel(STARTER, folder, size_of(folder), "starter"))
    return models


def cached_hub_models() -> Iterator[CachedModel]:
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    names = (path.name.removeprefix("models--").replace("--", "/") for path in folders)
    for name in sorted(filter(HUB_ID.fullmatch, names), key=str.lower):
        folder = find_in_cache(name)
        if folder and is_supported(folder):
            yield CachedModel(name, folder, size_of(folder), "hub")


def is_supported(folder: Path) -> bool:
    """Return whether a folder is complete and of a supported family."""
    try:
        family = text_config(read_json(folder / "config.json")).get("model_type")
    except CheckpointError:
        return False
    return family in ARCHITECTURES and not missing_files(folder)
