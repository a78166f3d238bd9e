"""Writes a checkpoint as a folder that is whole or not there; knows files, not modules."""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.folder import check_shard, one_line
from mlx_stream.errors import CheckpointError

PARTIAL = ".partial"


def write_folder(checkpoint: Checkpoint, out: Path) -> bool:
    """Write a checkpoint in mlx-lm's layout to the new folder `out`; evaluates its tensors.

    The folder appears in one rename, flushed to disk. Return whether it is ours: if `out` exists
    by then, another process was first; its folder is kept and ours is dropped.

    Raises:
        CheckpointError: it could not be written; nothing is left behind.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(out.parent, out.name) as partial:
            write_files(checkpoint, partial)
            for path in (*partial.iterdir(), partial):
                flush(path)
            return move_into_place(partial, out)
    # mx.save_safetensors raises RuntimeError for a full disk; json the others.
    except (OSError, RuntimeError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{out}: could not be written: {one_line(error)}") from error


def write_files(checkpoint: Checkpoint, folder: Path) -> None:
    config = dict(checkpoint.config)
    # transformers reads one name and mlx-lm the other.
    if config.get("quantization") is not None:
        config["quantization_config"] = config["quantization"]
    write_json(dict(sorted(config.items())), folder / "config.json")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer, encoding="utf-8")
    write_json(checkpoint.tokenizer_config, folder / "tokenizer_config.json")
    if checkpoint.generation_config:
        write_json(checkpoint.generation_config, folder / "generation_config.json")
    weights = folder / "model.safetensors"
    mx.save_safetensors(str(weights), dict(checkpoint.tensors), metadata={"format": "mlx"})
    check_shard(weights)


def write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def move_into_place(partial: Path, out: Path) -> bool:
    try:
        partial.rename(out)
    except OSError:
        if out.exists():
            return False
        raise
    flush(out.parent)
    return True


# --- folders of work in progress ---


@contextmanager
def partial_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder in `parent` for work on `name`; it is removed on the way out, come what may.

    A process that is killed cannot remove its folder, so each call first removes those of the
    dead. Its maker holds a lock on the folder; the system lets go of it when the maker dies, which
    a process id in the name cannot tell: ids are used again, and mean nothing in another container.
    """
    sweep(parent, name)
    folder, lock = make_locked_folder(parent, name)
    try:
        yield folder
    finally:
        # If it was renamed into place there is nothing left under this name.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path, name: str) -> None:
    """Remove the folders that processes now dead left in `parent`, of their work on `name`."""
    for folder in list(parent.iterdir()):
        if not (folder.name.startswith(f".{name}.") and folder.name.endswith(PARTIAL)):
            continue
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or not a folder of ours
            continue
        try:
            if take_lock(lock, without_locks=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def make_locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = parent / f".{name}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        # Between mkdir and here another process may have swept it away: then make another.
        if take_lock(lock, without_locks=True) and folder.exists():
            return folder, lock
        os.close(lock)


def take_lock(file: int, *, without_locks: bool) -> bool:
    """Try to lock an open folder; `without_locks` is the answer where the system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True
