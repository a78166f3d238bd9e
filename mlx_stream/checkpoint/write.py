"""Writes a checkpoint as a folder that appears complete or not at all; independent of modules."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.json_files import read_json, write_json
from mlx_stream.checkpoint.shards import Shards, write_shards
from mlx_stream.errors import CheckpointError, MlxStreamError, ValueRefused, one_line
from mlx_stream.program.atomic_replace import flush, partial_folder, replace_folder

# Says how a model was converted and at what cost; a folder that contains it may be replaced.
CONVERSION = "conversion.json"
WRITTEN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|conversion)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)


def write_folder(
    checkpoint: Checkpoint,
    out: Path,
    tensors: Iterable[tuple[str, mx.array]] | None = None,
    about: Callable[[Shards], dict[str, Any]] | None = None,
    replace: bool = False,
) -> Shards | None:
    """Write a checkpoint in mlx-lm's layout to the folder `out`, created by a single rename.

    Args:
        tensors: names and tensors to write instead of the checkpoint's own; each is requested
            once, after those before it have been released.
        about: returns the content of `conversion.json`, which makes the folder replaceable.
        replace: whether to replace such a folder.

    Returns:
        What was written, or None if another process wrote `out` first: its folder is kept.

    Raises:
        CheckpointError: the folder could not be written; nothing is left behind.
    """
    out = out.absolute()
    if tensors is None:
        tensors = ((name, checkpoint.tensors[name]) for name in checkpoint.tensors)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(out.parent, out.name) as partial:
            write_small_files(checkpoint, partial)
            written = write_shards(tensors, partial)
            if about is not None:
                write_json(about(written), partial / CONVERSION)
            for path in (*partial.iterdir(), partial):
                flush(path)
            return written if move_into_place(partial, out, replace) else None
    # mx.save_safetensors raises RuntimeError for a full disk; json raises the others.
    except (OSError, RuntimeError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, MlxStreamError):
            raise
        raise CheckpointError(f"{out}: could not be written: {one_line(error)}") from error


def write_small_files(checkpoint: Checkpoint, folder: Path) -> None:
    config = dict(checkpoint.config)
    # transformers reads one name and mlx-lm the other.
    if config.get("quantization") is not None:
        config["quantization_config"] = config["quantization"]
    write_json(dict(sorted(config.items())), folder / "config.json")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer, encoding="utf-8")
    write_json(checkpoint.tokenizer_config, folder / "tokenizer_config.json")
    if checkpoint.generation_config:
        write_json(checkpoint.generation_config, folder / "generation_config.json")


def move_into_place(partial: Path, out: Path, replace: bool) -> bool:
    try:
        if replace and out.exists() and not is_empty(out):
            refuse_taken(out, replace)
            replace_folder(partial, out)
        else:
            partial.rename(out)
    except OSError:
        if out.exists():
            return False
        raise
    flush(out.parent)
    return True


def replace_json(value: dict[str, Any], path: Path) -> None:
    """Replace a JSON file in a finished folder with a single rename.

    Raises:
        CheckpointError: the file could not be written; the old one is kept.
    """
    folder = path.absolute().parent
    try:
        with partial_folder(folder.parent, folder.name) as partial:
            write_json(value, partial / path.name)
            flush(partial / path.name)
            (partial / path.name).replace(path)
            flush(folder)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written: {one_line(error)}") from error


# --- what may be replaced ---


def refuse_taken(out: Path, replace: bool) -> None:
    """Refuse a path for a new folder if something is there that may not be replaced.

    Raises:
        ValueRefused: the folder may not be written there.
    """
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise ValueRefused(f"{out}: is a {'link' if out.is_symlink() else 'file'}: use a folder")
    if is_empty(out):
        return
    if not replace:
        raise ValueRefused(f"{out}: already exists: use another folder, or --force to replace it")
    if not is_converted(out):
        raise ValueRefused(
            f"{out}: not written by `mlx_stream convert`, or it contains other files; it will not "
            "be replaced: use another folder"
        )


def is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def is_converted(folder: Path) -> bool:
    """Return whether the folder was written by a conversion and contains nothing else."""
    try:
        about = read_json(folder / CONVERSION)
    except CheckpointError:
        return False
    return "conversion" in about and all(
        path.is_file() and not path.is_symlink() and WRITTEN.fullmatch(path.name)
        for path in folder.iterdir()
    )
