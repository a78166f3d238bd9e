"""Lists and fetches a model from the Hugging Face Hub; reads no tensors.

The Hub is untrusted: only file names without a path are accepted, each with a size and a hash. In
the cache, a branch's name points to a commit only once all of its files are present.
"""

import queue
import re
import shutil
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_stream.checkpoint.folder import missing_files
from mlx_stream.checkpoint.json_files import read_json
from mlx_stream.checkpoint.shards import explain_no_weights
from mlx_stream.checkpoint.text_model import text_config
from mlx_stream.config import read_config
from mlx_stream.errors import SourceError
from mlx_stream.hub.hub_cache import (
    COMMIT,
    OLDER_TEMPLATE,
    OTHER_FILES,
    SMALL_FILES,
    File,
    Repository,
    blob_of,
    keep_listing,
    link,
    name_commit,
)
from mlx_stream.hub.transfer import place_blob

PATIENCE = 15.0  # seconds to wait for the Hub's first response
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
FILES = [*SMALL_FILES, OLDER_TEMPLATE, "*.safetensors"]
MAX_FILES = 10_000
SMALL_BYTES = 64 << 20  # the maximum size of a text file

DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
REVISION = re.compile(r"(?!.*\.\.)[\w][\w./-]{0,199}", re.ASCII)

# Called with the number of bytes fetched and the total.
Bar = Callable[[int, int], None]


# --- listing ---


def ask_hub(name: str, revision: str, seconds: float) -> Repository:
    """Ask the Hub for a model's listing; raise the Hub client's errors, or TimeoutError.

    Runs in a thread, because an unresponsive name server can block for longer than HTTP timeouts.
    """
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put(
                HfApi().model_info(name, revision=revision, timeout=seconds, files_metadata=True)
            )
        except Exception as error:
            answers.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds} s") from None
    if isinstance(answer, Exception):
        raise answer
    return read_listing(name, revision, answer)


def read_listing(name: str, revision: str, info: Any) -> Repository:
    """Check a listing and keep the files that we read."""
    siblings = info.siblings or []
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise SourceError(f"{name}: the Hub does not list a commit for {revision}")
    if len(siblings) > MAX_FILES:
        raise SourceError(f"{name}: the Hub lists {len(siblings)} files, more than {MAX_FILES}")
    files, others = [], []
    for sibling in siblings:
        if not is_read(sibling.rfilename):
            others.append(str(sibling.rfilename))
            continue
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        size = sibling.lfs.size if sibling.lfs else sibling.size
        if not isinstance(size, int) or size < 0 or not DIGEST.fullmatch(str(digest)):
            raise SourceError(
                f"{name}: the Hub does not list the size and hash of {sibling.rfilename!r}, so "
                "the download cannot be checked"
            )
        if sibling.rfilename in (*SMALL_FILES, OLDER_TEMPLATE) and size > SMALL_BYTES:
            raise SourceError(
                f"{name}: {sibling.rfilename} is too large: {size >> 20} MB; the limit is "
                f"{SMALL_BYTES >> 20} MB"
            )
        files.append(File(sibling.rfilename, size, digest))
    return Repository(name, revision, info.sha, tuple(files), tuple(others))


def is_read(name: Any) -> bool:
    """Return whether a listed name is a file that we read, at the top level of the repository."""
    if not isinstance(name, str) or any(c in name for c in "/\\:\0"):
        return False
    wanted = any(fnmatch(name, pattern) for pattern in FILES)
    return wanted and not any(fnmatch(name, pattern) for pattern in OTHER_FILES)


def refuse_other_formats(repository: Repository) -> None:
    """Refuse a repository in an unsupported format before anything is fetched."""
    names = {file.name for file in repository.files}
    if not any(name.endswith(".safetensors") for name in names):
        raise SourceError(f"{repository.name}: {explain_no_weights(repository.others)}")
    for name in ("config.json", "tokenizer.json"):
        if name not in names:
            raise SourceError(
                f"{repository.name}: this model has no {name}; expected safetensors, a config.json "
                "and a tokenizer.json"
            )


def refuse_other_models(repository: Repository) -> None:
    """Refuse a model that its config shows to be unsupported, before its weights are fetched."""
    config = read_json(repository.snapshot / "config.json")
    code = config.get("auto_map")
    if isinstance(code, dict) and any(str(key).startswith("AutoModel") for key in code):
        raise SourceError(
            f"{repository.name}: it needs its own code (auto_map in its config), which is never "
            "fetched or run: there is no trust_remote_code here"
        )
    read_config(text_config(config))


# --- fetching ---


def fetch(repository: Repository, bar: Bar) -> Path:
    """Fetch the missing files of a model, check them, and register the model in the cache.

    Raises:
        SourceError: the repository is in an unsupported format, or a file does not match the
            listing.
        CheckpointError: the model's config is damaged or not supported.
        OSError, or an error from the Hub's client.
    """
    refuse_other_formats(repository)
    # The config comes first: it shows whether the model is supported.
    files = sorted(repository.files, key=lambda file: (file.name != "config.json", file.name))
    missing = sum(file.size for file in files if not blob_of(repository, file).exists())
    refuse_full_disk(repository, missing)
    total, done = sum(file.size for file in files), 0
    for file in files:
        place_blob(repository, file, lambda here, done=done: bar(done + here, total))
        done += file.size
        bar(done, total)
        link(repository, file)
        if file.name == "config.json":
            refuse_other_models(repository)
    if missing_names := missing_files(repository.snapshot):
        raise SourceError(
            f"{repository.name}: this model has no {', '.join(missing_names)}, which its index "
            "lists"
        )
    keep_listing(repository)
    name_commit(repository)
    return repository.snapshot


def refuse_full_disk(repository: Repository, needed: int) -> None:
    repository.storage.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(repository.storage).free
    if needed > free:
        raise SourceError(
            f"{repository.name}: needs {needed / 1e9:,.1f} GB, but {repository.storage.parent} has "
            f"only {free / 1e9:,.1f} GB left: free some space, or set HF_HOME to another folder"
        )
