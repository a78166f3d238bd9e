"""A followed file as a test reads it, and what happens to it."""

import os
from pathlib import Path

from mlx_stream_assistant.tail import GRACE, TailedFile


class Clock:
    """A clock that advances only when a test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Reading:
    """A followed file, what was read from it, and its notices; it can restart as if killed."""

    def __init__(self, path: Path, from_end: bool = False, excluded: Path | None = None):
        self.path, self.clock = path, Clock()
        self.from_end, self.excluded = from_end, excluded
        self.place: dict | None = None
        self.taken, self.told = b"", []
        self.begin()

    def begin(self) -> None:
        self.source = TailedFile(
            self.path, self.place, self.told.append, self.from_end, self.clock, self.excluded
        )

    def restart(self) -> None:
        self.source.close()
        self.begin()

    def poll(self) -> bytes:
        """Poll until no more data arrives, without advancing the clock; return the data."""
        found = b""
        while arrival := self.source.poll():
            found += arrival.data
            self.source.ack(arrival)
            self.place = arrival.place
        self.taken += found
        return found

    def wait(self, seconds: float = GRACE + 1) -> bytes:
        """Poll every second for a while; return the data that arrived."""
        found = self.poll()
        for _ in range(round(seconds)):
            self.clock.now += 1.0
            found += self.poll()
        return found


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def rotate(path: Path) -> None:
    """Rename x.log.2 to x.log.3, x.log.1 to x.log.2 and x.log to x.log.1."""
    numbers = [int(old.suffix[1:]) for old in path.parent.glob(f"{path.name}.*")]
    for number in sorted(numbers, reverse=True):
        old = path.with_name(f"{path.name}.{number}")
        old.rename(path.with_name(f"{path.name}.{number + 1}"))
    path.rename(path.with_name(f"{path.name}.1"))


def write(path: Path, data: bytes, second: int) -> None:
    """Append to a file, and set its modification time."""
    add(path, data)
    os.utime(path, (second, second))
