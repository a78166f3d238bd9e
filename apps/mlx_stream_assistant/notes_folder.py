"""A folder of notes -> what is new in them; keeps no file open between polls.

A note is read in full once it has not changed between two scans. If it has only grown since, the
new part is read; if it has changed in any other way, it is read again in full, under its own
heading. A file with several names (links) is one note. A note that was moved or renamed is
identified by its text: it begins with everything that was read from a note that is gone or has
changed.
"""

import os
import stat
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_stream.program.notices import Notify
from mlx_stream_assistant.decode import CHUNK, NotText, TextDecoder, refuse_binary
from mlx_stream_assistant.journal import Chunk
from mlx_stream_assistant.rotation import open_file

SUFFIXES = (".txt", ".md", ".markdown")
# Seconds between scans of a folder's names.
BETWEEN = 2.0
# Scans of a large folder are further apart: scanning takes at most this share of the time.
PART_OF_THE_TIME = 0.005
# The maximum number of notes read in one folder, and of levels of folders below it.
MOST_NOTES, DEEPEST = 10_000, 8
# In bytes; a longer file is not treated as a note, but can be followed with --follow.
LONGEST_NOTE = 2**20
# The maximum number of earlier versions of notes that are remembered until the next start.
MOST_BEFORE = 1_000
Seen = tuple[int, int, int]  # inode, size, modification time


@dataclass
class NotePlaces:
    """How far notes have been read.

    Attributes:
        now: for each path, according to a journal.
        before: before the latest changes, whatever the path; only since the program started.
    """

    now: dict[str, dict[str, Any]]
    before: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_BEFORE))


