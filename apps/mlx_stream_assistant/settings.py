"""Declares the options of `run` and `install` in one place; does not act on them."""

# ruff: noqa: RUF009  (`option` returns a field)

import os
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from mlx_stream_assistant.errors import AssistantError

SYSTEM = (
    "You read along with notes, logs and other texts as they are written. "
    "Answer questions about them briefly, from what you have read."
)
# The maximum number of minutes between notes or snapshots: a year.
LONGEST = 60 * 24 * 366


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """Return a field of `Settings` for an option of the same name."""
    about = {"help": help, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """What an assistant reads and writes, and how."""

    follow: list[Path] = option([], "A growing file to read. Repeatable.", "FILE")
    folder: list[Path] = option([], "A folder of .txt and .md notes. Repeatable.", "FOLDER")
    stdin: bool = option(False, "Read standard input.")
    notes: Path | None = option(None, "Markdown file to write dated notes to.", "FILE")
    every: float = option(60.0, "Minutes between notes.", "MINUTES")
    model: str = option("starter", "A folder, a Hub id, a .gguf file, or starter.", "MODEL")
    window: int | None = option(
        None, "Number of recent tokens to attend to. Default: 2,048.", "TOKENS"
    )
    name: str = option("main", "Name of the assistant, in case you run several.", "NAME")
    system: str | None = option(None, "System prompt; it is never evicted.", "TEXT")
    snapshot_every: float = option(5.0, "Minutes between snapshots, while text arrives.", "MINUTES")
    pause_on_battery: bool = option(False, "On battery power, read nothing and write no notes.")
    from_end: bool = option(False, "Start at the end of files that were not followed before.")

    def with_absolute_paths(self) -> Self:
        """Return settings that mean the same in any working directory, without duplicate paths."""
        model = self.model
        if is_folder(Path(model)) or model.endswith(".gguf"):
            model = str(absolute_path(Path(model)))
        return replace(
            self,
            model=model,
            follow=[*dict.fromkeys(map(absolute_path, self.follow))],
            folder=[*dict.fromkeys(map(absolute_path, self.folder))],
            notes=self.notes and absolute_path(self.notes),
        )

    def check(self) -> None:
        """Check that the settings can be used."""
        read = [*self.follow, *self.folder]
        if not (read or self.stdin):
            raise AssistantError("nothing to read: pass --follow FILE, --folder FOLDER or --stdin")
        for option, minutes in (("--every", self.every), ("--snapshot-every", self.snapshot_every)):
            if not 0 < minutes <= LONGEST:
                raise AssistantError(
                    f"{option} must be a number of minutes above 0, not {minutes:g}"
                )
        for text in (*map(str, read), str(self.notes), self.model, str(self.system)):
            if not text.isascii() and text != text.encode("utf-8", "replace").decode():
                raise AssistantError(f"{text!a}: is not valid UTF-8: rename it, or leave it out")
        for path in read:
            if self.notes is not None and is_same_file(path, self.notes):
                raise AssistantError(
                    f"{path}: cannot be both read and written: use another --notes file"
                )
        for folder in self.folder:
            for other in self.folder:
                if folder != other and folder.is_relative_to(other):
                    raise AssistantError(
                        f"{folder}: is inside {other}, which is read too: leave it out"
                    )

    def options(self) -> list[str]:
        """Return the command-line arguments after `run` that give the same settings."""
        words = []
        for each in fields(self):
            option, value = "--" + each.name.replace("_", "-"), getattr(self, each.name)
            if isinstance(value, bool):
                words += [option] * value
            elif value is not None:
                values = value if isinstance(value, list) else [value]
                words += [f"{option}={one}" for one in values]
        return words


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # the name is too long, or its parent cannot be accessed
        return False


def is_same_file(path: Path, other: Path) -> bool:
    with suppress(OSError):  # one does not exist yet
        if path.samefile(other):
            return True
    return os.path.realpath(path) == os.path.realpath(other)


def absolute_path(path: Path) -> Path:
    try:
        return Path(os.path.normpath(path.expanduser().absolute()))
    except RuntimeError as error:
        raise AssistantError(f"{path}: {error}") from error
