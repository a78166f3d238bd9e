"""Finds where a rotated file went in its folder, and which files are newer; reads no text."""

import errno
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

from mlx_stream.program.notices import Notify

# A position includes a checksum of this many bytes before it.
TAIL = 256
# The maximum number of names in a folder to search for a renamed file.
MOST_NAMES = 100_000
# The suffixes that editors add to the names of backup copies.
BACKUPS = "~", ".bak"
# The suffixes that rotation adds to a name: a number, a date or time, or a word.
ROTATED = re.compile(r"([-._])(\d{1,4})|([-._]\d[\d.:T_-]*\d)|\.(?:old|bak|prev)|~", re.ASCII)
# A date that some programs insert before the name's last suffix: at least eight digits.
DATED = re.compile(r"[-._]{1,2}(?=(?:\D*\d){8})\d[\d.:T_-]*\d", re.ASCII)
# The size of the blocks, in bytes, in which zeros are skipped.
ZEROS = 2**20
# The maximum number of file names in a notice.
MOST_SHOWN = 10
# How many seconds names must remain in no clear order before their files are skipped: until then,
# another program may still be renaming them.
UNCLEAR = 3.0
Found = tuple[Path, os.stat_result]
# A naming scheme and numbers; later files have higher numbers.
RotationNumber = tuple[str, tuple[int, ...]]
Rotated = tuple[RotationNumber, Path, os.stat_result]


@dataclass(frozen=True)
class FilePosition:
    """How far a file has been read."""

    device: int
    inode: int
    offset: int = 0
    tail: int = 0  # CRC-32 of the last bytes before `offset`.
    written: int = 0  # The file's modification time at that point, in nanoseconds since 1970.
    begun: int = 0  # The same, at the time when reading began at offset 0.

    def is_of(self, status: os.stat_result) -> bool:
        return (self.device, self.inode) == (status.st_dev, status.st_ino)

    def moved_to(self, status: os.stat_result) -> Self:
        """Return the same position in another file."""
        return replace(self, device=status.st_dev, inode=status.st_ino)


