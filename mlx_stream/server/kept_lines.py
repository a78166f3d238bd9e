"""Conversations kept in a folder, to be found again by their digests; independent of requests.

    key                            the key for the digests
    lock                           held by the server that uses the folder
    0123456789abcdef.safetensors   a conversation: its stream, its attended turns and its record

The files are untrusted when read. One that cannot be used is reported once and not used.
"""

import os
import re
import secrets
import shutil
import stat
import threading
import time
from array import array
from base64 import b64decode, b64encode
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_stream.chat.conversation_snapshot import (
    read_note,
    restore_conversation,
    save_conversation,
)
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.snapshot_metadata import of_type
from mlx_stream.errors import SnapshotError, ValueRefused, one_line
from mlx_stream.program.lock import Lock
from mlx_stream.server.conversation import DIGEST_BYTES, TURN_BYTES
from mlx_stream.server.line_record import Record

DEFAULT_GIB = 8
MOST_LINES = 1_000
NAME = re.compile(r"[0-9a-f]{16}", re.ASCII)
SUFFIX = ".safetensors"
BUSY = "the folder of --keep is used by another server, {holder}: use another folder"


@dataclass(frozen=True)
class KeptLine:
    """A conversation in a file.

    Attributes:
        head: the digest of its head.
        record: the turns that it has read.
        window: the size of its stream's window, in tokens.
        began: when its stream was opened; its template may mention the date.
        used: when it was last written, in seconds since the epoch.
        usable: False if the file was found to be damaged or to belong to another model.
    """

    name: str
    head: bytes
    record: Record
    window: int
    began: datetime
    used: float = 0.0
    nbytes: int = 0
    usable: bool = True

    def note(self) -> dict[str, Any]:
        """Return it as plain JSON values; a turn takes less than 100 bytes."""
        return {
            "head": self.head.hex(),
            "digests": b64encode(self.record.digests).decode(),
            "sizes": b64encode(self.record.sizes.tobytes()).decode(),
            "attended": self.record.attended,
            "window": self.window,
            "began": self.began.isoformat(),
        }


def kept_line(name: str, note: Mapping[str, Any]) -> KeptLine:
    """Return the conversation that `KeptLine.note` describes.

    Raises:
        KeyError, TypeError, ValueError: the note is not valid.
    """
    sizes = array("I")
    sizes.frombytes(b64decode(of_type(str, note["sizes"]), validate=True))
    digests = b64decode(of_type(str, note["digests"]), validate=True)
    record = Record(digests, sizes, of_type(int, note["attended"]))
    head, window = bytes.fromhex(note["head"]), of_type(int, note["window"])
    began = datetime.fromisoformat(note["began"])
    consistent = len(digests) == TURN_BYTES * len(sizes) and 0 <= record.attended <= len(sizes)
    if not (sizes and consistent and len(head) == DIGEST_BYTES and window > 0):
        raise ValueError("its record is not consistent")
    return KeptLine(name, head, record, window, began)


