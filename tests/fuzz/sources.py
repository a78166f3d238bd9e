"""Odd files, notes and pipes: what is readable is read once, in order; the diary never is.

    python -m tests.fuzz.sources --count 1000 --seed 1

A followed file is written in several encodings, rotated, emptied under its writer, saved by an
editor and moved to another disk, while its reader is killed. No model is involved.
"""

import os
import shutil
import tempfile
import unicodedata
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from mlx_stream_assistant.notes_folder import BETWEEN, NotePlaces, NotesFolder
from mlx_stream_assistant.stdin import StandardInput
from mlx_stream_assistant.tail import GRACE
from tests.fakes.following import Reading, add, rotate
from tests.fuzz import driver

SECONDS = 30.0
GROWTH = 160 << 20  # the generator holds several copies of a 10 MB line
STEPS = 60
ROOMS = (1, 5_000, 2**20)
ODD = (
    "Gerät über 40 °C".encode("latin-1"),
    "“quoted” €".encode("cp1252"),
    "ログです".encode("shift-jis"),
    "Ошибка".encode("cp1251"),
    b"\x16\x03\x01\0\xfc\x03",
    b"\0" * 40,
    b"\xe2\x82",
    b"\xed\xa0\x80",
    b"\x1b[31mred\x1b[0m",
    "é€𝄞".encode(),
)


class Broken(AssertionError):
    """Something was lost, read twice, or read although it should not have been."""


def line(luck: Random, number: int, long: bool) -> bytes:
    """Return a line that is unlike any other."""
    odd = luck.choice(ODD) if luck.random() < 0.15 else b""
    if long and luck.random() < 0.03:
        odd = luck.choice(ODD) * luck.choice((300, 3_000, 100_000))
    words = b"and the man of the house " * luck.randint(1, 4)
    end = luck.choice((b"\n", b"\n", b"\r\n"))
    return b"%d %b%b" % (number, words, odd) + end


def check(taken: bytes, written: bytes) -> None:
    """Check that everything was read, except NUL bytes, which are not text."""
    found, wanted = taken.replace(b"\0", b""), written.replace(b"\0", b"")
    if found != wanted:
        at = next((n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), -1)
        raise Broken(
            f"{len(found)} of {len(wanted)} bytes, other from {at} on: {found[at:][:60]!r}"
        )


