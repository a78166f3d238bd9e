"""A JSON-lines log of a long measurement, that outlives whoever writes it; knows no model.

The first line says what is measured; each further one is a result, on disk before the next
begins. A line that was cut short by a crash or a full disk is taken back; no whole line ever is.
"""

import fcntl
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.evaluate.report import Row, finite

KIND = "mlx_stream log"
VERSION = 1


class JsonLog:
    """An open log, which no other process can write meanwhile.

    Attributes:
        header: the first line, as it was written when the log was begun.
        rows: the results logged so far.

    Raises:
        ValueRefused: the file is no log, one of something else, or in use.
        TextError: it cannot be read or written.
    """

    def __init__(self, path: Path, key: Row, about: Row):
        """Open the log of what `key` says, or begin it; `about` is remembered if it is new."""
        self.path = path
        self.rows: list[Row] = []
        try:
            # A pipe must not keep us waiting before it is refused.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self.file = os.open(path, flags, 0o644)
        except OSError as error:
            raise TextError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self.file).st_mode):
                raise ValueRefused(f"{path}: is no regular file: choose another")
            self._lock()
            self.header = self._read(key, about) or self._begin(key, about)
        except BaseException:
            os.close(self.file)
            raise

    def append(self, row: Row) -> None:
        """Write a result and wait until it is on disk.

        Raises:
            TextError: it could not be written; the log ends with the line before.
        """
        self._write(finite(row))
        self.rows.append(row)

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        os.close(self.file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueRefused(f"{self.path}: another process is writing this log") from None
        except OSError:
            pass  # a file system without locks: then it is on the user

    def _read(self, key: Row, about: Row) -> Row | None:
        data = self._bytes()
        self.size = data.rfind(b"\n") + 1
        if not data:
            return None
        try:
            header, *rows = (json.loads(line) for line in data[: self.size].splitlines())
            if (header["log"], header["version"]) != (KIND, VERSION):
                raise ValueError
            found = dict(header["key"])
            if not isinstance(header["about"], dict):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueRefused(
                f"{self.path}: exists and is not a whole log of this program: choose another file"
            ) from None
        for name in key.keys() | found.keys():
            if key.get(name) != found.get(name):
                was, wanted = (
                    progress_line(name, found, header["about"]),
                    progress_line(name, key, about),
                )
                if was == wanted:  # of the same name, and not the same
                    was, wanted = one_line_of(found.get(name)), one_line_of(key.get(name))
                raise ValueRefused(
                    f"{self.path}: is a log of another {name} ({was}, not {wanted}): choose "
                    "another file for --log"
                )
        if not all(isinstance(row, dict) for row in rows):
            raise ValueRefused(f"{self.path}: a line is not an object: choose another file")
        if self.size < len(data):
            os.ftruncate(self.file, self.size)
        self.rows = rows
        return header

    def _bytes(self) -> bytes:
        try:
            parts = []
            while part := os.read(self.file, 1 << 20):
                parts.append(part)
        except OSError as error:
            raise TextError(f"{self.path}: cannot be read: {error.strerror}") from error
        return b"".join(parts)

    def _begin(self, key: Row, about: Row) -> Row:
        header = {"log": KIND, "version": VERSION, "key": key, "about": about}
        self._write(header)
        return header

    def _write(self, line: Any) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self.file, data[written:], self.size + written)
            os.fsync(self.file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.file, self.size)
            raise TextError(
                f"{self.path}: cannot be written: {error.strerror or error}; what was logged is "
                "kept: the same command goes on from there"
            ) from error
        self.size += len(data)


def progress_line(name: str, key: Row, about: Row) -> str:
    """Return a part of a key as people know it: a text and a model by their names."""
    match name:
        case "text" if isinstance(texts := about.get("texts"), list):
            return ", ".join(map(one_line_of, texts[:4]))
        case "model" if "model" in about:
            return f"{one_line_of(about['model'])} {one_line_of(about.get('dtype'))}"
    return one_line_of(key.get(name))


def one_line_of(value: Any) -> str:
    """Return a value of a file nobody vouches for, short and without control characters."""
    text = str(value) if isinstance(value, int) else ascii(value).strip("'")
    return text if len(text) <= 40 else f"{text[:40]}..."
