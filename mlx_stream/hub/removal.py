"""Removes a model from this machine: a cached one or a converted folder; fetches nothing."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_stream.checkpoint.write import is_converted
from mlx_stream.errors import SourceError
from mlx_stream.hub.hub_cache import storage_of
from mlx_stream.hub.resolve import hub_id, local_path, not_a_model
from mlx_stream.hub.starter import STARTER, STARTER_REPO, starter_folder


@dataclass(frozen=True)
class StoredModel:
    """The folders of a model on this machine, and their size in bytes."""

    folders: tuple[Path, ...]
    bytes: int

    def remove(self) -> None:
        """Delete the folders.

        Raises:
            SourceError: a folder could not be deleted.
        """
        for folder in self.folders:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise SourceError(f"{folder}: could not be removed: {error.strerror}") from error


def find_stored(source: str) -> StoredModel:
    """Find the folders of a cached model, complete or not, or of a converted one.

    Raises:
        SourceError: the model is not on this machine, or `convert` did not write the folder.
    """
    if source == STARTER:
        places = [storage_of(STARTER_REPO), starter_folder()]
    elif path := local_path(source):
        if path.is_symlink() or not path.is_dir() or not is_converted(path):
            raise SourceError(
                f"{source}: not a folder that `mlx_stream convert` wrote, or it contains other "
                "files; delete it yourself"
            )
        places = [path.absolute()]
    elif repo := hub_id(source):
        places = [storage_of(repo)]
    else:
        raise not_a_model(source)
    found = tuple(place for place in places if place.is_dir())
    if not found:
        raise SourceError(f"{source} is not on this machine; `mlx_stream ls` lists what is")
    return StoredModel(found, sum(map(disk_bytes, found)))


def disk_bytes(folder: Path) -> int:
    """Return a folder's size in bytes, without following links."""
    files = (path for path in folder.rglob("*") if not path.is_symlink())
    return sum(path.stat().st_size for path in files if path.is_file())