class FollowedFile:
    """A file, its writer and its reader."""

    def __init__(self, luck: Random, folder: Path):
        self.luck, self.path, self.done = luck, folder / "x.log", list[str]()
        self.written, self.number = b"", 0
        self.keeps_place = luck.random() < 0.4  # it does not notice that its file was emptied
        for _ in range(luck.choice((0, 0, 1, 3))):
            self.add()
            rotate(self.path)
        self.add()
        self.reading = Reading(self.path)
        self.reading.wait(40)

    def add(self) -> None:
        for _ in range(self.luck.randint(1, 6)):
            head = self.path.read_bytes()[:4_096] if self.path.exists() else b""
            # A file with an odd beginning is refused.
            self.write(line(self.luck, self.number, len(head) == 4_096 and b"\0" not in head))
            self.number += 1

    def write(self, data: bytes) -> None:
        at = self.writer_at if self.keeps_place and hasattr(self, "writer_at") else None
        if at is None:
            add(self.path, data)
        else:
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.seek(at)
                file.write(data)
        self.writer_at = self.path.stat().st_size if at is None else at + len(data)
        self.written += data

    def half(self) -> None:
        whole = line(self.luck, self.number, False)
        self.write(whole[: self.luck.randint(1, 20)])  # cut between characters: it may stay cut
        self.number += 1

    def opens_anew(self) -> None:
        if hasattr(self, "writer_at"):
            del self.writer_at

    def rename(self) -> None:
        rotate(self.path)
        if self.luck.random() < 0.3:  # its writer has not noticed yet
            late = line(self.luck, self.number, False)
            add(self.path.with_name("x.log.1"), late)
            self.written, self.number = self.written + late, self.number + 1
        self.opens_anew()
        if self.luck.random() < 0.8:
            self.add()

    def empty(self) -> None:
        """Empty the file under its writer, after copying it."""
        for number in range(30, 0, -1):
            old = self.path.with_name(f"x.log.{number}")
            if old.exists():
                old.rename(self.path.with_name(f"x.log.{number + 1}"))
        shutil.copyfile(self.path, self.path.with_name("x.log.1"))
        os.truncate(self.path, 0)
        self.add()

    def empty_without_copy(self) -> None:
        os.truncate(self.path, 0)
        self.add()

    def save(self) -> None:
        """Save it as editors do: as a new file with the same text, and more."""
        new = self.path.with_name("new")
        shutil.copyfile(self.path, new)
        if self.luck.random() < 0.5:
            self.path.rename(self.path.with_name("x.log~"))
        elif self.luck.random() < 0.3:
            os.link(self.path, self.path.with_name(f"link{self.number}"))
        new.replace(self.path)
        self.opens_anew()
        self.add()

    def make_room(self) -> None:
        """Extend it with zeros; later text follows or overwrites them."""
        os.truncate(self.path, self.path.stat().st_size + self.luck.choice(ROOMS))

    def restart(self) -> None:
        if self.reading.place and self.luck.random() < 0.5:
            self.reading.place = {**self.reading.place, "device": self.luck.randint(1, 99)}
        self.reading.restart()

    def poll(self) -> None:
        if (chunk := self.reading.source.poll()) and self.luck.random() < 0.8:
            self.reading.source.ack(chunk)
            self.reading.place = chunk.place
            self.reading.taken += chunk.data

    def wait(self) -> None:
        self.reading.wait(self.luck.choice((1, GRACE + 1)))

    def live(self) -> None:
        kinds = {self.add: 8, self.half: 2, self.rename: 2, self.empty: 1, self.poll: 6}
        kinds |= {self.empty_without_copy: 1, self.save: 1, self.make_room: 1}
        kinds |= {self.restart: 2, self.wait: 3}
        for _ in range(STEPS):
            (what,) = self.luck.choices([*kinds], [*kinds.values()])
            if self.path.exists() or what in (self.add, self.restart, self.poll, self.wait):
                self.done.append(what.__name__)
                rare = what in (self.empty, self.empty_without_copy, self.save)
                # After two of these between two polls, nothing would show that the text is new.
                self.reading.wait(40 * rare)
                what()
                self.reading.wait(40 * rare)
        self.reading.wait(200)
        check(self.reading.taken, self.written)


