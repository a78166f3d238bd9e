"""Read very large and frequently rotated files, and pipes, and check that each byte is read once.

    python -m tests.long.odd_files [--rotations 10000] [--size 1000]

Reads a sparse file and a full one of SIZE MB, 10 MB lines from a file and a pipe, and a file
that is rotated, in each of three ways. Prints a line of JSON for each; exits with 1 if a byte was
lost or read twice, or if memory grew by more than 64 MB. No model is involved. Takes minutes.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from mlx_stream_assistant.stdin import StandardInput
from mlx_stream_assistant.tail import GRACE, TailedFile
from tests.fakes.following import Clock, add, rotate
from tests.fuzz.driver import memory, reset_peak

ALLOWED = 64 << 20
LINE = 10**7
LINES = 20
KEPT = 5  # rotated files; older ones are removed
MOST_UNSEEN = 3  # rotations between two looks


class Tally:
    """Counts bytes that are not zero, and remembers their order as a digest."""

    def __init__(self) -> None:
        self.count, self.digest = 0, hashlib.sha256()

    def add(self, data: bytes) -> None:
        data = data.replace(b"\0", b"")
        self.count += len(data)
        self.digest.update(data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tally) and self.digest.digest() == other.digest.digest()


class Reader:
    """A followed file, and what was read from it."""

    def __init__(self, path: Path):
        self.clock, self.read = Clock(), Tally()
        self.source = TailedFile(path, None, lambda _: None, clock=self.clock)

    def look(self, seconds: float = 0.0) -> None:
        """Poll until no more data arrives, now and after each of the next `seconds` seconds."""
        for _ in range(1 + round(seconds)):
            while chunk := self.source.poll():
                self.read.add(chunk.data)
                self.source.ack(chunk)
            self.clock.now += 1.0


def lines(luck: random.Random, size: int) -> Iterator[bytes]:
    """Yield lines that together have at least `size` bytes."""
    number = 0
    while size > 0:
        line = b"%d %b\n" % (number, b"and the man of the house " * luck.randint(1, 40))
        yield line
        number, size = number + 1, size - len(line)


def read_sparse(folder: Path, luck: random.Random, size: int) -> tuple[Tally, Tally]:
    path, wrote = folder / "sparse.log", Tally()
    for part in range(5):
        text = b"line %d, after a hole\n" % part * luck.randint(1, 500)
        add(path, text)
        os.truncate(path, path.stat().st_size + size // 5 + luck.randint(1, 5_000))
        wrote.add(text)
    add(path, b"the end\n")
    wrote.add(b"the end\n")
    reader = Reader(path)
    reader.look(GRACE)
    return wrote, reader.read


def read_full(folder: Path, luck: random.Random, size: int) -> tuple[Tally, Tally]:
    path, wrote = folder / "full.log", Tally()
    with path.open("wb") as file:
        for line in lines(luck, size):
            file.write(line)
            wrote.add(line)
    reader = Reader(path)
    reader.look(GRACE)
    return wrote, reader.read


def long_lines(luck: random.Random) -> Iterator[bytes]:
    """Yield pieces of 10 MB lines, some with no space in them."""
    for number in range(LINES):
        unit = luck.choice((b"x", b"and the man ", "é€".encode(), b"\xff\0\xfe "))
        line = b"%d %b\n" % (number, unit * (LINE // len(unit)))
        while line:
            size = luck.choice((10, 5_000, 10**6, LINE))
            yield line[:size]
            line = line[size:]


def read_long_lines(folder: Path, luck: random.Random, size: int) -> tuple[Tally, Tally]:
    path, wrote = folder / "long.log", Tally()
    add(path, b"a first line that is text\n" * 200)
    wrote.add(path.read_bytes())
    reader = Reader(path)
    for piece in long_lines(luck):
        add(path, piece)
        wrote.add(piece)
        reader.look()
    reader.look(GRACE)
    return wrote, reader.read


def read_pipe(folder: Path, luck: random.Random, size: int) -> tuple[Tally, Tally]:
    ends, wrote, read = os.pipe(), Tally(), Tally()

    def write() -> None:
        with os.fdopen(ends[1], "wb") as file:
            for piece in chain([b"a first line that is text\n" * 200], long_lines(luck)):
                file.write(piece)
                wrote.add(piece)

    source, writer = StandardInput(lambda _: None, ends[0]), threading.Thread(target=write)
    writer.start()
    while not source.ended:
        if source.wants:
            source.read()
        while chunk := source.poll():
            read.add(chunk.data)
            source.ack(chunk)
    writer.join()
    os.close(ends[0])
    return wrote, read


def rotate_numbers(path: Path, turn: int) -> None:
    rotate(path)
    path.with_name(f"{path.name}.{KEPT + 1}").unlink(missing_ok=True)


def rotate_dates(path: Path, turn: int) -> None:
    path.rename(path.with_name(f"{path.name}-{20_000_000 + turn}"))
    path.with_name(f"{path.name}-{20_000_000 + turn - KEPT}").unlink(missing_ok=True)


def copy_and_empty(path: Path, turn: int) -> None:
    """Do what logrotate does with copytruncate."""
    path.with_name(f"{path.name}.1").write_bytes(path.read_bytes())
    os.truncate(path, 0)


def rotated(how: Callable[[Path, int], None], unseen: int) -> Callable[..., tuple[Tally, Tally]]:
    """Return a function that reads a rotated file, with this many rotations between two looks."""

    def read(folder: Path, luck: random.Random, rotations: int) -> tuple[Tally, Tally]:
        path, wrote = folder / f"{how.__name__}.log", Tally()
        add(path, b"")
        reader, looks = Reader(path), 0
        for turn in range(rotations):
            for number in range(luck.randint(1, 4)):
                line = b"%d.%d %b\n" % (turn, number, b"word " * luck.randint(0, 50))
                add(path, line)
                wrote.add(line)
            if turn >= looks:
                reader.look(GRACE * (luck.random() < 0.1))
                looks = turn + luck.randint(1, unseen)
            how(path, turn)
            add(path, b"")
        reader.look(4 * GRACE)
        return wrote, reader.read

    return read


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rotations", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=1_000, help="Megabytes of the large files.")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    size, turns = given.size * 10**6, given.rotations
    works = {
        "sparse file": (read_sparse, size),
        "full file": (read_full, size),
        "long lines": (read_long_lines, 0),
        "long lines in a pipe": (read_pipe, 0),
        "rotated by number": (rotated(rotate_numbers, MOST_UNSEEN), turns),
        "rotated by date": (rotated(rotate_dates, MOST_UNSEEN), turns),
        "copied and emptied": (rotated(copy_and_empty, 1), turns),
    }
    failed = False
    for name, (work, amount) in works.items():
        with tempfile.TemporaryDirectory() as folder:
            before, begun = reset_peak(), time.process_time()
            wrote, read = work(Path(folder), random.Random(given.seed), amount)
            grown, seconds = memory("VmHWM") - before, time.process_time() - begun
        whole = wrote == read
        failed = failed or not whole or grown > ALLOWED
        figures = {"wrote": wrote.count, "read": read.count, "read_once": whole}
        figures |= {"grown": grown, "processor_seconds": round(seconds, 1)}
        print(json.dumps({"what": name, **figures}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
