"""The lines typed at any prompt, kept by prompt_toolkit in a file that only its owner may read."""

import errno
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

# A longer line is a pasted document: it can be recalled until the chat ends but is not saved.
LONGEST_KEPT = 2**16


class LineHistory(FileHistory):
    """A FileHistory that also reads what an earlier version wrote: a JSON string in each line."""

    def __init__(self, path: Path, notify: Callable[[str], None]):
        super().__init__(path)
        self.path, self.notify = path, notify

    def load_history_strings(self) -> Iterable[str]:
        """Return lines, newest first; those of an earlier version are the oldest."""
        yield from super().load_history_strings()
        for row in reversed(self.path.read_bytes().splitlines()):
            if row.startswith(b'"'):
                with suppress(ValueError):  # the line was cut short
                    yield json.loads(row)

    def store_string(self, string: str) -> None:
        if not string.strip() or len(string) > LONGEST_KEPT:
            return
        try:
            super().store_string(string)
        except OSError as error:
            self.notify(unusable(self.path, error))
            self.filename = os.devnull


def open_history(path: Path, notify: Callable[[str], None]) -> History:
    """Open the history, or begin it; if it cannot be used, say so and keep it in memory only."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file")
        path.touch(mode=0o600)
        path.chmod(0o600)
        return LineHistory(path, notify)
    except OSError as error:
        notify(unusable(path, error))
        return InMemoryHistory()


def unusable(path: Path, error: OSError) -> str:
    why = f"cannot be used: {error.strerror}"
    return f"the history {path} {why}; lines can be recalled only until this chat ends"
