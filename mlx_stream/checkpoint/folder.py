"""Reads an untrusted Hugging Face or mlx-lm folder; handles files, not modules."""

from pathlib import Path
from typing import Any

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.json_files import (
    JSON_BYTES,
    exists_as_file,
    read_json,
    read_json_if_there,
    read_text_file,
)
from mlx_stream.checkpoint.shards import read_shards, shard_names
from mlx_stream.checkpoint.text_model import text_config, text_tensors
from mlx_stream.errors import CheckpointError, SourceError, TokenizerError, one_line

# The largest known tokenizer.json is 35 MB.
TOKENIZER_BYTES = 64 << 20


def read_folder(path: Path) -> Checkpoint:
    """Read a folder in the layout of Hugging Face or mlx-lm; its tensors stay lazy.

    Raises:
        SourceError: there is no such folder.
        CheckpointError: config.json, the index or a shard is missing, damaged or truncated.
        WeightsError: tensors are missing, duplicated, or of an unsupported dtype.
        TokenizerError: there is no tokenizer.json, or it is not text.
    """
    try:
        found = path.is_dir()
    except (OSError, ValueError) as error:  # no permission, too long a name, a null byte
        raise SourceError(f"{path}: cannot be read: {one_line(error)}") from error
    if not found:
        raise SourceError(f"{path}: no such folder")
    if not exists_as_file(path / "config.json"):
        raise CheckpointError(f"{path}: no config.json; expected a folder with a model in it")
    whole, tokenizer = read_json(path / "config.json"), read_tokenizer(path)
    config = text_config(whole)
    tokenizer_config = read_tokenizer_config(path)
    generation_config = read_json_if_there(path / "generation_config.json")
    tensors, images = read_shards(path), "text_config" in whole
    tensors = text_tensors(tensors) if images else tensors
    return Checkpoint(config, tensors, tokenizer, tokenizer_config, generation_config, images)


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, with the chat template, wherever it is stored.

    transformers writes it to chat_template.jinja and gives that file precedence; for models that
    read images, older versions wrote chat_template.json.
    """
    found = read_json_if_there(path / "tokenizer_config.json")
    if exists_as_file(path / "chat_template.jinja"):
        found["chat_template"] = read_text_file(path / "chat_template.jinja", JSON_BYTES)
    elif found.get("chat_template") is None:
        older = read_json_if_there(path / "chat_template.json").get("chat_template")
        found |= {} if older is None else {"chat_template": older}
    return found


def missing_files(path: Path) -> list[str]:
    """Return the files that `read_folder` needs but `path` lacks, without opening a shard."""
    try:
        shards = shard_names(path)
    except CheckpointError:
        shards = ["model.safetensors"]
    needed = ["config.json", "tokenizer.json", *shards]
    return [name for name in needed if not exists_as_file(path / name)]


def read_tokenizer(path: Path) -> str:
    file = path / "tokenizer.json"
    if not exists_as_file(file):
        raise TokenizerError(
            f"{path}: no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        return read_text_file(file, TOKENIZER_BYTES)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
