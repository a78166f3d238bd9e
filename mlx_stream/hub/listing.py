"""Lists the models on this machine that can be opened offline; fetches nothing.

These are cached models and folders written by `convert`, whose paths are kept in a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_stream.checkpoint.folder import missing_files
from mlx_stream.checkpoint.json_files import read_json
from mlx_stream.checkpoint.text_model import text_config
from mlx_stream.checkpoint.write import is_converted
from mlx_stream.config import ARCHITECTURES
from mlx_stream.errors import CheckpointError
from mlx_stream.hub.hub_cache import find_in_cache
from mlx_stream.hub.repository import HUB_ID
from mlx_stream.hub.starter import STARTER, is_complete, size_of, starter_folder
from mlx_stream.program.paths import data_folder, private


@dataclass(frozen=True)
class CachedModel:
    """A model that can be opened offline: its name for `resolve`, and its size on disk in bytes.

    `date` is when it was fetched or converted, in seconds since 1970.
    """

    name: str
    path: Path
    bytes: int
    kind: Literal["hub", "starter", "converted"]
    date: float


def cached_models() -> list[CachedModel]:
    """List the models that `resolve` opens without the network.

    First those in the Hub's cache, then the starter from the package index, then converted folders.
    """
    models = list(cached_hub_models())
    if is_complete(folder := starter_folder()):
        models.append(describe_folder(STARTER, folder, "starter"))
    for folder in converted_folders():
        models.append(describe_folder(str(folder), folder, "converted"))
    return models


def describe_folder(
    name: str, folder: Path, kind: Literal["hub", "starter", "converted"]
) -> CachedModel:
    return CachedModel(name, folder, size_of(folder), kind, folder.stat().st_mtime)


def cached_hub_models() -> Iterator[CachedModel]:
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    names = (path.name.removeprefix("models--").replace("--", "/") for path in folders)
    for name in sorted(filter(HUB_ID.fullmatch, names), key=str.lower):
        folder = find_in_cache(name)
        if folder and is_supported(folder):
            yield describe_folder(name, folder, "hub")


def converted_list() -> Path:
    """Return the file with the paths of converted folders, one per line; it may not exist."""
    return data_folder().parent / "converted"


def converted_folders() -> list[Path]:
    """Return the folders that `convert` wrote and that still exist, oldest first."""
    try:
        lines = converted_list().read_text("utf-8").splitlines()
    except OSError:
        return []
    paths = map(Path, dict.fromkeys(lines))
    return [path for path in paths if path.is_dir() and is_converted(path)]


def record_converted(folder: Path) -> None:
    """Add a folder to the file that lists the converted ones."""
    private(converted_list().parent)
    with converted_list().open("a", encoding="utf-8") as file:
        file.write(f"{folder.absolute()}\n")


def is_supported(folder: Path) -> bool:
    """Return whether a folder is complete and of a supported family."""
    try:
        family = text_config(read_json(folder / "config.json")).get("model_type")
    except CheckpointError:
        return False
    return family in ARCHITECTURES and not missing_files(folder)
