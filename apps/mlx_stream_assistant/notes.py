"""A note -> the end of a Markdown file, whole or not at all; knows no stream.

The journal holds a note, and how long the file was, before it is written. After a crash in the
middle the half that is there is taken off and the note written again; one that is whole is not
written twice.
"""

import os
import re
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_stream_assistant.journal import Journal
from mlx_stream_assistant.paths import AssistantError

# In a quote or a list, in which there may be any other block.
BEFORE_A_BLOCK = re.compile(r"\A[\s>*+\-\d.)]*")
EMPTY = "(The model had nothing to say.)"


class NotesFile:
    """A Markdown file that dated notes are added to."""

    def __init__(self, path: Path, journal: Journal):
        self.path, self._journal = path, journal

    def check(self) -> None:
        """See that the file can be written; make it, if it is not there.

        Raises:
            AssistantError: it cannot.
        """
        os.close(self._open_file())

    def write(self, text: str, when: datetime, about: str, noted: int) -> str:
        """Add a note and return it; when this returns it is on disk, or will be.

        Args:
            text: what the model wrote.
            about: a line on what it covers.
            noted: bytes read before it.

        Raises:
            AssistantError: it cannot be written now. It is kept, and written by `finish`.
        """
        self.finish()
        note = markdown(text, when, about)
        file = self._open_file()
        try:
            begun = {
                "note": (split_file_end(file) + note.encode()).decode(),
                "at": os.fstat(file).st_size,
            }
            self._journal.begin_note(begun, noted, when.timestamp())
        finally:
            os.close(file)
        self.finish()
        return note

    def finish(self) -> None:
        """Write the note that was begun, if one was and is not there.

        Raises:
            AssistantError: it cannot be written; it is kept.
        """
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
            os.ftruncate(file, at)  # a half
        else:  # someone else wrote to it meanwhile
            data = split_file_end(file) + data.lstrip(b"\n")
        write_whole(file, data, os.fstat(file).st_size)
        os.fsync(file)

    def _open_file(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise self._cannot(error) from error
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise AssistantError(f"{self.path}: notes cannot be written to it: it is no file")
        return file

    def _cannot(self, error: OSError) -> AssistantError:
        return AssistantError(
            f"{self.path}: notes cannot be written to it: {error.strerror}; "
            "check its permissions, or give another --notes"
        )


def split_file_end(file: int) -> bytes:
    """Return the line ends that are missing between a file's last line and a heading."""
    end = os.fstat(file).st_size
    last = os.pread(file, 2, max(0, end - 2))
    return b"\n" * (len(last) - len(last[len(last.rstrip(b"\n")) :]))


def write_whole(file: int, data: bytes, end: int) -> None:
    """Append data; if it cannot be done, leave the file as long as it was."""
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError:
        os.ftruncate(file, end)
        raise


def markdown(text: str, when: datetime, about: str) -> str:
    """Return a note: a heading with its date, what the model wrote, a line on what it covers.

    Nothing in the model's text is a heading: each of those is a note's.
    """
    lines = [line.rstrip() for line in text.strip().splitlines()]
    lines = [escape_markdown(line) for line in lines]
    body = "\n".join(lines) or EMPTY
    return f"## {when:%Y-%m-%d %H:%M}\n\n{body}\n\n*{about}*\n\n"


def escape_markdown(line: str) -> str:
    """Return a line that Markdown takes for no heading, no code's fence and no HTML.

    >>> [escape_markdown(line) for line in ("# A", "> - # A", "<!-- A", "---", "- A #1")]
    ['\\\\# A', '> - \\\\# A', '\\\\<!-- A', '\\\\---', '- A #1']
    """
    start = BEFORE_A_BLOCK.sub("", line)
    before = line[: len(line) - len(start)]
    if start.startswith(("#", "```", "~~~", "<")):
        return f"{before}\\{start}"
    underline = line.lstrip("> \t")
    if underline and not underline.strip("=-"):
        return f"{line[: len(line) - len(underline)]}\\{underline}"
    return line
