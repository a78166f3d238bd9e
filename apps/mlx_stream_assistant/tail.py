"""Reads what is added to a growing file, each byte once; independent of the journal and streams.

A position consists of the file's device and inode (not its name), the number of bytes read, and a
checksum of the last of those bytes. So a file that was renamed to make room for a new one is read
to its end first, whatever its new name is. A file with a different inode but the same bytes counts
as the same file: an editor saved it, or a disk was remounted. A file that was truncated or
rewritten is read from its beginning, after the rest of its old text if there is a copy next to it.
Files that were created and renamed between polls are read in between, oldest first, as are
those that existed before the first poll:

    x.log.3  x.log.2  x.log.1  x.log      x.log.3 was read up to byte 5,000: it is read to its end,
       A        B        C       D        then B, C and D from their beginnings
"""

import os
import stat
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_stream.program.notices import Notify
from mlx_stream_assistant.decode import (
    CHUNK,
    NotText,
    TextDecoder,
    line_end,
    refuse_binary,
    whole_characters,
)
from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.journal import Chunk
from mlx_stream_assistant.rotation import (
    TAIL,
    FilePosition,
    FileSearch,
    Found,
    end_of_zeros,
    last_bytes,
    open_file,
)

# Seconds without growth after which an incomplete line is read anyway.
SETTLED = 0.5
# Seconds without growth before moving on from a renamed file to the new one: its writer may not
# have noticed the renaming yet.
GRACE = 3.0


