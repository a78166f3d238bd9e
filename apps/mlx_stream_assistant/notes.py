"""Decides when a note is due and writes it to the diary, a Markdown file; independent of streams.

The journal records a note, and the length of the file, before the note is written. If a crash
leaves a partial note in the file, it is removed and written again; a complete note is kept.
"""

import os
import re
import stat
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.journal import Journal

# How many seconds after startup an overdue note is written.
SETTLING = 60.0
# The beginning of a quote or list item, which may contain any other block.
BEFORE_A_BLOCK = re.compile(r"\A[\s>*+\-\d.)]*")
EMPTY = "(The model had nothing to say.)"


class NoteSchedule:
    """When the next note is due.

    Two clocks are needed: one stops while a Mac sleeps, and the other may be set back.

    Args:
        every: seconds between notes.
        last: when the last note was written, in seconds since 1970; 0 if never.
    """

    def __init__(self, every: float, last: float):
        self._every = every
        # If the system clock was set back, the last note counts as just written.
        left = every - max(0.0, time.time() - last)
        self._set(max(left, min(every, SETTLING)) if last else every)

    def is_due(self) -> bool:
        return time.monotonic() >= self._clock or time.time() >= self._date

    def restart(self) -> None:
        """Restart the countdown, because a note has just been written or attempted."""
        self._set(self._every)

    def _set(self, seconds: float) -> None:
        self._clock, self._date = time.monotonic() + seconds, time.time() + seconds


class NotesFile:
    """A Markdown file that dated notes are added to."""

    def __init__(self, path: Path, journal: Journal):
        self.path, self._journal = path, journal

    def check(self) -> None:
        """Check that the file can be written; create it if it does not exist."""
        os.close(self._open_file())

    def write(self, text: str, when: datetime, about: str, noted: int) -> str:
        """Add a note about the first `noted` bytes read, with a line on what it covers; return it.

        When this returns, the note is on disk. If it cannot be written now, `finish` will write it.
        """
        self.finish()
        note = markdown(text, when, about)
        file = self._open_file()
        try:
            whole = (missing_line_ends(file) + note.encode()).decode()
            begun = {"note": whole, "at": os.fstat(file).st_size}
            self._journal.begin_note(begun, noted, when.timestamp())
        finally:
            os.close(file)
        self.finish()
        return note

    def finish(self) -> None:
        """Finish writing the pending note, unless the file already has it."""
        begun = self._journal.writing
        if begun is None:
            return
        file = self._open_file()
        try:
            self._put(file, begun)
        except OSError as error:
            raise self._cannot(error) from error
        finally:
            os.close(file)
        self._journal.end_note()

    def _put(self, file: int, begun: dict[str, Any]) -> None:
        data, at, end = begun["note"].encode(), begun["at"], os.fstat(file).st_size
        there = os.pread(file, len(data), at)
        if there == data:
            return
        if end == at + len(there) and data.startswith(there):
            os.ftruncate(file, at)  # a partial note
        else:  # another program has written to the file
            data = missing_line_ends(file) + data.lstrip(b"\n")
        end = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            os.ftruncate(file, end)
            raise
        os.fsync(file)

    def _open_file(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # O_NONBLOCK: opening a pipe with that name must not block.
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise self._cannot(error) from error
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise AssistantError(f"{self.path}: cannot write notes: it is not a file")
        return file

    def _cannot(self, error: OSError) -> AssistantError:
        return AssistantError(
            f"{self.path}: cannot write notes: {error.strerror}; "
            "check its permissions, or use another --notes"
        )


def missing_line_ends(file: int) -> bytes:
    """Return the newlines that are missing between a file's last line and a heading."""
    end = os.fstat(file).st_size
    last = os.pread(file, 2, max(0, end - 2))
    return b"\n" * len(last.rstrip(b"\n"))


def markdown(text: str, when: datetime, about: str) -> str:
    """Return a note: a heading with its date, the model's text, and a line on what it covers.

    Headings in the model's text are escaped.
    """
    lines = [escape_markdown(line.rstrip()) for line in text.strip().splitlines()]
    body = "\n".join(lines) or EMPTY
    return f"## {when:%Y-%m-%d %H:%M}\n\n{body}\n\n*{about}*\n\n"


def escape_markdown(line: str) -> str:
    """Return a line that Markdown does not treat as a heading, a code fence or HTML.

    >>> [escape_markdown(line) for line in ("# A", "> - # A", "<!-- A", "---", "- A #1")]
    ['\\\\# A', '> - \\\\# A', '\\\\<!-- A', '\\\\---', '- A #1']
    """
    start, underline = BEFORE_A_BLOCK.sub("", line), line.lstrip("> \t")
    if not start.startswith(("#", "```", "~~~", "<")):
        start = "" if underline.strip("=-") else underline
    return f"{line[: len(line) - len(start)]}\\{start}" if start else line
