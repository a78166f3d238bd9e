"""Where a file that was being read went in its folder, and what was begun since; reads no text."""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_stream_assistant.rotation import in_rotation_order, rotation_number

# Bytes before the place that a checksum is kept of.
TAIL = 256
# Names in a folder that are looked at for a file that was renamed.
MOST_NAMES = 10_000
Found = tuple[Path, os.stat_result]


@dataclass(frozen=True)
class FilePosition:
    """How far a file was read: the checksum is of its last bytes before `offset`.

    Attributes:
        written: when the file had been written to last then, in nanoseconds since 1970.
    """

    device: int
    inode: int
    offset: int = 0
    tail: int = 0
    written: int = 0

    def is_of(self, status: os.stat_result) -> bool:
        return (self.device, self.inode) == (status.st_dev, status.st_ino)


class FileSearch:
    """Look for the files beside one that was being read.

    Each method raises FileNotFoundError if a file is renamed meanwhile: look again.

    Args:
        path: the name that the file had.
        tell: told in one line what the user should know.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]):
        self.path, self._tell = path, tell
        self._told: set[str] = set()

    def forget_notices(self) -> None:
        """Tell again what was told: there is a file to read now."""
        self._told.clear()

    def find_renamed(self, place: FilePosition) -> Found | None:
        """Return where the file that was being read is now."""
        for path, status in self._beside():
            if place.is_of(status):
                return (path, status) if self._holds(place, path, status) else None
        return None

    def find_copy(self, place: FilePosition) -> Found | None:
        """Return a copy of what was read, named by rotation, from where there is more to read."""
        # Files of before may begin as this one; the copy was written after we read.
        since = place.written or float("inf")
        copies = [
            (path, status)
            for path, status in self._beside()
            if rotation_number(self.path.name, path.name) and status.st_mtime_ns >= since
        ]
        for path, status in sorted(copies, key=lambda found: found[1].st_mtime_ns):
            if self._holds(place, path, status):
                more = status.st_size > place.offset or self.find_between(place, (path, status))
                return (path, status) if more else None
        return None

    def find_between(self, place: FilePosition, old: Found | None) -> Found | None:
        """Return the oldest of the files that were begun after `old` and renamed before we looked.

        Those are the ones of which both rotation's names and the times they were written say so:
        one that was read long ago must not be taken for one of them.
        """
        ours = rotation_number(self.path.name, old[0].name) if old else None
        since = old[1].st_mtime_ns if old else place.written or float("inf")
        later, others = [], []
        for path, status in self._beside():
            turn = rotation_number(self.path.name, path.name)
            if ours and turn and turn[0] == ours[0] and turn > ours:
                later.append((turn[1], path, status))
            elif turn and status.st_mtime_ns >= since and not (old and path == old[0]):
                others.append((turn[1], path, status))
        later.sort(key=lambda found: found[0])
        if ours and not in_rotation_order(ours, since, later):
            others += [found for found in later if found[2].st_mtime_ns >= since]
            later = []
        if others:
            names = ", ".join(sorted(path.name for _, path, _ in others))
            self._tell_once(f"{self.path}: not read, though newer than what was read: {names}")
        for _, path, status in later:
            if (file := self._open_beside(path)) is not None:
                os.close(file)
                return path, status
        return None

    def _beside(self) -> Iterator[Found]:
        """Yield the other files in the folder; one may go at any moment."""
        with suppress(OSError), os.scandir(self.path.parent) as entries:
            for _, entry in zip(range(MOST_NAMES), entries, strict=False):
                with suppress(OSError):
                    if entry.name != self.path.name and entry.is_file(follow_symlinks=False):
                        yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _holds(self, place: FilePosition, path: Path, status: os.stat_result) -> bool:
        """Return whether a file has what was read, up to a place."""
        if status.st_size < place.offset or (file := self._open_beside(path)) is None:
            return False
        try:
            return last_bytes(file, place.offset) == place.tail
        finally:
            os.close(file)

    def _open_beside(self, path: Path) -> int | None:
        """Open another file than the one of our name; None if it cannot be read."""
        try:
            return open_file(path)
        except FileNotFoundError:
            raise  # renamed meanwhile: whoever asked looks again
        except OSError as error:
            self._tell_once(f"{path}: cannot be read: {error.strerror}; taken as not there")
            return None

    def _tell_once(self, notice: str) -> None:
        """Say what every look for a file finds, once until there is one to read."""
        if notice not in self._told:
            self._told.add(notice)
            self._tell(notice)


def open_file(path: Path) -> int:
    # O_NONBLOCK: a pipe of that name must not make us wait.
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def last_bytes(file: int, offset: int) -> int:
    """Return the CRC-32 of a file's last bytes before an offset."""
    start = max(0, offset - TAIL)
    return zlib.crc32(os.pread(file, offset - start, start))