class FileSearch:
    """Searches a folder for a file that was being read, given the name that it had.

    If the name is a symbolic link, the folder and the name of its target are used instead.
    Each method raises FileNotFoundError if a file is renamed during the search; try again.
    """

    def __init__(self, path: Path, tell: Notify, clock: Callable[[], float]):
        self._given, self._tell, self._clock = path, tell, clock
        self._path = path  # with links resolved at the latest search
        self._told: set[str] = set()
        # Names in no clear order, and when they were first and last seen that way.
        self._unclear, self._first, self._last = list[str](), 0.0, 0.0

    def forget_notices(self) -> None:
        """Allow notices to be repeated, because there is a file to read now."""
        self._told.clear()

    def find_renamed(self, place: FilePosition) -> Found | None:
        """Return the current location of the file that was being read.

        Its device number may change when the machine restarts, and its inode number if an editor
        saved it before it was renamed. If nothing has been read yet, its new name must show that
        it is the same file: another file may have been given the inode.
        """
        files = self._beside()
        same = [
            one
            for one in files
            if one[1].st_ino == place.inode and self._holds(place, *one)
            if place.offset or self.is_rotated(one)
        ]
        if not any(map(self.is_rotated, same)):  # only copies or links, or nothing at all
            for found in files:
                later = place.offset and found[1].st_mtime_ns >= place.written
                if later and self.is_rotated(found) and self._holds(place, *found):
                    return found
        return max(same, key=self.is_rotated, default=None)

    def find_oldest(self) -> Found | None:
        """Return the rotated file to start with if nothing has been read yet."""
        found = [
            (turn, path, status)
            for path, status in self._beside()
            if (turn := rotation_number(self._path.name, path.name)) and turn[0] not in BACKUPS
        ]
        found.sort()
        if found and not is_whole_rotation(found):
            self._tell_not_read(found)
            return None
        return self._first_readable(found)

    def find_copy(self, place: FilePosition) -> Found | None:
        """Return a rotated copy of the file that was read."""
        # Earlier files may start like this one, but the copy was written after the first read. It
        # may be older than the last read: the file may have grown before it was truncated. If it
        # is older than the first read too, the clock was set back.
        since = min(filter(None, (place.begun, place.written)), default=float("inf"))
        for path, status in sorted(self._beside(), key=lambda found: found[1].st_mtime_ns):
            rotated = rotation_number(self._path.name, path.name) and status.st_mtime_ns >= since
            if rotated and self._holds(place, path, status):
                return path, status
        return None

    def find_between(self, place: FilePosition, old: Found | None) -> Found | None:
        """Return the oldest file that was created after `old` and renamed before we looked.

        Both the names and the modification times must confirm this, so that a file that was read
        long ago is not mistaken for a new one.
        """
        files = self._beside()
        ours = None
        if old and self.is_rotated(old):
            ours = rotation_number(self._path.name, old[0].name)
        since = old[1].st_mtime_ns if old else place.written or float("inf")
        later, others = list[Rotated](), list[Rotated]()
        for path, status in files:
            turn = rotation_number(self._path.name, path.name)
            if path.name.endswith(BACKUPS):
                continue
            if ours and turn and turn[0] == ours[0] and turn > ours:
                later.append((turn, path, status))
            elif turn and status.st_mtime_ns > since and not (old and path == old[0]):
                others.append((turn, path, status))
        later.sort()
        others.sort()
        if ours and not in_rotation_order(ours, since, later):
            others += [found for found in later if found[2].st_mtime_ns >= since]
            later = []
        # If the file that was read is gone, or compressed, all newer ones are unread.
        if not ours and is_whole_rotation(others):
            if place.offset and any(self._holds(place, path, now) for _, path, now in others):
                raise FileNotFoundError(f"{self._given}: has been renamed since it was looked up")
            later, others = others, []
        if others:
            self._tell_not_read(others, ", though newer than what was read")
        return self._first_readable(later)

    def is_rotated(self, found: Found) -> bool:
        """Return whether a file's name shows that it was rotated."""
        name = found[0].name
        return not name.endswith(BACKUPS) and rotation_number(self._path.name, name) is not None

    def _first_readable(self, files: list[Rotated]) -> Found | None:
        for _, path, status in files:
            if (file := self._open_beside(path)) is not None:
                os.close(file)
                return path, status
        return None

    def _tell_not_read(self, files: list[Rotated], more: str = ", in no clear order") -> None:
        names = sorted(path.name for _, path, _ in files)
        now = self._clock()
        if names != self._unclear or now - self._last > UNCLEAR:
            self._first = now
        self._unclear, self._last = names, now
        if now - self._first < UNCLEAR:
            raise FileNotFoundError(f"{self._given}: its rotated files may not all be renamed yet")
        shown = ", ".join(names[:MOST_SHOWN]) + ", ..." * (len(names) > MOST_SHOWN)
        self._tell_once(f"{self._given}: not read{more}: {shown}")

    def _beside(self) -> list[Found]:
        """Return the other files in the folder.

        A file that is renamed during a listing may be missing from it, so the folder is listed
        twice.
        """
        self._path = Path(os.path.realpath(self._given))
        first, second = list(self._listed()), list(self._listed())
        if self._rotated_in(first) != self._rotated_in(second):
            raise FileNotFoundError(f"{self._given}: its rotated files are being renamed")
        return second

    def _rotated_in(self, files: list[Found]) -> set[tuple[str, int]]:
        return {(one[0].name, one[1].st_ino) for one in files if self.is_rotated(one)}

    def _listed(self) -> Iterator[Found]:
        """Yield the other files in the folder, any of which may disappear at any moment."""
        with suppress(OSError), os.scandir(self._path.parent) as entries:
            for _, entry in zip(range(MOST_NAMES), entries, strict=False):
                with suppress(OSError):
                    if entry.name != self._path.name and entry.is_file(follow_symlinks=False):
                        yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _holds(self, place: FilePosition, path: Path, status: os.stat_result) -> bool:
        """Return whether a file contains, up to a position, the data that was read."""
        if status.st_size < place.offset or (file := self._open_beside(path)) is None:
            return False
        try:
            return last_bytes(file, place.offset) == place.tail
        finally:
            os.close(file)

    def _open_beside(self, path: Path) -> int | None:
        """Open a file other than the one being followed; return None if it cannot be read."""
        try:
            return open_file(path)
        except FileNotFoundError:
            raise  # the file was renamed: the caller searches again
        except OSError as error:
            self._tell_once(f"{path}: cannot be read: {error.strerror}; treated as missing")
            return None

    def _tell_once(self, notice: str) -> None:
        """Report a notice only once until there is a file to read, even if searches repeat it."""
        if notice not in self._told:
            self._told.add(notice)
            self._tell(notice)


