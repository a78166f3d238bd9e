"""The user's config file: defaults for new conversations; does not act on them.

    model = "mlx-community/Qwen3-4B-4bit"
    window = 8188
    temperature = 0.6
    system = "You are brief."

    [prompts]
    pirate = "You are a pirate."

A value comes from an option, or else from the environment (MLX_STREAM_MODEL and so on), or else
from the file.
"""

import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import platformdirs

from mlx_stream.errors import ValueRefused, one_line
from mlx_stream.program.atomic_replace import flush
from mlx_stream.program.paths import user_folder

NAMED = "prompts."
KINDS: dict[str, type] = {
    "model": str,
    "window": int,
    "system": str,
    "temperature": float,
}
WORDS = {str: "text", int: "a whole number, 1 or more", float: "a number from 0 to 5"}
KEYS = f"{', '.join(KINDS)} and prompts.NAME"


def config_path() -> Path:
    """Return the path of the config file, which need not exist."""
    return user_folder("config.toml", platformdirs.user_config_dir("mlx_stream"), "config.toml")


def setting(key: str) -> Any:
    """Return a setting from the environment or the config file, or None.

    Raises:
        ValueRefused: the value or the file cannot be used.
    """
    kind_of(key)
    variable = f"MLX_STREAM_{key.upper()}"
    if text := os.environ.get(variable):
        return parse_value(key, text, variable)
    return read_config().get(key)


def named_prompt(text: str) -> str:
    """Return the system prompt that `@NAME` stands for, or the text itself.

    Raises:
        ValueRefused: the config file has no such prompt.
    """
    if not re.fullmatch(r"@[A-Za-z0-9_-]+", text):
        return text
    prompts = {key: value for key, value in read_config().items() if key.startswith(NAMED)}
    found = prompts.get(NAMED + text[1:])
    if found is None:
        names = ", ".join(f"@{key.removeprefix(NAMED)}" for key in prompts) or "there are none"
        raise ValueRefused(
            f"no system prompt is named {text}; the config file's prompts: {names}. Add one with "
            f"mlx_stream config set {NAMED}{text[1:]} TEXT"
        )
    return found


def read_config() -> dict[str, Any]:
    """Return the values of the config file by key; a named prompt's key is `prompts.NAME`.

    Raises:
        ValueRefused: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    return parse_config(read_text(), config_path())


def set_value(key: str, text: str) -> None:
    """Change a value in the config file; its comments and other values are kept.

    Raises:
        ValueRefused: the key or the value is wrong, or the file cannot be written.
    """
    value, path, before = parse_value(key, text, key), config_path(), read_text()
    wanted, after = {**parse_config(before, path), key: value}, with_value(before, key, value)
    try:
        kept = after is not None and parse_config(after, path) == wanted
    except ValueRefused:  # the file writes the key in a different form
        kept = False
    if after is None or not kept:
        raise ValueRefused(f"{path}: {key} cannot be changed from here: edit the file")
    write_text(path, after)


def kind_of(key: str) -> type:
    kind = KINDS.get(key, str if re.fullmatch(r"prompts\.[A-Za-z0-9_-]+", key) else None)
    if kind is None:
        raise ValueRefused(f"unknown key {key!r}: the keys are {KEYS}")
    return kind


def parse_value(key: str, text: str, name: str) -> Any:
    kind = kind_of(key)
    try:
        text.encode()
        value = kind(text.replace(",", "") if kind is int else text)
        if kind is not str:
            check_range(value)
    except (ValueError, OverflowError):
        raise ValueRefused(f"{name} must be {WORDS[kind]}, not {text!r:.60}") from None
    return value


def check_range(value: int | float) -> None:
    """Refuse a window or temperature that no conversation can have.

    Raises:
        ValueError: it is out of range.
    """
    if isinstance(value, float):
        from mlx_stream.sampling import Sampling

        Sampling(value)
    elif value < 1:
        raise ValueError


def parse_config(text: str, path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueRefused(f"{path}: is not TOML: {one_line(error, 100)}") from error
    prompts = found.pop("prompts", {})
    if not isinstance(prompts, dict):
        raise ValueRefused(f"{path}: prompts must be a table of names and texts")
    kinds: dict[str, Any] = {**KINDS, **dict.fromkeys((f"{NAMED}{name}" for name in prompts), str)}
    values = {**found, **{f"{NAMED}{name}": value for name, value in prompts.items()}}
    for key, value in values.items():
        if key not in kinds:
            raise ValueRefused(f"{path}: unknown key {key!r}: the keys are {KEYS}")
        kind = kinds[key]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueRefused(f"{path}: {key} must be {WORDS[kind]}, not {value!r}")
    return values


def with_value(text: str, key: str, value: Any) -> str | None:
    """Return a file's text with one value changed or added; None if a comment could be lost."""
    table, _, name = key.rpartition(".")
    # A JSON string is also a TOML string, except for the character DEL.
    line = f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
    lines, section, end = text.removesuffix("\n").split("\n") if text else [], "", None
    for number, old in enumerate(lines):
        if heading := re.match(r"\s*\[([^\]]*)\]", old):
            section = heading[1].strip()
        elif section == table and re.match(rf"\s*{re.escape(name)}\s*=", old):
            comment = re.search(r"\s+#[^\"']*$", old)
            if comment is None and "#" in old:
                return None
            lines[number] = line + (comment[0] if comment else "")
            return "\n".join(lines) + "\n"
        if section == table and old.strip():
            end = number + 1
    if end is None:
        new = [*lines, "", f"[{table}]", line] if table else [line, *lines]
    else:
        new = [*lines[:end], line, *lines[end:]]
    return "\n".join(new).lstrip("\n") + "\n"


def read_text() -> str:
    path = config_path()
    try:
        if path.exists() and not path.is_file():
            raise ValueRefused(f"{path}: is not a file")
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise ValueRefused(f"{path}: is not UTF-8") from None
    except OSError as error:
        raise ValueRefused(f"{path}: cannot be read: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Replace the file atomically; a link to it stays a link."""
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            new.write_text(text, "utf-8")
            if path.exists():
                shutil.copymode(path, new)
            flush(new)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise ValueRefused(f"{path}: cannot be written: {error.strerror}") from error
