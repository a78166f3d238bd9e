"""A model's files in the Hub's cache, which has huggingface_hub's layout; fetches nothing.

Blobs are named after their hash. A snapshot links to them, and a branch's name maps to its commit.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_stream.checkpoint.folder import missing_files
from mlx_stream.checkpoint.shards import INDEX
from mlx_stream.program.notices import Notify, discard

MAIN = "main"
COMMIT = re.compile("[0-9a-f]{40}")
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
]
# Also fetched, but a model that an earlier version cached without it is complete and opens offline.
OLDER_TEMPLATE = "chat_template.json"
# The maximum number of files that a message names.
MOST_NAMED = 5
# `*` also matches in subfolders, and some repositories contain all weights twice (consolidated).
OTHER_FILES = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class File:
    """A file as the Hub lists it; `digest` is its SHA-256, or Git's SHA-1 if the file is small."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """A model at one commit: the files that we read, and the names of all others."""

    name: str
    revision: str
    commit: str
    files: tuple[File, ...]
    others: tuple[str, ...] = ()

    @property
    def storage(self) -> Path:
        return storage_of(self.name)

    @property
    def snapshot(self) -> Path:
        return self.storage / "snapshots" / self.commit


def storage_of(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def blob_of(repository: Repository, file: File) -> Path:
    return repository.storage / "blobs" / file.digest


# --- finding ---


def find_in_cache(name: str, revision: str = MAIN, notify: Notify = discard) -> Path | None:
    """Find a model in the Hub's cache, if it is complete.

    If the cache does not record which commit `main` is (it may have been copied), the newest
    complete one is used.
    """
    commit = commit_of(name, revision)
    whole = [one for one in snapshots_of(name, revision, commit) if not missing_in(name, one)]
    if not whole:
        return None
    found = max(whole, key=lambda one: one.stat().st_mtime_ns)
    if found.name != commit:
        notify(f"{name}: the cache does not say which copy is current; using {found.name[:12]}")
    return found


def explain_cache(name: str, revision: str = MAIN) -> str:
    """Return why `find_in_cache` did not find a model."""
    found = snapshots_of(name, revision, commit_of(name, revision))
    if not found:
        return "not in the cache"
    return f"its copy in the cache lacks {', '.join(missing_in(name, found[-1])[:MOST_NAMED])}"


def commit_of(name: str, revision: str) -> str:
    """Return the commit a revision refers to, according to the cache; "" if unknown."""
    if COMMIT.fullmatch(revision):
        return revision
    try:
        text = (storage_of(name) / "refs" / revision).read_text("utf-8-sig")
    except (OSError, ValueError):
        return ""
    found = text.strip(" \t\r\n\0")  # an editor or a copying tool may have added a newline
    return found if COMMIT.fullmatch(found) else ""


def snapshots_of(name: str, revision: str, commit: str) -> list[Path]:
    """Return a commit's folder or, if no branch is recorded, all folders that may be `main`."""
    folder, refs = storage_of(name) / "snapshots", storage_of(name) / "refs"
    if commit and (folder / commit).is_dir():
        return [folder / commit]
    try:
        named = refs.is_dir() and any(one.name != MAIN for one in refs.iterdir())
        found = sorted(one for one in folder.iterdir() if one.is_dir())
    except OSError:
        return []
    return found if revision == MAIN and not named else []


def missing_in(name: str, snapshot: Path) -> list[str]:
    """Return the names of the files that a snapshot lacks."""
    if missing := missing_files(snapshot):
        return missing
    if not COMMIT.fullmatch(snapshot.name):
        return []
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # This checks the small files against the listing kept next to a snapshot. Shards are
        # checked above, because other programs may fetch only some of them.
        snapshot_download(
            name,
            revision=snapshot.name,
            local_files_only=True,
            allow_patterns=SMALL_FILES,
            ignore_patterns=OTHER_FILES,
        )
    except (HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        absent = [one for one in SMALL_FILES if not (snapshot / one).exists()]
        return [f"one of {', '.join(absent)}"] if absent else []
    return []


# --- linking and naming ---


def link(repository: Repository, file: File) -> None:
    """Link a blob into the snapshot under its file name, atomically."""
    blob, name = blob_of(repository, file), repository.snapshot / file.name
    name.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(blob, name.parent)
    if name.is_symlink() and os.readlink(name) == target:  # noqa: PTH115
        return
    aside = name.with_name(f".{file.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(target)
    except OSError:  # the file system does not support links
        shutil.copyfile(blob, aside)
    aside.replace(name)


def keep_listing(repository: Repository) -> None:
    """Have huggingface_hub write its listing next to the snapshot, which makes it complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        # Since this file is already here, the call only lists the others.
        snapshot_download(
            repository.name, revision=repository.commit, allow_patterns=["config.json"]
        )
    finally:
        if shown:
            enable_progress_bars()


def name_commit(repository: Repository) -> None:
    """Point the branch at the commit, as huggingface_hub does."""
    if repository.revision == repository.commit:
        return
    name = repository.storage / "refs" / repository.revision
    name.parent.mkdir(parents=True, exist_ok=True)
    aside = name.with_name(f".{name.name}.{os.getpid()}")
    aside.write_text(repository.commit)
    aside.replace(name)