def rotation_number(name: str, other: str) -> RotationNumber | None:
    """Return another file's naming scheme and numbers; later files have higher numbers.

    >>> rotation_number("x.log", "x.log.2"), rotation_number("x.log", "x-2026-11-28.log")
    (('.', (-2,)), ('-0-0-0.log', (2026, 11, 28)))
    """
    match = ROTATED.fullmatch(other, len(name)) if other.startswith(name) else None
    if match and match[2]:
        return match[1], (-int(match[2]),)
    if match and not match[3]:
        return match[0], (0,)
    stem, suffix = Path(name).stem, Path(name).suffix
    if match is None and other.startswith(stem) and other.endswith(suffix):
        match, name = DATED.fullmatch(other, len(stem), len(other) - len(suffix)), stem
    if match is None:
        return None
    date = match[0]
    numbers = tuple(map(int, re.findall(r"\d+", date)))
    return re.sub(r"\d+", "0", other.removeprefix(name)), numbers


def is_whole_rotation(found: list[Rotated]) -> bool:
    """Return whether the names and the modification times of sorted files show the same order."""
    if len({scheme for (scheme, _), _, _ in found}) != 1:
        return False
    (first, _, status), *later = found
    return in_rotation_order(first, status.st_mtime_ns, later)


def in_rotation_order(ours: RotationNumber, since: float, later: list[Rotated]) -> bool:
    """Return whether files that are sorted by name were also written in that order.

    Numbers must count down to 1 or 0 without a gap: some programs give newer files higher numbers.
    """
    scheme, (turn, *_) = ours
    turns = [number for (_, (number, *_)), _, _ in later]
    # An empty file is often older than the last line of the file before it, because the program
    # kept writing to that file for a moment.
    times = [status.st_mtime_ns for _, _, status in later if status.st_size]
    whole = len(scheme) > 1 or turns in ([*range(turn + 1, 0)], [*range(turn + 1, 1)])
    return whole and all(a <= b for a, b in pairwise([since, *times]))


def open_file(path: str | Path, flags: int = os.O_RDONLY) -> int:
    # O_NONBLOCK: opening a pipe with that name must not block.
    return os.open(path, flags | os.O_NONBLOCK)


def last_bytes(file: int, offset: int) -> int:
    """Return the CRC-32 of the bytes just before an offset in a file."""
    start = max(0, offset - TAIL)
    return zlib.crc32(os.pread(file, offset - start, start))


def end_of_zeros(file: int, offset: int, size: int) -> int:
    """Return the end of the run of zero bytes at an offset in a file of the given size."""
    while offset < size:
        try:
            offset = max(offset, os.lseek(file, offset, os.SEEK_DATA))
        except OSError as error:
            if error.errno == errno.ENXIO:  # the rest of the file is a hole
                return size
        data = os.pread(file, ZEROS, offset)
        rest = data.lstrip(b"\0")
        offset += len(data) - len(rest)
        if rest or not data:
            break
    return offset
