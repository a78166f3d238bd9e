"""A folder of notes -> what is new in them; holds no file open between two polls.

A note is read whole, once it was left alone from one look to the next. If it only grew since, what
was added is read; if it was changed, all of it again, under a heading of its own.
"""

import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from mlx_stream_assistant.decode import NotText, decode
from mlx_stream_assistant.journal import Chunk

SUFFIXES = (".txt", ".md", ".markdown")
# Seconds between two looks at the names in a folder.
BETWEEN = 2.0
# More in a large folder: looking takes at most this part of the time.
PART_OF_THE_TIME = 0.005
# Notes of one folder that are read, and the folders below it that are looked into.
MOST_NOTES, DEEPEST = 10_000, 8
# A longer one is no note: it can be followed as a file.
LONGEST_NOTE = 2**20
# Some editors begin a file with it; it is no text.
BYTE_ORDER_MARK = "\ufeff"
Seen = tuple[int, int, int]  # file number, bytes, time of change


class NotesFolder:
    """A folder whose text and Markdown files are read.

    Args:
        places: by path, where a journal says that each of its notes stands.
        excluded: says of a file that it is not to be read: the assistant's own, for one.
        tell: told in one line what the user should know.
        clock: seconds.
    """

    def __init__(
        self,
        path: Path,
        places: dict[str, dict[str, Any]],
        tell: Callable[[str], None],
        excluded: Callable[[Path], bool] = lambda path: False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.path, self.name, self._tell, self._excluded = path, str(path), tell, excluded
        self._clock, self._next_look = clock, 0.0
        self._places = dict(places)
        self._looked: dict[str, Seen] = {}  # as they were at the last look
        self._changed: list[str] = []
        self._complaint = ""  # about the folder
        self._refused: dict[str, tuple[Seen, str]] = {}  # notes, as they were, and why

    @property
    def state(self) -> dict[str, Any]:
        """What there is to say about it: notes read, notes to read, and what is wrong with it."""
        complaints = [self._complaint, *(why for _, why in self._refused.values()), ""]
        return {
            "notes": len(self._places),
            "waiting": len(self._changed),
            "complaint": next(filter(None, complaints), ""),
        }

    def poll(self) -> Chunk | None:
        """Return what is new in one note, if in any; the same again until `taken` is called."""
        if not self._changed and self._clock() >= self._next_look:
            begun = self._clock()
            self._look()
            took = self._clock() - begun
            self._next_look = begun + max(BETWEEN, took / PART_OF_THE_TIME)
        while self._changed:
            path = self._changed[0]
            try:
                if (arrival := self._read(Path(path))) is not None:
                    return arrival
            except NotText as error:
                self._refuse(path, f"{error}; not read")
            except FileNotFoundError:
                pass
            except OSError as error:
                self._refuse(path, f"{path}: cannot be read: {error.strerror}; not read")
            self._changed.pop(0)
        return None

    def ack(self, arrival: Chunk) -> None:
        """Go on after what `poll` returned: it is on disk."""
        self._places[arrival.source] = arrival.place
        self._changed = [path for path in self._changed if path != arrival.source]
        self._refused.pop(arrival.source, None)

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _look(self) -> None:
        """Find the notes that were changed, and then left alone for one look."""
        try:
            found, more = {}, ""
            for path, seen in self._notes():
                if len(found) == MOST_NOTES:
                    more = f"{self.path}: has more than {MOST_NOTES:,} notes; not all are read"
                    break
                found[path] = seen
            self._complain(more)
        except OSError as error:
            why = f"{error.strerror}; waiting for it"
            if isinstance(error, NotADirectoryError):
                why = "it is a file (--follow reads one); waiting for a folder"
            self._complain(f"{self.path}: cannot be read: {why}")
            return
        self._changed = [
            path
            for path, seen in sorted(found.items(), key=lambda item: item[1][2])
            if self._looked.get(path) == seen and not self._is_known(path, seen)
        ]
        self._refused = {path: why for path, why in self._refused.items() if path in found}
        self._looked = found

    def _is_known(self, path: str, seen: Seen) -> bool:
        place, refused = self._places.get(path), self._refused.get(path)
        return bool(place and tuple(place["seen"]) == seen) or bool(refused and refused[0] == seen)

    def _notes(self) -> Iterator[tuple[str, Seen]]:
        """Yield the notes there are; links to folders are not followed.

        Raises:
            OSError: the folder cannot be read. One below it may go at any moment.
        """
        folders = [(self.path, 0)]
        while folders:
            folder, depth = folders.pop()
            with suppress(OSError) if depth else nullcontext(), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if depth < DEEPEST:
                            folders.append((Path(entry.path), depth + 1))
                    elif is_note(entry) and not self._excluded(Path(entry.path)):
                        with suppress(OSError):
                            yield entry.path, file_stamp(entry.stat())

    def _read(self, path: Path) -> Chunk | None:
        """Return what is new in a note; None if it is as it was."""
        if (name := printable_path(path)) != str(path):
            raise NotText(f"{name}: has a name that is not UTF-8: rename it")
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                return None
            if status.st_size > LONGEST_NOTE:
                raise NotText(
                    f"{path}: has {status.st_size:,} bytes, more than the {LONGEST_NOTE:,} of a "
                    "note: give it to --follow"
                )
            data = read_all(file)
        finally:
            os.close(file)
        before = self._places.get(str(path), {"bytes": 0, "crc": 0})
        count = before["bytes"] if before["bytes"] <= len(data) else 0
        grown = zlib.crc32(data[:count]) == before["crc"]
        new = data[count:] if grown else data
        place = {"seen": list(file_stamp(status)), "bytes": len(data), "crc": zlib.crc32(data)}
        at = len(data) - len(new)
        text = decode(new, str(path), at)
        if not at:
            text = text.removeprefix(BYTE_ORDER_MARK)
        title = str(path.relative_to(self.path))
        return Chunk(str(path), "note", title, new, text, place, apart=True)

    def _refuse(self, path: str, why: str) -> None:
        """Leave a note alone until it is changed, and say so."""
        self._refused[path] = (self._looked[path], why)
        self._tell(why)

    def _complain(self, complaint: str) -> None:
        """Say what is wrong with the folder, once, or that nothing is any more."""
        if complaint and complaint != self._complaint:
            self._tell(complaint)
        elif self._complaint and not complaint:
            self._tell(f"{self.path}: can be read again")
        self._complaint = complaint


def is_note(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.name.lower().endswith(SUFFIXES) and entry.is_file()
    except OSError:
        return False


def printable_path(path: Path) -> str:
    r"""Return a path as text that can be written anywhere: bytes that are not UTF-8 are escaped.

    >>> printable_path(Path("caf\udce9.md"))
    'caf\\udce9.md'
    """
    return str(path).encode("utf-8", "backslashreplace").decode()


def file_stamp(status: os.stat_result) -> Seen:
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_all(file: int) -> bytes:
    """Return a file's bytes, of which there may be more by now: at most those of a note."""
    parts = []
    left = LONGEST_NOTE
    while left and (part := os.read(file, left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