class NotesFolder:
    """A folder whose text and Markdown files are read.

    Args:
        places: shared by all folders, because a note may be moved from one to another.
        excluded: files not to be read under any name, such as the assistant's diary.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        path: Path,
        places: NotePlaces,
        tell: Notify,
        excluded: Collection[Path] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self.path, self.name, self._tell, self._excluded = path, str(path), tell, excluded
        self._clock, self._next_look = clock, 0.0
        self._places, self._before, self._decoder = places.now, places.before, TextDecoder(tell)
        self._inside = self.name.rstrip(os.sep) + os.sep
        self._looked: dict[str, Seen] = {}  # as they were at the last scan
        # How far notes that are gone or have changed had been read: checksums by number of bytes,
        # ascending.
        self._gone: dict[int, set[int]] = {}
        self._changed: list[str] = []
        self._complaint = ""  # about the folder
        # Refused notes: what each looked like then (None if it could not be read, which
        # may change), and why it was refused.
        self._refused: dict[str, tuple[Seen | None, str]] = {}

    @property
    def state(self) -> dict[str, Any]:
        """Counts of notes read and waiting, and any problem with the folder or a note."""
        complaints = [self._complaint, *(why for _, why in self._refused.values()), ""]
        return {
            "notes": sum(path.startswith(self._inside) for path in self._places),
            "waiting": len(self._changed),
            "complaint": next(filter(None, complaints), ""),
        }

    def poll(self) -> Chunk | None:
        """Return what is new in one note, or None; the result is the same until `ack` is called."""
        if not self._changed and self._clock() >= self._next_look:
            begun = self._clock()
            self._look()
            took = self._clock() - begun
            self._next_look = begun + max(BETWEEN, took / PART_OF_THE_TIME)
        while self._changed:
            path = self._changed[0]
            try:
                if (chunk := self._read(Path(path))) is not None:
                    return chunk
            except NotText as error:
                self._refuse(path, f"{error}; skipping it", self._looked[path])
            except FileNotFoundError:
                pass
            except OSError as error:
                why = f"{path}: cannot be read: {error.strerror}; waiting for it"
                self._refuse(path, why, None)
            self._changed.pop(0)
        return None

    def ack(self, chunk: Chunk) -> None:
        """Move on from the chunk that `poll` returned: it is now on disk."""
        if before := self._places.get(chunk.source):
            self._before.append(before)
        self._places[chunk.source] = chunk.place
        self._changed = [path for path in self._changed if path != chunk.source]
        self._refused.pop(chunk.source, None)

    def _look(self) -> None:
        """Find the notes that changed before the last scan and have not changed since."""
        try:
            found = dict(islice(self._notes(), MOST_NOTES + 1))
        except NotADirectoryError:
            return self._complain(
                "cannot be read: it is a file (use --follow); waiting for a folder"
            )
        except OSError as error:
            return self._complain(f"cannot be read: {error.strerror}; waiting for it")
        if len(found) > MOST_NOTES:
            found.popitem()
            self._complain(f"has more than {MOST_NOTES:,} notes; not all are read")
        else:
            self._complain("")
        self._changed = [
            path
            for path, seen in sorted(found.items(), key=lambda item: item[1][2])
            if self._looked.get(path) == seen and not self._is_known(path, seen)
        ]
        self._refused = {path: why for path, why in self._refused.items() if path in found}
        self._looked = found
        if self._changed:
            # A note that has changed may be a new one, and the old one may have a new name now.
            gone = [p for path, p in self._places.items() if self._seen(path, found) != p["seen"]]
            gone += self._before  # a new note may be read before the old one
            sizes = sorted({place["bytes"] for place in gone} - {0})
            self._gone = {size: set() for size in sizes}
            for place in gone:
                self._gone.get(place["bytes"], set()).add(place["crc"])

    def _seen(self, path: str, found: dict[str, Seen]) -> list[int] | None:
        """Return what a note, perhaps in another folder, looks like now; None if it is gone."""
        if path.startswith(self._inside):
            return [*found[path]] if path in found else None
        with suppress(OSError):
            return [*file_stamp(Path(path).stat())]
        return None

    def _is_known(self, path: str, seen: Seen) -> bool:
        place, refused = self._places.get(path), self._refused.get(path)
        return bool(place and tuple(place["seen"]) == seen) or bool(refused and refused[0] == seen)

    def _notes(self) -> Iterator[tuple[str, Seen]]:
        """Yield all notes in the folder; links to folders are not followed."""
        seen = set()
        for path in self._excluded:
            with suppress(OSError):
                status = path.stat()
                seen.add((status.st_dev, status.st_ino))
        for folder, below, names in os.walk(self.path, onerror=self._raise_if_top):
            depth = len(Path(folder).relative_to(self.path).parts)
            below[:] = [n for n in below if not n.startswith(".") and depth < DEEPEST]
            for name in sorted(names):
                if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                    continue
                with suppress(OSError):
                    status = (path := Path(folder, name)).stat()
                    file = status.st_dev, status.st_ino
                    if stat.S_ISREG(status.st_mode) and file not in seen:
                        seen.add(file)
                        yield str(path), file_stamp(status)

    def _raise_if_top(self, error: OSError) -> None:
        if error.filename == self.name:
            raise error

    def _read(self, path: Path) -> Chunk | None:
        """Return what is new in a note; None if it is not a file."""
        name = str(path).encode("utf-8", "backslashreplace").decode()
        if name != str(path):
            raise NotText(f"{name}: the file name is not UTF-8: rename it")
        with open(path, "rb", opener=open_file) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return None
            if status.st_size > LONGEST_NOTE:
                raise NotText(
                    f"{path}: is {status.st_size:,} bytes long, but a note may be at most "
                    f"{LONGEST_NOTE:,}: use --follow instead"
                )
            data = file.read(LONGEST_NOTE)
        at = self._read_before(name, data)
        if at == 0:
            refuse_binary(data[:CHUNK], name, whole=True)
        new, title = data[at:], str(path.relative_to(self.path))
        place = {"seen": list(file_stamp(status)), "bytes": len(data), "crc": zlib.crc32(data)}
        if not data:  # perhaps only until its text is saved again, or restored
            place = {**self._places.get(name, place), "seen": place["seen"]}
        text = self._decoder.decode(new, name, at)
        return Chunk(name, "note", title, new, text, place, apart=True)

    def _read_before(self, name: str, data: bytes) -> int:
        """Return how many bytes of a note have been read, under this name or another."""
        known, found, at, crc = self._places.get(name), 0, 0, 0
        if known and zlib.crc32(data[: known["bytes"]]) == known["crc"]:
            found = known["bytes"]
        for size, checksums in self._gone.items():
            if size > len(data):
                break
            at, crc = size, zlib.crc32(data[at:size], crc)
            if crc in checksums:
                found = max(found, size)
        return found

    def _refuse(self, path: str, why: str, seen: Seen | None) -> None:
        """Report once why a note is not read; it is retried once it no longer matches `seen`."""
        if self._refused.get(path) != (seen, why):
            self._tell(why)
        self._refused[path] = seen, why

    def _complain(self, complaint: str) -> None:
        """Report once what is wrong with the folder, or that it is readable again."""
        if complaint and complaint != self._complaint:
            self._tell(f"{self.path}: {complaint}")
        elif self._complaint and not complaint:
            self._tell(f"{self.path}: can be read again")
        self._complaint = complaint


def file_stamp(status: os.stat_result) -> Seen:
    return status.st_ino, status.st_size, status.st_mtime_ns
