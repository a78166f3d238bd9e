"""Reads untrusted text and JSON files up to a size limit; writes JSON; independent of models."""

import json
import os
from pathlib import Path
from typing import Any

from mlx_stream.errors import CheckpointError, one_line

# Far larger than any real file: limits the memory that a hostile file can make us use.
JSON_BYTES = 8 << 20


def exists_as_file(path: Path) -> bool:
    """Return whether `path` is a regular file, and not a folder or a pipe, which would block."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or contains a zero byte
        return False


def read_text_file(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CheckpointError(f"{path}: too large; the limit is {limit >> 20} MB")
            # `read` allocates as much as it is asked for: never ask for more than there is.
            return file.read(size).decode()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> dict[str, Any]:
    text = read_text_file(path, JSON_BYTES)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply to be read") from error
    except ValueError as error:  # JSONDecodeError, or a number with thousands of digits
        raise CheckpointError(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, not {json.dumps(value)[:40]}")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if exists_as_file(path) else {}


def write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
