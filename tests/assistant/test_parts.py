"""The assistant's notes folder, journal and diary: nothing is duplicated, nothing is lost."""

import errno
import os
import random
import shutil
import sqlite3
import stat
import threading
import zlib
from datetime import datetime
from pathlib import Path

import pytest

from mlx_stream.errors import SessionError
from mlx_stream_assistant import notes_folder
from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.journal import LONGEST_CHUNK, Chunk, Journal, cut
from mlx_stream_assistant.notes import NotesFile, markdown
from mlx_stream_assistant.notes_folder import BETWEEN, NotePlaces, NotesFolder
from mlx_stream_assistant.paths import assistant_paths

NOW = datetime(2026, 11, 27, 14, 5)


# --- a folder of notes ---


class Looking:
    """A folder of notes, the text read from it, and its notices."""

    def __init__(self, path: Path, places: NotePlaces | None = None, **more):
        self.path, self.more, self.now = path, more, 0.0
        self.places = NotePlaces({}) if places is None else places
        self.told: list[str] = []
        self.begin()

    def begin(self) -> None:
        clock = lambda: self.now  # noqa: E731
        self.source = NotesFolder(
            self.path, self.places, self.told.append, clock=clock, **self.more
        )

    def look(self, times: int = 2) -> list[tuple[str, str]]:
        found = []
        for _ in range(times):
            self.now += BETWEEN
            while arrival := self.source.poll():
                if arrival.text:
                    found.append((arrival.title, arrival.text))
                self.source.ack(arrival)
        return found

    def restart(self) -> None:
        self.places.before.clear()
        self.begin()


def test_notes_are_read_once_and_then_what_is_new_in_them(tmp_path):
    looking = Looking(tmp_path)
    (tmp_path / "a.md").write_text("one\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.TXT").write_text("two\n")
    for name in (".hidden.md", "c.py", "d.md~"):
        (tmp_path / name).write_text("no\n")
    (tmp_path / "empty.md").touch()
    assert looking.look(1) == []  # their writers may not have finished
    assert sorted(looking.look(1)) == [("a.md", "one\n"), ("sub/b.TXT", "two\n")]
    looking.begin()
    assert looking.look() == []
    with (tmp_path / "a.md").open("a") as file:
        file.write("more\n")
    assert looking.look() == [("a.md", "more\n")]
    (tmp_path / "a.md").write_text("other, and longer than it was\n")
    os.utime(tmp_path / "sub" / "b.TXT", (1, 1))
    assert looking.look() == [("a.md", "other, and longer than it was\n")]
    (tmp_path / "a.md").unlink()
    assert looking.look() == []
    assert looking.told == []


def test_a_note_that_is_being_written_waits(tmp_path):
    looking = Looking(tmp_path)
    for number in range(5):
        (tmp_path / "a.md").write_text("x" * (number + 1))
        assert looking.look(1) == []
    before = len(list(Path("/dev/fd").iterdir()))
    assert looking.look(1) == [("a.md", "xxxxx")]
    assert len(list(Path("/dev/fd").iterdir())) == before  # the folder is not held open


def test_files_that_are_not_notes_are_reported_once_and_left(tmp_path, monkeypatch):
    monkeypatch.setattr(notes_folder, "LONGEST_NOTE", 200)
    (tmp_path / "long.md").write_text("x" * 201)
    (tmp_path / "binary.txt").write_bytes(bytes(range(99)) + b"\xff" * 40)
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "loop.md").symlink_to(tmp_path / "loop.md")
    (tmp_path / "inside").symlink_to(tmp_path)
    (tmp_path / "good.md").write_text("good\n")
    looking = Looking(tmp_path)
    assert looking.look(4) == [("good.md", "good\n")]
    assert len(looking.told) == 2
    assert any("long.md: is 201 bytes long" in line for line in looking.told)
    assert any("binary.txt: is not UTF-8" in line for line in looking.told)
    assert looking.source.state["complaint"]
    (tmp_path / "binary.txt").write_text("now text\n")
    assert looking.look() == [("binary.txt", "now text\n")]