class TailedFile:
    """A file that other programs append to.

    Args:
        place: how far the file has been read, according to the journal.
        from_end: without a `place`, start after the complete lines that the file already has.
        clock: returns the time in seconds.
        excluded: a file that must not be read under any name: the assistant's notes.
    """

    def __init__(
        self,
        path: Path,
        place: dict[str, Any] | None,
        tell: Notify,
        from_end: bool = False,
        clock: Callable[[], float] = time.monotonic,
        excluded: Path | None = None,
    ):
        self.path, self.name, self._tell, self._clock = path, str(path), tell, clock
        self._decoder, self._excluded = TextDecoder(tell), excluded
        self._place, self._from_end = position_of(place), from_end and place is None
        self._with_older = not from_end  # files that were rotated before the first poll
        self._file: int | None = None
        self._size = 0  # at the last poll
        self._mtime: int | None = None  # likewise, in nanoseconds
        self._grown = 0.0  # when its size last changed
        self._left: float | None = None  # when the file was renamed
        self._emptied = False  # the file was empty, so it may be copied and truncated unseen
        self._complaint = ""
        self._blank: tuple[int, int] | None = None  # size and mtime when no text was found
        self._finished: FilePosition | None = None  # a renamed file with no text left: not reopened
        self._search = FileSearch(path, tell, clock)

    @property
    def state(self) -> dict[str, Any]:
        """How far it has been read, its size, and any problem with it."""
        offset = self._place.offset if self._place else 0
        size = max(self._size, offset)
        return {"offset": offset, "size": size, "complaint": self._complaint}

    def poll(self) -> Chunk | None:
        """Return the next chunk, or None. The same chunk is returned until `ack` is called."""
        try:
            for _ in range(2):  # after the end of a renamed file, read the next one
                if self._file is None and not self._open():
                    return None
                if self._from_end and self._place and not self._place.offset:
                    return self._skip()
                if chunk := self._read() or self._finish_renamed():
                    return chunk
        except NotText as error:
            self._complain(f"{error}; not read until another file replaces it")
        except FileNotFoundError:  # renamed between checks: look again
            self.close()
        except OSError as error:
            self._complain(f"{self.path}: cannot be read: {error.strerror}; waiting for it")
            self.close()
        return None

    def ack(self, chunk: Chunk) -> None:
        """Move on to the next chunk: the one that `poll` returned is now on disk."""
        self._place, self._from_end = position_of(chunk.place), False

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = self._blank = None

    # --- which file ---

    def _open(self) -> bool:
        """Open the file to read from; return whether there is one."""
        found = self._find()
        if found is None:
            return False
        (path, expected), place = found
        self._file = open_file(path)
        status = os.fstat(self._file)
        if not os.path.samestat(status, expected):  # it was renamed in the meantime: look again
            self.close()
            return False
        if why := self._not_followed(status):
            self._complain(f"{self.path}: {why}; waiting for another file")
            self.close()
            return False
        self._complain("")
        if place is None:
            if self._place is not None:
                first = "" if path == self.path else f" {path.name} first,"
                self._tell(f"{self.path}: was replaced: reading{first} from the beginning")
            now, before = status.st_mtime_ns, self._place.written if self._place else 0
            # The previous file may have been written to, or only trimmed, after this one.
            latest = max(now, before, self._mtime or 0)
            place = FilePosition(status.st_dev, status.st_ino, written=latest, begun=now)
            self._emptied = status.st_size == 0
        self._place = place
        self._size, self._grown, self._left = self._place.offset, self._clock(), None
        self._mtime = None
        self._search.forget_notices()
        return True

    def _not_followed(self, status: os.stat_result) -> str:
        """Return why a file is not read, or ""."""
        if stat.S_ISDIR(status.st_mode):
            return "is a folder, not a file: use --folder instead"
        if not stat.S_ISREG(status.st_mode):
            return "is not a file"
        with suppress(OSError):
            if self._excluded and os.path.samestat(status, self._excluded.stat()):
                return "is the file that notes are written to"
        return ""

    def _named(self) -> os.stat_result | None:
        """Return the status of the file that currently has the name, if any."""
        try:
            return self.path.stat()
        except FileNotFoundError:
            return None

    def _find(self) -> tuple[Found, FilePosition | None] | None:
        """Return the file to read and the position to continue from; None means the beginning.

        This is the file that was being read, if it has more text, or else the next file.
        """
        status, place = self._named(), self._place
        if place is not None and not (status and place.is_of(status)):
            old = self._search.find_renamed(place)
            kept = status and status.st_ino == place.inode  # rotated files may be copies of it
            renamed = old and self._search.is_rotated(old) and not kept
            regular = status and stat.S_ISREG(status.st_mode)
            if status and regular and not renamed and self._continues(place):
                return (self.path, status), place.moved_to(status)
            if old and (found := place.moved_to(old[1])) != self._finished:
                return old, found
            if next_one := self._search.find_between(place, old):
                return next_one, None
            place = None
        elif place is None and self._with_older and (oldest := self._search.find_oldest()):
            return oldest, None
        if status is None:
            self._from_end = False  # a file that appears later is entirely new
            self._complain(f"{self.path}: does not exist; waiting for it")
            return None
        return (self.path, status), place

    def _continues(self, place: FilePosition) -> bool:
        """Return whether the file that now has the name starts with the text already read."""
        file = open_file(self.path)
        try:
            size = os.fstat(file).st_size
            return size >= place.offset > 0 and last_bytes(file, place.offset) == place.tail
        finally:
            os.close(file)

    def _finish_renamed(self) -> Chunk | None:
        """Stop following a file that was renamed; return the rest of its text."""
        if self._file is None:  # the file was truncated, and there is a copy to open
            return None
        assert self._place is not None
        status = self._named()
        if status and self._place.is_of(status):
            self._left = None
            return None
        if self._left is None:
            self._left = self._clock()
        since = max(self._grown, self._left)
        if self._clock() - since < GRACE and not self._was_followed_by_another():
            return None
        if self._blank is None:
            before, rest = self._around(self._place.offset)
            if rest := rest.rstrip(b"\0"):  # the first bytes of a character, never completed
                return self._chunk(before, rest)
        self._finished = self._place
        self.close()
        if status is None:
            self._complain(f"{self.path}: does not exist; waiting for it")
        return None

    def _was_followed_by_another(self) -> bool:
        """Return whether a later file was renamed too, meaning that this one is finished."""
        assert self._place is not None
        with suppress(FileNotFoundError):
            old = self._search.find_renamed(self._place)
            if old and self._search.is_rotated(old):  # not if an editor is saving the file
                return self._search.find_between(self._place, old) is not None
        return False

    # --- what is new ---

    def _read(self) -> Chunk | None:
        assert self._file is not None and self._place is not None
        status, offset = os.fstat(self._file), self._place.offset
        size, written = status.st_size, status.st_mtime_ns
        unchanged = written == self._mtime and size == self._size
        if unchanged and (size == offset or self._blank == (size, written)):
            return None
        before, data = self._around(offset)
        if size < offset or zlib.crc32(before) != self._place.tail:
            self._begin_again("was truncated" if size < offset else "was rewritten")
            return None
        again = self._emptied and not offset and written > self._place.written
        if again and (copy := self._search.find_between(self._place, None)):
            ours = self._place, self._finished  # not copies: renamed files
            if not any(place and place.is_of(copy[1]) for place in ours):
                self._read_rotated(copy, self._place, "was truncated")
                return None
        self._mtime = written
        if size != self._size:
            self._size, self._grown = size, self._clock()
        if size == offset or self._blank == (size, written):
            return None
        self._blank = size, written  # reset if there is text
        return self._take(before, data, size)

    def _around(self, offset: int) -> tuple[bytes, bytes]:
        """Return the bytes before an offset of the open file, and a chunk from there.

        Both come from one read: between two reads, the file may be truncated and written again.
        """
        assert self._file is not None
        before = min(offset, TAIL)
        data = os.pread(self._file, before + CHUNK, offset - before)
        return data[:before], data[before:]

    def _take(self, before: bytes, data: bytes, size: int) -> Chunk | None:
        """Return the next chunk of the open file; an empty one skips zero bytes."""
        assert self._file is not None and self._place is not None
        offset, more = self._place.offset, len(data) == CHUNK
        if offset == 0:
            refuse_binary(data, self.name, whole=more)
        if data.startswith(b"\0"):
            end = end_of_zeros(self._file, offset, size)
            if end >= size:  # perhaps space reserved for later text
                return None
            self._decoder.tell_once(self.name, offset)
            self._blank = None
            return self._chunk(before + bytes(min(end - offset, TAIL)), b"", end)
        self._complain("")
        self._blank = None
        if data.endswith(b"\0"):
            data = data.rstrip(b"\0")
            whole = whole_characters(data)
            if whole < len(data):  # in space reserved for later text, the rest is yet to be written
                at = offset + len(data)
                if end_of_zeros(self._file, at, size) in (at, size):
                    data = data[:whole]
        else:
            data = data[: line_end(data, more, self._clock() - self._grown < SETTLED)]
        return self._chunk(before, data) if data else None

    def _begin_again(self, why: str) -> None:
        """Go back to the beginning, or to unread old text in a rotated file."""
        assert self._place is not None and self._file is not None
        copy, self._blank = self._search.find_copy(self._place), None
        if copy and copy[1].st_size > self._place.offset:
            return self._read_rotated(copy, self._place, why)
        begun = os.fstat(self._file).st_mtime_ns
        latest = max(begun, self._place.written)
        start = replace(self._place, offset=0, tail=0, written=latest, begun=begun)
        if next_one := self._search.find_between(self._place, copy):
            return self._read_rotated(next_one, start, why)
        self._complain("")
        self._search.forget_notices()
        self._place, self._emptied = start, True
        self._tell(f"{self.path}: {why}: reading from the beginning")

    def _read_rotated(self, found: Found, place: FilePosition, why: str) -> None:
        path, status = found
        self._tell(f"{self.path}: {why}: the rest of its old text is read from {path.name} first")
        self._place, self._emptied = place.moved_to(status), False
        self.close()

    def _skip(self) -> Chunk:
        """Return an empty chunk, so that the position after the complete lines is stored."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        end = os.pread(self._file, CHUNK, max(0, size - CHUNK))
        self._tell(f"{self.path}: reading from the end")
        offset = size - len(end) + (end.rfind(b"\n") + 1 or whole_characters(end))
        return self._chunk(self._around(offset)[0], b"", offset)

    def _chunk(self, before: bytes, data: bytes, offset: int | None = None) -> Chunk:
        """Return a chunk of data read at an offset (default: the current one), after `before`."""
        assert self._place is not None
        offset = self._place.offset if offset is None else offset
        end, tail = offset + len(data), zlib.crc32((before + data)[-TAIL:])
        # The modification time before the data was read: the file may have been copied since.
        written = self._place.written if self._mtime is None else self._mtime
        after = replace(self._place, offset=end, tail=tail, written=written)
        text = self._decoder.decode(data, self.name, offset)
        return Chunk(self.name, "file", self.path.name, data, text, vars(after))

    def _complain(self, complaint: str) -> None:
        """Report a problem once, or that it has been resolved."""
        if complaint and complaint != self._complaint:
            self._tell(complaint)
        elif self._complaint and not complaint:
            self._tell(f"{self.path}: can be read again")
        self._complaint = complaint


def place_by_inode(path: Path, places: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the place of a file that was followed under another name."""
    with suppress(OSError):
        file = open_file(path)
        try:
            for place in places:
                position = position_of(place)
                same = position and position.is_of(os.fstat(file))
                if position and same and last_bytes(file, position.offset) == position.tail:
                    return place
        finally:
            os.close(file)
    return None


def position_of(values: dict[str, Any] | None) -> FilePosition | None:
    try:
        return FilePosition(**values) if values else None
    except TypeError as error:
        raise AssistantError(f"the journal is damaged: {values!r:.80} is not a position") from error