class Notes:
    """A folder of notes, what happens to them, and their reader."""

    def __init__(self, luck: Random, folder: Path):
        self.luck, self.path, self.diary = luck, folder / "notes ü", folder / "diary.md"
        self.path.mkdir()
        self.diary.write_text("OWN\n")
        os.link(self.diary, self.path / "Diary.md")
        self.now, self.number, self.done = 0.0, 0, list[str]()
        self.places: dict[str, dict[str, Any]] = {}
        self.written, self.taken = list[str](), list[str]()
        self.begin()

    def begin(self) -> None:
        self.source = NotesFolder(
            self.path, NotePlaces(self.places), lambda _: None, [self.diary], lambda: self.now
        )

    def look(self) -> None:
        for _ in range(3):
            self.now += BETWEEN
            while chunk := self.source.poll():
                self.source.ack(chunk)
                self.places[chunk.source] = chunk.place
                self.taken += chunk.text.splitlines()

    def notes(self) -> list[Path]:
        found = sorted(self.path.rglob("*.md"))
        return [one for one in found if one.name != "Diary.md" and not one.is_symlink()]

    def text(self) -> str:
        self.number += 1
        found = f"{self.number} a line of a note, with é and ü"
        self.written.append(found)
        return found + "\n"

    def create(self) -> None:
        name = self.luck.choice(
            (f"n{self.number}.md", f"é{self.number}.md", f"sub/{self.number}.md")
        )
        (self.path / "sub").mkdir(exist_ok=True)
        (self.path / name).write_text(self.text(), encoding="utf-8")

    def grow(self) -> None:
        with self.luck.choice(self.notes()).open("a", encoding="utf-8") as file:
            file.write(self.text())

    def save(self) -> None:
        path, new = self.luck.choice(self.notes()), self.path / "new"
        new.write_text(path.read_text(encoding="utf-8") + self.text(), encoding="utf-8")
        new.replace(path)

    def rewrite(self) -> None:
        self.look()
        self.luck.choice(self.notes()).write_text(self.text(), encoding="utf-8")

    def move(self) -> None:
        (self.path / "sub").mkdir(exist_ok=True)
        path = self.luck.choice(self.notes())
        self.look()  # what was not read at its old place is read at the new one
        path.rename(self.path / "sub" / f"moved{self.number}-{path.name}")

    def respell(self) -> None:
        self.look()
        path = self.luck.choice(self.notes())
        form = self.luck.choice(("NFC", "NFD"))
        new = path.with_name(unicodedata.normalize(form, path.name))
        if new != path:
            shutil.copyfile(path, new.with_name("copy"))
            path.unlink()
            new.with_name("copy").rename(new)

    def link(self) -> None:
        """Give a note a second name for a while: an editor that saves it would make two notes."""
        path, make = self.luck.choice(self.notes()), self.luck.choice((os.link, os.symlink))
        other = path.with_name(f"link{len(self.done)}.md")
        make(path, other)
        self.look()
        other.unlink()

    def note(self) -> None:
        with self.diary.open("a", encoding="utf-8") as file:
            file.write("OWN\n")

    def live(self) -> None:
        kinds = (self.grow, self.save, self.rewrite, self.move, self.respell, self.link, self.note)
        for _ in range(STEPS // 2):
            what = self.luck.choice((*kinds, self.create, self.look, self.look, self.begin))
            if what in kinds and not self.notes():
                what = self.create
            self.done.append(what.__name__)
            what()
        self.look()
        if sorted(self.taken) != sorted(self.written) or "OWN" in self.taken:
            lost, twice = {*self.written} - {*self.taken}, len(self.taken) - len({*self.taken})
            raise Broken(f"lost {sorted(lost)[:3]}, {twice} twice, own: {'OWN' in self.taken}")


class Pipe:
    """A pipe, its writer and its reader."""

    def __init__(self, luck: Random, folder: Path):
        self.luck, self.done, self.taken, self.ends = luck, list[str](), b"", os.pipe()
        os.set_blocking(self.ends[1], False)
        self.source = StandardInput(lambda _: None, self.ends[0])

    def live(self) -> None:
        data = b"".join(line(self.luck, number, number > 200) for number in range(400))
        rest = data
        while rest:
            piece = rest[: self.luck.choice((1, 7, 500, 4_096, 60_000))]
            with suppress(BlockingIOError):  # a full pipe has room again once it is read
                rest = rest[os.write(self.ends[1], piece) :]
            self.take()
        os.close(self.ends[1])
        while not self.source.ended:
            self.take()
        os.close(self.ends[0])
        check(self.taken, data)

    def take(self) -> None:
        if self.source.wants:
            self.source.read()
        while chunk := self.source.poll():
            self.taken += chunk.data
            self.source.ack(chunk)


def prepare(place: Path) -> None:
    place.mkdir(exist_ok=True)


def start(place: Path) -> Any:
    def judge(luck: Random) -> tuple[str, driver.Open]:
        kind = luck.choices((FollowedFile, Notes, Pipe), (6, 3, 1))[0]

        def live() -> tuple[str, str]:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                one = kind(luck, Path(folder))
                try:
                    one.live()
                except Broken as error:
                    raise Broken(f"{error}; {' '.join(one.done)}") from error
            return kind.__name__, "read whole"

        return kind.__name__, live

    return judge


if __name__ == "__main__":
    driver.main("sources")