class KeptLines:
    """The conversations in a folder. Any thread may call the methods.

    Args:
        folder: created if it does not exist; only this user may have access.
        limit: how many bytes the conversations may take up; there are also at most `MOST_LINES`.
            The least recently used ones are removed, starting with those that have only one turn.
        notify: called with a line for the user, perhaps on the engine's thread.

    Attributes:
        key: the key of the digests.

    Raises:
        ValueRefused: the folder, or the key in it, cannot be used.
        SessionError: another server is using the folder.
    """

    def __init__(self, folder: Path, limit: int, notify: Callable[[str], None]):
        self.folder, self._limit, self._notify = folder.absolute(), limit, notify
        make_private(self.folder)
        self._file = Lock.acquire(self.folder / "lock", BUSY)
        try:
            self.key = read_key(self.folder / "key")
            self._lines: dict[str, KeptLine] = {}
            self._removed: set[str] = set()
            self._lock, self._reported = threading.Lock(), False
            self._find_all()
        except BaseException:
            self._file.close()
            raise

    def usable(self) -> list[KeptLine]:
        with self._lock:
            return [line for line in self._lines.values() if line.usable]

    def new_name(self) -> str:
        return secrets.token_hex(8)

    def save(self, line: KeptLine, chat: ChatSession) -> Generator[None, None, None]:
        """Write a conversation, or leave the old file; a generator that never raises."""
        if chat.tokens.failed:
            return
        path = self._path(line.name)
        try:
            yield from save_conversation(path, chat, line.note())
            size = path.stat().st_size
        except (SnapshotError, OSError) as error:
            return self._report_failure(one_line(error))
        with self._lock:
            self._lines[line.name] = replace(line, used=time.time(), nbytes=size)
            if line.name in self._removed or size > self._limit:
                self._remove(line.name)
            self._make_room(line.name)
        if size > self._limit:
            return self._report_failure(f"it takes {size:,} bytes: see --keep-size")
        self._reported = False

    def restore(self, line: KeptLine, chat: ChatSession) -> None:
        """Continue a conversation in a new session.

        Raises:
            SnapshotError: it cannot be used.
        """
        restore_conversation(self._path(line.name), chat, line.note())

    def refuse(self, line: KeptLine, reason: Exception) -> None:
        """Report a conversation that could not be restored; it is not offered again."""
        with self._lock:
            if self._lines.get(line.name) is not line:  # it has been written again, or removed
                return
            self._lines[line.name] = replace(line, usable=False)
        self._notify(f"a kept conversation cannot be used, so its turns are read again: {reason}")

    def remove(self, name: str) -> None:
        """Remove a conversation, even if it is being written."""
        with self._lock:
            self._removed.add(name)
            self._remove(name)

    def close(self) -> None:
        """Let another server use the folder."""
        self._file.close()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _find_all(self) -> None:
        """Find the conversations of an earlier server, and what it was writing when it died."""
        for partial in self.folder.glob(f".*{SUFFIX}.*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        for path in self.folder.glob(f"*{SUFFIX}"):
            if not NAME.fullmatch(name := path.name.removesuffix(SUFFIX)):
                continue
            try:
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError("not a regular file")
                line = kept_line(name, read_note(path))
            except (
                SnapshotError,
                OSError,
                KeyError,
                TypeError,
                ValueError,
                OverflowError,
            ) as error:
                self._notify(f"{path}: not a kept conversation: {one_line(error)}")
                continue
            self._lines[name] = replace(line, used=status.st_mtime, nbytes=status.st_size)
        self._make_room()

    def _make_room(self, besides: str = "") -> None:
        """Remove conversations until the rest do not exceed the limits; called under the lock."""
        total = sum(line.nbytes for line in self._lines.values())
        for line in sorted(self._lines.values(), key=lambda x: (len(x.record) > 1, x.used)):
            if total <= self._limit and len(self._lines) <= MOST_LINES:
                return
            if line.name != besides:
                self._remove(line.name)
                total -= line.nbytes

    def _remove(self, name: str) -> None:
        self._lines.pop(name, None)
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            self._notify(f"{self._path(name)}: cannot be removed: {error.strerror}")

    def _report_failure(self, reason: str) -> None:
        """Report why a conversation is not kept, but only once until one is kept again."""
        if not self._reported:
            self._notify(f"a conversation could not be kept: {reason}")
        self._reported = True


def make_private(folder: Path) -> None:
    """Create a folder that only this user can access, if it does not exist.

    Raises:
        ValueRefused: it cannot be created, or others can access it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        reason = "not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise ValueRefused(f"{folder}: {reason}: use another --keep") from error
    if status.st_uid != os.geteuid():
        raise ValueRefused(f"{folder}: it belongs to another user: use another --keep")
    if status.st_mode & 0o077:
        raise ValueRefused(f"{folder}: other users can access it: run chmod 700 {folder}")


def read_key(path: Path) -> bytes:
    """Return the key in a file; create the file with a new key if it does not exist.

    Raises:
        ValueRefused: the file has no key, other users can read it, or it cannot be created.
    """
    try:
        if not os.path.lexists(path):
            write_key(path)
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(file, "rb") as opened:
            mode, key = os.fstat(file).st_mode, opened.read(DIGEST_BYTES + 1)
    except OSError as error:
        raise ValueRefused(f"{path}: cannot be used: {error.strerror}") from error
    if not stat.S_ISREG(mode) or mode & 0o077 or len(key) != DIGEST_BYTES:
        raise ValueRefused(
            f"{path}: not a private file with a key: remove it (conversations kept there will no "
            "longer be recognized), or use another --keep"
        )
    return key


def write_key(path: Path) -> None:
    partial = path.with_name(".key.partial")
    partial.unlink(missing_ok=True)
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as opened:
        opened.write(os.urandom(DIGEST_BYTES))
        opened.flush()
        os.fsync(file)
    partial.replace(path)
