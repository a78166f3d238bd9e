"""The lines typed at any prompt, kept by prompt_toolkit in a file that only its owner may read."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

HISTORY = "history"  # The file's name.
# A longer line is a pasted document: it can be recalled until the chat ends but is not saved.
LONGEST_KEPT = 2**16


class LineHistory(FileHistory):
    """A FileHistory that also reads the format of an earlier version: one JSON string per line."""

    def __init__(self, path: Path, notify: Callable[[str], None]):
        super().__init__(path)
        self.path, self.notify = path, notify

    def load_history_strings(self) -> Iterable[str]:
        """Return lines, newest first; those from an earlier version are the oldest."""
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
    """Open or create the history; if that fails, send a notice and keep it in memory only."""
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


def remove_lines(path: Path, questions: Collection[str]) -> None:
    """Remove questions from the history, whether they were typed as is, edited or escaped.

    Raises:
        OSError: the history cannot be written.
    """
    if not path.is_file():
        return
    typed = {form for text in questions for form in (text, f"/{text}", f"/edit {text}")}
    data = path.read_bytes()
    # An entry is a comment and lines that start with "+"; an earlier version wrote JSON strings.
    entries = re.findall(rb"(?m)^(?:#[^\n]*\n(?:\+[^\n]*\n?)*|[^\n]*\n?)", data)
    kept = b"".join(entry for entry in entries if entry_text(entry) not in typed)
    if kept == data:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".history.", delete=False) as file:
        file.write(kept)
    Path(file.name).replace(path)


def entry_text(entry: bytes) -> str:
    """Return the text of an entry in the history file."""
    if entry.startswith(b'"'):
        with suppress(ValueError):
            return json.loads(entry)
    lines = (line[1:] for line in entry.splitlines() if line.startswith(b"+"))
    return b"\n".join(lines).decode("utf-8", "replace")


def unusable(path: Path, error: OSError) -> str:
    why = f"cannot be used: {error.strerror}"
    return f"the history {path} {why}; lines can be recalled only until this chat ends"
