"""Where an assistant's files are; independent of their contents."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_stream.program.paths import cache_folder, data_folder
from mlx_stream_assistant.errors import AssistantError

# Set for a process that launchd started: its exit status must be 0 whenever it ends on its own.
AGENT = "MLX_STREAM_ASSISTANT_AGENT"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", re.ASCII)


@dataclass(frozen=True)
class AssistantPaths:
    """The files of one assistant; any of them may be missing."""

    journal: Path
    snapshot: Path  # can be rebuilt from the journal
    lock: Path
    socket: Path
    log: Path  # the log of a process that launchd started


def assistant_paths(name: str) -> AssistantPaths:
    """Return where an assistant's files are."""
    if not NAME.fullmatch(name):
        raise AssistantError(
            f"{name[:80]!r} is not a valid assistant name; expected 1 to 32 letters (a-z, A-Z), "
            "digits, '-', '_' and '.', not starting with '.' or '-'"
        )
    data, cache = data_folder("assistant"), cache_folder("assistant")
    return AssistantPaths(
        journal=data / f"{name}.db",
        snapshot=cache / f"{name}.safetensors",
        lock=data / f"{name}.lock",
        socket=data / f"{name}.sock",
        log=data / f"{name}.log",
    )
