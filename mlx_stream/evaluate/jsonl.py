"""A JSON-lines log of a long measurement, that survives a crash of its writer; knows no model.

The first line says what is measured; each further one is a result, on disk before the next
begins. A last line cut short, by a crash or a full disk, is removed when the log is opened.
"""

import fcntl
import json
import os
from pathlib import Path

from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.evaluate.report import Row, finite

KIND = "mlx_stream log"
VERSION = 1


class JsonLog:
    """An open log, which no other process can write meanwhile.

    Attributes:
        header: the first line, as it was written when the log was begun.
        rows: the results logged so far.
    """

    def __init__(self, path: Path, key: Row, about: Row):
        """Open the log of what `key` says, or begin it; `about` is remembered if it is new.

        Raises:
            ValueRefused: the file is not a log, is one of something else, or in use.
            TextError: it cannot be read or written.
        """
        self.path = path
        try:
            self.file = path.open("a+b", buffering=0)
        except OSError as error:
            raise TextError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            self.header, self.rows = self._read(key) or self._begin(key, about)
        except BaseException:
            self.file.close()
            raise

    def _read(self, key: Row) -> tuple[Row, list[Row]] | None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueRefused(f"{self.path}: another process is writing this log") from None
        self.file.seek(0)
        data = self.file.read()
        if not data:
            return None
        whole = data.rfind(b"\n") + 1
        try:
            header, *rows = map(json.loads, data[:whole].splitlines())
            if (header["log"], header["version"]) != (KIND, VERSION):
                raise ValueError
            found = dict(header["key"])
        except (ValueError, KeyError, TypeError):
            raise ValueRefused(
                f"{self.path}: exists and is not a log of this program: choose another file"
            ) from None
        for name, wanted in key.items():
            if found.get(name) != wanted:
                numbers = f" ({found.get(name)}, not {wanted})" if isinstance(wanted, int) else ""
                raise ValueRefused(
                    f"{self.path}: is a log of another {name}{numbers}: choose another file for "
                    "--log"
                )
        self.file.truncate(whole)
        return header, rows

    def _begin(self, key: Row, about: Row) -> tuple[Row, list[Row]]:
        header = {"log": KIND, "version": VERSION, "key": key, "about": about}
        self._write(header)
        return header, []

    def append(self, row: Row) -> None:
        """Write a result and wait until it is on disk.

        Raises:
            TextError: it could not be written.
        """
        self._write(finite(row))
        self.rows.append(row)

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _write(self, line: Row) -> None:
        data, size = json.dumps(line).encode() + b"\n", os.fstat(self.file.fileno()).st_size
        try:
            while data:
                data = data[self.file.write(data) :]
            os.fsync(self.file)
        except OSError as error:
            self.file.truncate(size)  # whole lines only
            raise TextError(
                f"{self.path}: cannot be written: {error.strerror}; what was logged before is "
                "kept: the same command continues from there"
            ) from error