def test_a_note_whose_name_is_not_utf_8_is_refused_and_the_others_are_read(tmp_path, journal):
    bad = b"caf\xe9.md", b"caf\xe9/a.md"
    (tmp_path / "sub").mkdir()
    try:
        (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
        for name in bad:
            (tmp_path / os.fsdecode(name)).write_text("bad\n")
    except OSError:
        pytest.skip("this file system has no such names")
    (tmp_path / "good.md").write_text("good\n")
    (tmp_path / "sub" / "é.md").write_text("also\n")
    looking = Looking(tmp_path)
    assert sorted(looking.look(4)) == [("good.md", "good\n"), ("sub/é.md", "also\n")]
    assert len(looking.told) == 2 and all("rename it" in line for line in looking.told)
    assert any("caf\\udce9.md" in line for line in looking.told)
    assert "\n".join([*looking.told, looking.source.state["complaint"]]).encode()
    for source, place in looking.places.now.items():
        journal.append(Chunk(source, "note", "n", b"", "", place))
    (tmp_path / os.fsdecode(bad[0])).rename(tmp_path / "cafe.md")
    assert looking.look() == [("cafe.md", "bad\n")]


def test_a_byte_order_mark_is_not_text_of_a_note(tmp_path):
    (tmp_path / "a.md").write_text("\ufeffone\n", encoding="utf-8")
    looking = Looking(tmp_path)
    assert looking.look() == [("a.md", "one\n")]
    with (tmp_path / "a.md").open("a", encoding="utf-8") as file:
        file.write("more \ufeff\n")
    looking.begin()
    assert looking.look() == [("a.md", "more \ufeff\n")]


def test_odd_bytes_of_a_note_are_replaced_and_reported_once(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes("Schöne Grüße\n".encode("latin-1") + b"an \0\0 end\n")
    looking = Looking(tmp_path)
    assert looking.look() == [("a.md", "Sch\ufffdne Gr\ufffd\ufffde\nan  end\n")]
    with path.open("ab") as file:
        file.write(b"\xff\n")
    assert looking.look() == [("a.md", "\ufffd\n")]
    assert len(looking.told) == 1 and "byte 3 is not UTF-8 text" in looking.told[0]
    (tmp_path / "b.md").write_bytes("in another code".encode("utf-16"))
    assert looking.look() == [] and "b.md: is UTF-16: convert it" in looking.told[1]


@pytest.mark.parametrize("how", ["renamed", "moved and longer", "NFC and NFD", "its folder"])
def test_a_note_that_was_moved_is_not_read_again(tmp_path, how):
    names = {"NFC and NFD": ("\u00e9.md", "e\u0301.md"), "its folder": ("sub/a.md", "other/a.md")}
    old, new = (tmp_path / name for name in names.get(how, ("a.md", "b.md")))
    for path in (old, new):
        path.parent.mkdir(exist_ok=True)
    old.write_text("one\n")
    looking = Looking(tmp_path)
    looking.look()
    if how == "NFC and NFD":  # copied to a disk that normalizes names differently
        new.write_text("one\n")
        old.unlink()
    elif how == "its folder":
        new.parent.rmdir()
        old.parent.rename(new.parent)
    else:
        old.rename(new)
    if how == "moved and longer":
        with new.open("a") as file:
            file.write("two\n")
    looking.begin()
    assert [text for _, text in looking.look(3)] == ["two\n"] * (how == "moved and longer")
    old.parent.mkdir(exist_ok=True)
    old.write_text("one, but another note\n")
    assert [text for _, text in looking.look(3)] == ["one, but another note\n"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_note_that_was_renamed_is_not_read_again_though_another_has_its_name(tmp_path, restart):
    today, archived = tmp_path / "today.md", tmp_path / "yesterday.md"
    today.write_text("one\n")
    looking = Looking(tmp_path)
    looking.look()
    today.rename(archived)
    today.write_text("two\n")
    if restart:
        looking.begin()
    assert [text for _, text in looking.look(3)] == ["two\n"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_note_that_was_empty_for_a_while_is_not_read_again(tmp_path, restart):
    note = tmp_path / "a.md"
    note.write_text("one\n")
    looking = Looking(tmp_path)
    looking.look()
    note.write_text("")
    looking.look(3)
    if restart:
        looking.begin()
    note.write_text("one\ntwo\n")
    assert [text for _, text in looking.look(3)] == ["two\n"]


def test_the_new_note_may_be_read_before_the_one_that_had_its_name(tmp_path):
    today, archived = tmp_path / "today.md", tmp_path / "yesterday.md"
    today.write_text("one\n")
    looking = Looking(tmp_path)
    looking.look()
    today.rename(tmp_path / "elsewhere")
    today.write_text("two\n")
    assert [text for _, text in looking.look(3)] == ["two\n"]
    (tmp_path / "elsewhere").rename(archived)
    assert looking.look(3) == []


def test_a_note_that_cannot_be_read_is_reported_once_and_read_later(tmp_path, monkeypatch):
    note, locked = tmp_path / "a.md", [True]
    note.write_text("one\n")

    def open_file(path, flags):
        if locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return os.open(path, flags)

    monkeypatch.setattr(notes_folder, "open_file", open_file)
    looking = Looking(tmp_path)
    assert looking.look(5) == []
    assert len(looking.told) == 1 and "Permission denied" in looking.source.state["complaint"]
    locked.clear()
    assert [text for _, text in looking.look(1)] == ["one\n"]
    assert len(looking.told) == 1 and looking.source.state["complaint"] == ""


@pytest.mark.parametrize("restart", [False, True])
def test_a_note_that_was_moved_to_another_folder_is_not_read_again(tmp_path, restart):
    inbox, archive = tmp_path / "inbox", tmp_path / "archive"
    inbox.mkdir()
    archive.mkdir()
    (inbox / "a.md").write_text("one\n")
    (inbox / "b.md").write_text("two\n")
    first = Looking(inbox)
    second = Looking(archive, first.places)
    assert len(first.look()) == 2 and second.look() == []
    assert (first.source.state["notes"], second.source.state["notes"]) == (2, 0)
    (inbox / "a.md").rename(archive / "a.md")
    shutil.copy(inbox / "b.md", archive / "b.md")  # a copy is a separate note
    if restart:
        first.restart()
        second.restart()
    assert second.look(3) == [("b.md", "two\n")] and first.look(3) == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_moved_note_is_not_read_again_though_another_has_its_name(tmp_path, order):
    inbox, archive = tmp_path / "inbox", tmp_path / "archive"
    inbox.mkdir()
    archive.mkdir()
    (inbox / "today.md").write_text("Monday\n")
    first = Looking(inbox)
    folders = first, Looking(archive, first.places)
    assert first.look() == [("today.md", "Monday\n")]
    (inbox / "today.md").rename(archive / "monday.md")
    (inbox / "today.md").write_text("Tuesday\n")
    found = [one for _ in range(3) for index in order for one in folders[index].look(1)]
    assert found == [("today.md", "Tuesday\n")]


def test_notes_are_not_read_again_when_their_folder_was_renamed(tmp_path):
    folder, renamed = tmp_path / "notes", tmp_path / "Notes of 2026"
    folder.mkdir()
    (folder / "a.md").write_text("one\n")
    looking = Looking(folder)
    looking.look()
    folder.rename(renamed)
    looking.path = renamed
    looking.begin()
    with (renamed / "a.md").open("a") as file:
        file.write("two\n")
    assert looking.look(3) == [("a.md", "two\n")]


def test_a_copy_of_a_note_is_another_and_a_link_is_not(tmp_path):
    (tmp_path / "a.md").write_text("one\n")
    os.link(tmp_path / "a.md", tmp_path / "b.md")
    (tmp_path / "c.md").symlink_to("a.md")
    looking = Looking(tmp_path)
    assert [text for _, text in looking.look()] == ["one\n"]
    shutil.copy(tmp_path / "b.md", tmp_path / "d.md")
    assert looking.look() == [("d.md", "one\n")]
    (tmp_path / "a.md").unlink()
    assert looking.look(4) == []


def test_an_excluded_file_is_not_read_under_any_name(tmp_path):
    diary = tmp_path / "diary.txt"
    diary.write_text("mine\n")
    folder = tmp_path / "notes"
    folder.mkdir()
    os.link(diary, folder / "linked.md")
    (folder / "symbolic.md").symlink_to(diary)
    (folder / "a.md").write_text("one\n")
    assert Looking(folder, excluded=[diary, tmp_path / "none"]).look() == [("a.md", "one\n")]


@pytest.mark.parametrize("kind", ["missing", "file", "loop"])
def test_a_folder_that_cannot_be_read_is_waited_for(tmp_path, kind):
    path = tmp_path / "notes"
    if kind == "file":
        path.touch()
    elif kind == "loop":
        path.symlink_to(path)
    looking = Looking(path)
    assert looking.look() == []
    assert len(looking.told) == 1 and "cannot be read" in looking.told[0]
    assert ("--follow" in looking.told[0]) == (kind == "file")
    if kind != "missing":
        path.unlink()
    path.mkdir()
    (path / "a.md").write_text("one\n")
    assert looking.look() == [("a.md", "one\n")]
    assert "can be read again" in looking.told[1]
    shutil.rmtree(path)
    looking.look()
    path.mkdir()
    (path / "a.md").write_text("one\n")
    assert looking.look() == []  # it has not changed


# --- the journal ---


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "j" / "main.db")
    yield journal
    journal.close()


def arrival(text: str, source: str = "x.log", **more) -> Chunk:
    return Chunk(source, "file", source, text.encode(), text, {"offset": 1}, **more)


def test_appended_chunks_are_there_after_a_restart(journal, tmp_path):
    for number in range(5):
        journal.append(arrival(f"line {number}\n"))
    again = Journal(journal.path)
    assert again.id == journal.id and again.last == 5 and again.first == 1
    chunks = list(again.chunks(2))
    assert [c.number for c in chunks] == [3, 4, 5]
    assert [c.text for c in chunks] == ["line 2\n", "line 3\n", "line 4\n"]
    source = again.source("x.log")
    text = b"".join(b"line %d\n" % n for n in range(5))
    assert source and (source.bytes, source.crc) == (len(text), zlib.crc32(text))
    assert again.bytes == len(text) and source.place == {"offset": 1}
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(journal.path.parent.stat().st_mode) == 0o700
    again.append(Chunk("y.log", "file", "y.log", b"", "", {"offset": 7}))  # as with --from-end
    source = again.source("y.log")
    assert source and source.place == {"offset": 7} and again.last == 5
    again.close()


def test_headings_say_where_a_text_is_from(journal):
    for text, source in (("a\n", "x"), ("b", "x"), ("c\n", "y"), ("d\n", "x"), ("e\n", "x")):
        journal.append(arrival(text, source))
    journal.append(arrival("f\n", "x", apart=True))
    heads = [chunk.head for chunk in journal.chunks(0)]
    assert [head.strip()[:3] for head in heads] == ["[x,", "", "[y,", "[x,", "", "[x,"]
    assert [head.startswith("\n\n") for head in heads] == [False, False, True, False, False, False]
    assert heads[0].endswith("]\n") and "".join(c.fed for c in journal.chunks(0)).count("[") == 4


def test_a_long_text_is_cut_into_chunks_that_join_to_it(journal):
    luck = random.Random(2)
    text = "".join(luck.choice("ab \né") for _ in range(20_000)) + "x" * 9000
    journal.append(arrival(text))
    chunks = list(journal.chunks(0))
    assert "".join(c.text for c in chunks) == text and journal.last == len(chunks) > 6
    assert all(len(c.text) <= LONGEST_CHUNK for c in chunks)
    assert cut("", 9) == [] and [c.head for c in chunks][1:] == [""] * (len(chunks) - 1)


def test_pruning_keeps_what_a_snapshot_lacks_and_a_windows_worth(journal):
    for _ in range(30):
        journal.append(arrival("x" * 100))
    journal.prune(20, keep=250)
    assert (journal.first, journal.last) == (18, 30)
    journal.prune(20, keep=10_000)
    assert journal.first == 18
    journal.prune(30, keep=0)
    assert (journal.first, journal.last) == (30, 30)
    journal.close()
    again = Journal(journal.path)
    again.append(arrival("y"))
    assert (again.first, again.last) == (30, 31)
    again.close()


def test_a_journal_does_not_grow(journal):
    def size() -> int:
        return sum(path.stat().st_size for path in journal.path.parent.iterdir())

    sizes = []
    for number in range(200):
        journal.append(arrival("x" * 4000))
        journal.prune(number - 3, keep=20_000)
        sizes.append(size())
    assert max(sizes[100:]) <= max(sizes[50:100])


def test_threads_that_append_at_once(journal):
    def work(name: str) -> None:
        for number in range(30):
            journal.append(arrival(f"{name} {number}\n", name))

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chunks = list(journal.chunks(0))
    assert [c.number for c in chunks] == list(range(1, 121)) and journal.last == 120
    assert [c.text for c in chunks if c.source == "t2"] == [f"t2 {n}\n" for n in range(30)]
    chunks = journal.chunks(119)
    assert next(chunks).number == 120
    journal.append(arrival("late"))  # it arrives while others are being read
    assert next(chunks).text == "late" and next(chunks, None) is None


def test_a_transaction_that_fails_changes_nothing(journal):
    journal.append(arrival("a"))
    with pytest.raises(SessionError):
        journal.append(Chunk("x", "file", "x", b"", "\ud800"))
    (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
    journal._connection.execute(f"PRAGMA max_page_count = {pages}").close()
    with pytest.raises(SessionError, match="disk is full"):
        journal.append(arrival("b" * 100_000))
    source = journal.source("x.log")
    assert journal.last == 1 and source and source.bytes == 1
    journal._connection.execute("PRAGMA max_page_count = 100000").close()
    journal.append(arrival("c"))
    assert [c.text for c in journal.chunks(0)] == ["a", "c"]


def test_a_damaged_or_foreign_journal_is_refused_in_a_line(tmp_path):
    path = tmp_path / "x.db"
    for data in (b"not a database " * 100, b"SQLite format 3\0" + b"x" * 99):
        path.write_bytes(data)
        with pytest.raises(SessionError, match="from a backup") as caught:
            Journal(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE x (y)")
    connection.close()
    with pytest.raises(SessionError, match="not an assistant's journal"):
        Journal(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(SessionError):
        Journal(path)


def test_names_that_cannot_be():
    for name in ("", ".x", "-x", "a/b", "x" * 33):
        with pytest.raises(AssistantError, match="not a valid assistant name"):
            assistant_paths(name)


# --- notes ---


def test_notes_are_added_to_the_end_of_their_file(journal, tmp_path):
    path = tmp_path / "deep" / "diary.md"
    diary = NotesFile(path, journal)
    diary.write("All was well.\n", NOW, "about", 5)
    path.write_text(path.read_text().rstrip("\n") + "\n\nMine.")
    diary.write("# Loud\n```\nTwo\n===\n", NOW, "about", 9)
    assert path.read_text() == (
        "## 2026-11-27 14:05\n\nAll was well.\n\n*about*\n\nMine.\n\n"
        "## 2026-11-27 14:05\n\n\\# Loud\n\\```\nTwo\n\\===\n\n*about*\n\n"
    )
    assert journal.last_note == (9, NOW.timestamp()) and journal.writing is None
    assert "had nothing to say" in markdown(" \n", NOW, "about")


@pytest.mark.parametrize("before", [b"", b"Before.\n"])
@pytest.mark.parametrize("after", [b"", b"After.\n"])
def test_a_note_that_was_cut_short_is_written_whole_and_once(journal, tmp_path, before, after):
    path = tmp_path / "diary.md"
    diary = NotesFile(path, journal)
    text = ("\n" if before else "") + markdown("All was well.", NOW, "about")
    wanted = None
    for count in range(len(text) + 1):
        if after and 0 < count < len(text):
            continue  # a crash does not leave half a note with text after it
        journal.begin_note({"note": text, "at": len(before)}, 1, 0.0)
        path.write_bytes(before + text[:count].encode() + after)
        diary.finish()
        found = path.read_bytes()
        assert found.count(b"All was well.") == 1 and journal.writing is None
        assert found.count(after) and found.startswith(before)
        if not after:
            assert found == (wanted := wanted or found) == before + text.encode()
        assert b"\n\n\n" not in found and (b"\n\n## " in found or found.startswith(b"## "))
        diary.finish()
        assert path.read_bytes() == found
