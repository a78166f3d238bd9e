"""A crash-safe JSON Lines log of a long measurement; independent of models.

The first line says what is measured; every other line is a result, written to disk before the next
measurement starts. If a crash or a full disk cut the last line short, it is removed when the log is
opened.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.evaluate.report import Row, finite

KIND = {"log": "mlx_stream log", "version": 1}
KIND_BEGINS = json.dumps(KIND).encode()[:-1]


@dataclass
class JsonLog:
    """An open log: its first line, written when the log was created, and the results."""

    path: Path
    file: Any
    header: Row
    rows: list[Row]

    def append(self, row: Row) -> None:
        """Write a result and wait until it is on disk; raise TextError if that fails."""
        self.write(finite(row))
        self.rows.append(row)

    def write(self, line: Row) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            while data:
                data = data[self.file.write(data) :]
            os.fsync(self.file)
        except OSError as error:
            raise TextError(
                f"{self.path}: cannot be written: {error.strerror}; earlier lines are "
                "kept: rerun the command to continue"
            ) from error


@contextmanager
def open_log(path: Path, key: Row, about: Row) -> Iterator[JsonLog]:
    """Open the log of the measurement `key`, or create it; a new log also stores `about`.

    No other process can write to the log while it is open. Raises ValueRefused if the file is not a
    log, is the log of another measurement, or is in use, and TextError if it cannot be read or
    written.
    """
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise TextError(f"{path}: cannot be opened: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueRefused(f"{path}: another process is writing to this log") from None
        file.seek(0)
        data = file.read()
        if whole := data[: data.rfind(b"\n") + 1]:
            log = JsonLog(path, file, *read_lines(path, key, whole))
            file.truncate(len(whole))
        elif data and not KIND_BEGINS.startswith(data[: len(KIND_BEGINS)]):
            raise not_a_log(path)
        else:
            file.truncate(0)  # the first line was cut short
            log = JsonLog(path, file, KIND | {"key": key, "about": about}, [])
            log.write(log.header)
        yield log


def not_a_log(path: Path) -> ValueRefused:
    return ValueRefused(f"{path}: exists and is not a log of this program: choose another file")


def read_lines(path: Path, key: Row, data: bytes) -> tuple[Row, list[Row]]:
    try:
        header, *rows = map(json.loads, data.splitlines())
        if {name: header[name] for name in KIND} != KIND:
            raise ValueError
        found = header["key"]
    except (ValueError, KeyError, TypeError):
        raise not_a_log(path) from None
    for name, wanted in key.items():
        if found.get(name) != wanted:
            numbers = f" ({found.get(name)}, not {wanted})" if isinstance(wanted, int) else ""
            raise ValueRefused(
                f"{path}: is the log of a run with different settings: {name}{numbers}; "
                "choose another file"
            )
    return header, rows
