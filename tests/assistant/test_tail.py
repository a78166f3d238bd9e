"""A followed file is read completely and only once, whatever happens to it in the meantime."""

import errno
import itertools
import os
from pathlib import Path

import pytest

from mlx_stream_assistant import tail
from mlx_stream_assistant.decode import (
    CHUNK,
    NotText,
    TextDecoder,
    line_end,
    refuse_binary,
    whole_characters,
)
from mlx_stream_assistant.rotation import end_of_zeros
from mlx_stream_assistant.stdin import StandardInput
from mlx_stream_assistant.tail import GRACE, SETTLED
from tests.fakes.following import Reading, add, rotate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.log"


def test_whole_lines_come_at_once_and_the_rest_of_one_when_it_is_left_alone(path):
    add(path, b"one\ntw")
    reading = Reading(path)
    assert reading.poll() == b"one\n"
    reading.clock.now += SETTLED / 2
    assert reading.poll() == b""
    reading.clock.now += SETTLED
    assert reading.poll() == b"tw"
    add(path, b"o\n")
    assert reading.poll() == b"o\n"
    assert reading.told == []


@pytest.mark.parametrize("restart", [False, True])
def test_from_its_end_a_file_is_read_behind_the_lines_there_are(path, restart):
    path.write_bytes(b"x\xff\n" * 5_000 + b"half")
    reading = Reading(path, from_end=True)
    assert reading.poll() == b"" and "reading from the end" in reading.told[-1]
    if restart:
        reading.restart()
    add(path, b" a line\nmore\n")
    assert reading.wait() == b"half a line\nmore\n"
    path.write_bytes(b"anew\n")
    assert reading.wait() == b"anew\n"
    rotate(path)
    path.write_bytes(b"new\n")
    assert reading.wait() == b"new\n" and len(reading.told) == 3


def test_from_its_end_what_comes_later_is_read_whole(path):
    reading = Reading(path, from_end=True)
    assert reading.poll() == b""
    path.write_bytes(b"one\n")
    assert reading.poll() == b"one\n"
    other = Reading(path.with_name("empty"), from_end=True)
    other.path.touch()
    assert other.poll() == b""
    add(other.path, b"one\n")
    assert other.poll() == b"one\n"


def test_a_character_is_never_cut(path):
    text = "a€𝄞é\n".encode() * 3000
    reading, source = Reading(path), iter(text)
    while piece := bytes(itertools.islice(source, 1111)):
        add(path, piece)
        reading.clock.now += 1.0
        while arrival := reading.source.poll():
            assert "\ufffd" not in arrival.text and arrival.text.encode() == arrival.data
            assert len(arrival.data) <= CHUNK
            reading.taken += arrival.data
            reading.source.ack(arrival)
    assert reading.taken == text


@pytest.mark.parametrize("restart", [False, True])
def test_a_renamed_file_is_read_to_its_end_before_the_new_one(path, restart):
    add(path, b"one\n")
    reading = Reading(path)
    reading.poll()
    reading.clock.now += 1000  # the file is quiet for a long time
    path.rename(path.with_name("x.log.1"))
    add(path, b"three\n")
    if restart:
        reading.restart()
    for _ in range(3):
        reading.clock.now += GRACE / 4
        assert reading.poll() == b""
    add(path.with_name("x.log.1"), b"two\n")  # its writer has not noticed the new name yet
    assert reading.poll() == b"two\n"
    reading.wait()
    assert reading.taken == b"one\ntwo\nthree\n"


def test_half_a_character_at_the_end_of_a_renamed_file_is_not_lost(path):
    add(path, b"one\n\xe2\x82")
    reading = Reading(path)
    reading.wait()
    path.rename(path.with_name("x.log.1"))
    add(path, b"two\n")
    reading.wait(2 * GRACE + 2)
    assert reading.taken == b"one\n\xe2\x82two\n"


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("new", [b"x\n", b"a longer text than it was\n"])
def test_a_file_that_was_cut_or_rewritten(path, restart, new):
    add(path, b"one two three\n")
    reading = Reading(path)
    reading.poll()
    path.write_bytes(new)
    if restart:
        reading.restart()
    reading.wait()
    assert reading.taken == b"one two three\n" + new
    assert any("reading from the beginning" in line for line in reading.told)


def test_a_byte_order_mark_is_not_text(path):
    add(path, "\ufeffone\n".encode())
    reading = Reading(path)
    arrival = reading.source.poll()
    assert arrival and arrival.text == "one\n" and arrival.data == path.read_bytes()
    reading.poll()
    add(path, "\ufefftwo\n".encode())
    arrival = reading.source.poll()
    assert arrival and arrival.text == "\ufefftwo\n"


def test_a_file_that_goes_and_comes_back(path):
    reading = Reading(path)
    assert reading.wait() == b""
    add(path, b"one\n")
    reading.wait()
    path.rename(path.with_name("away"))
    reading.wait()
    path.with_name("away").rename(path)  # it is not read again
    add(path, b"two\n")
    reading.wait()
    path.unlink()
    reading.wait()
    reading.wait()
    add(path, b"three\n")
    reading.wait()
    assert reading.taken == b"one\ntwo\nthree\n"
    assert sum("does not exist; waiting" in line for line in reading.told) == 3


BINARY = bytes(range(256)) * 16


@pytest.mark.parametrize("data", [BINARY, "text".encode("utf-16")])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_binary_file_is_refused_and_what_comes_in_its_place_is_read(path, renamed, data):
    add(path, data)
    reading = Reading(path)
    reading.wait()
    add(path, b"more\n")
    reading.wait()
    assert reading.taken == b""
    why = "is not UTF-8 text" if data == BINARY else "is UTF-16: convert it"
    assert len(reading.told) == 1 and why in reading.told[0]
    assert why in reading.source.state["complaint"]
    if renamed:
        path.rename(path.with_name("x.log.1"))
    path.write_bytes(b"two\n")
    reading.wait(2 * GRACE)
    assert reading.taken == b"two\n"
    assert reading.source.state["complaint"] == ""


ODD_LINES = [
    b'invalid request: "\x16\x03\x01\x00\xfc\x03"\n',
    "Gerät über 40 °C\n".encode("latin-1"),
    "“quoted” €\n".encode("cp1252"),
    "ログです\n".encode("shift-jis"),
    bytes(range(256)) + b"\n",
    b"\0" * 600 + b"after a power cut\n",
    b"\xff" * 5_000 + b"\n",
    b"\xe2\x82\n",
]


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
@pytest.mark.parametrize("before", [0, 1, 4_000, 4_090, 10_000])
def test_an_odd_line_ends_nothing_wherever_it_is(path, line, before):
    text = b"x" * max(0, before - 1) + b"\n" * (before > 0)
    for pieces in ([text + line + b"after\n"], [text, line, b"after\n"]):
        reading, found = Reading(path), ""
        for piece in pieces:
            add(path, piece)
            for _ in range(4):
                reading.clock.now += 1.0
                while chunk := reading.source.poll():
                    found += chunk.text
                    reading.source.ack(chunk)
        whole = path.read_bytes()
        refused = len(line) > CHUNK and (before == 0 or (before == 1 and len(pieces) == 1))
        if not refused:
            assert found == whole.decode("utf-8", "replace").replace("\0", "")
            assert sum("is not UTF-8 text: such" in told for told in reading.told) == 1
        path.unlink()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("before", [8, 5_000, 3 << 20])
def test_a_file_that_is_emptied_under_a_writer_that_keeps_its_place(path, before, copied, restart):
    """It begins with zeros, up to where the writer was."""
    with path.open("wb", buffering=0) as writer:
        writer.write(b"a line\n" * (before // 7))
        reading = Reading(path)
        reading.wait()
        writer.write(b"unread\n")
        for number in range(3):
            if copied:
                path.with_name(f"x.log.{3 - number}").write_bytes(path.read_bytes())
            os.truncate(path, 0)
            writer.write(b"line %d\n" % number)
            if restart:
                reading.restart()
            reading.wait()
        text = reading.taken.replace(b"\0", b"")
    lines = b"unread\n" * copied + b"line 0\nline 1\nline 2\n"
    assert text == b"a line\n" * (before // 7) + lines
    assert reading.source.state["complaint"] == ""


def test_room_for_text_to_come_is_not_read(path):
    add(path, b"one\n")
    os.truncate(path, 5_000)
    with path.open("r+b", buffering=0) as writer:
        writer.write(b"one\n")
        reading = Reading(path)
        assert reading.wait() == b"one\n"
        writer.write(b"tw")
        assert reading.wait() == b"tw"
        writer.write(b"o\n")
        assert reading.wait() == b"o\n"
    assert reading.told == []


def test_a_hole_of_a_terabyte_takes_no_time(path):
    add(path, b"one\n")
    try:
        os.truncate(path, 2**40)
    except OSError:
        pytest.skip("this file system has no holes")
    add(path, b"two\n")
    reading = Reading(path)
    assert reading.wait() == b"one\ntwo\n"
    os.truncate(path, 2**41)
    assert reading.wait() == b""


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("how", ["device", "saved", "saved with a copy", "moved disk", "renamed"])
def test_the_same_bytes_are_the_same_file(path, how, restart):
    """A reboot changes the device number; an editor or another disk changes the inode number."""
    text = b"".join(b"line %d\n" % number for number in range(200))
    add(path, text)
    reading = Reading(path)
    reading.wait()
    if restart:
        reading.restart()
    if how in ("device", "renamed"):
        reading.place = {**(reading.place or {}), "device": -1}
        reading.restart()
    if how == "moved disk":
        reading.place = {**(reading.place or {}), "device": -1, "inode": -1}
        reading.restart()
    if how == "renamed":
        add(path, b"unread\n")
        text += b"unread\n"
        rotate(path)
    elif how.startswith("saved"):
        path.with_name("new").write_bytes(text + b"unread\n")
        text += b"unread\n"
        if how == "saved with a copy":
            path.rename(path.with_name("x.log~"))
        path.with_name("new").replace(path)
    add(path, b"two\n")
    reading.wait(10)
    assert reading.taken == text + b"two\n"
    path.with_name("new").write_bytes(b"LINE" + text[4:] + b"edited\n")
    path.with_name("new").replace(path)
    assert reading.wait(10)[-7:] == b"edited\n"


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_the_file_that_notes_are_written_to_is_not_read(path, link):
    notes = path.with_name("diary.md")
    notes.write_bytes(b"A note.\n")
    link(notes, path)
    reading = Reading(path, excluded=notes)
    assert reading.wait() == b"" and "notes are written to" in reading.told[0]
    path.unlink()
    add(path, b"one\n")
    assert reading.wait() == b"one\n"


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "locked"])
def test_a_file_is_waited_for_where_there_is_none(path, kind):
    if kind == "locked" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}.get(kind, lambda: None)()
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "locked":
        path.touch(0)
    reading = Reading(path)
    reading.wait()
    (line,) = reading.told
    assert ("Permission denied" if kind == "locked" else "waiting for") in line
    path.rmdir() if kind == "folder" else path.unlink()
    add(path, b"one\n")
    reading.wait()
    assert reading.taken == b"one\n"


def test_where_bytes_may_end():
    assert [whole_characters("a€".encode()[:n]) for n in range(5)] == [0, 1, 1, 1, 4]
    assert whole_characters(b"\x80\x80\x80\x80") == 4
    assert line_end(b"one\ntwo", more=False, growing=True) == 4
    assert line_end(b"one two", more=False, growing=True) == 0
    assert line_end(b"one two", more=False, growing=False) == 7
    assert line_end(b"one two", more=True, growing=False) == 4
    assert line_end(b"onetwo\xc3", more=True, growing=False) == 6
    assert tail.position_of(None) is None


def test_text_and_bytes_that_are_not_text():
    told: list[str] = []
    decoder = TextDecoder(told.append)
    assert decoder.decode("aé".encode(), "x") == "aé" and told == []
    assert decoder.decode(b"a\xffb\0", "x", 9) == "a\ufffdb"
    assert decoder.decode(b"\0\0", "x") == "" and len(told) == 1 and "x: byte 10 is" in told[0]
    for data in (BINARY, "é".encode("utf-16"), bytes(range(128, 256))):
        with pytest.raises(NotText, match="x: is"):
            refuse_binary(data, "x", whole=True)
    refuse_binary("Gerät über 40 °C, Lüfter läuft\n".encode("latin-1") * 9, "x", whole=True)
    refuse_binary("\ufffd".encode() * 9, "x", whole=True)
    refuse_binary(b"\0" * 900 + b"one\n", "x", whole=True)
    refuse_binary(b"\x1b[31mred\x1b[0m\n" * 9, "x", whole=True)
    refuse_binary(b"\xff\xff", "x", whole=False)
    with pytest.raises(NotText, match="UTF-16"):
        refuse_binary("é".encode("utf-16"), "x", whole=False)


# --- standard input ---


def test_standard_input_comes_in_whole_characters_to_its_end():
    read, write = os.pipe()
    told: list[str] = []
    source = StandardInput(told.append, read)
    taken = b""

    def take(data: bytes = b"") -> None:
        nonlocal taken
        if data:
            os.write(write, data)
        source.read()
        while arrival := source.poll():
            assert arrival == source.poll()  # the same until it is acknowledged
            taken += arrival.data
            source.ack(arrival)

    take("one\n€".encode()[:-1])
    assert taken == b"one\n"
    take("€".encode()[-1:])
    assert taken == "one\n€".encode()
    os.write(write, b"x\xe2")
    os.close(write)
    while source.wants:
        take()
    assert taken == "one\n€x".encode() + b"\xe2" and source.ended
    assert told[0] == "standard input: ended" and "byte 8 is not UTF-8" in told[1]
    os.close(read)


def test_binary_standard_input_is_refused_and_its_writer_learns_of_it():
    read, write = os.pipe()
    told: list[str] = []
    source = StandardInput(told.append, read)
    os.write(write, BINARY)
    source.read()
    assert source.poll() is None and not source.wants
    assert "no longer read" in told[0] and "is not UTF-8" in source.state["complaint"]
    with pytest.raises(BrokenPipeError):
        os.write(write, b"x")
    assert os.read(read, 1) == b""  # the descriptor stays in use, so no other file gets it
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_an_odd_line_does_not_end_standard_input(line):
    read, write = os.pipe()
    told: list[str] = []
    source, found = StandardInput(told.append, read), ""
    whole = b"before\n" + line + b"after\n"
    os.write(write, b"before\n")
    source.read()
    while chunk := source.poll():
        found += chunk.text
        source.ack(chunk)
    os.write(write, line + b"after\n")
    os.close(write)
    while not source.ended:
        source.read()
        while chunk := source.poll():
            found += chunk.text
            source.ack(chunk)
    os.close(read)
    assert found == whole.decode("utf-8", "replace").replace("\0", "")
    assert len(told) == 2 and "byte" in told[0] and told[1] == "standard input: ended"


@pytest.mark.parametrize("copied", [False, True])
def test_a_file_that_is_emptied_and_written_again_within_a_poll(path, monkeypatch, copied):
    add(path, b"one\n")
    reading = Reading(path)
    reading.poll()
    add(path, b"two\n" + b"of the old text\n" * 300)
    old, pread = path.read_bytes(), os.pread

    def interrupted(*args):
        data = pread(*args)
        if data.endswith(b"text\n") or b"two" in data:
            monkeypatch.setattr(os, "pread", pread)
            if copied:
                path.with_name("x.log.1").write_bytes(old)
            path.write_bytes(b"new\n" * 2_000)
        return data

    monkeypatch.setattr(os, "pread", interrupted)
    reading.wait(20)
    assert reading.taken.endswith(b"new\n" * 2_000)
    rest = reading.taken.removesuffix(b"new\n" * 2_000)
    assert rest == old if copied else old.startswith(rest) and b"new" not in rest


def test_zeros_at_the_end_of_a_file_do_not_hide_text_in_the_file_that_an_editor_made_of_it(path):
    add(path, b"one\n")
    reading = Reading(path)
    reading.poll()
    os.truncate(path, 100)  # space for later text
    reading.poll()
    new = path.with_name("new")
    new.write_bytes(b"one\ntwo\n")
    new.replace(path)
    rotate(path)
    add(path, b"three\n")
    reading.wait(20)
    assert reading.taken == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("space", [100, 3 * CHUNK])
def test_a_character_is_not_split_where_space_is_reserved_behind_its_first_bytes(path, space):
    text = "Straße 日本\n".encode()
    path.write_bytes(bytes(space))
    decoder = TextDecoder(lambda _: None)
    reading, found, place = Reading(path), "", 0
    for number in range(len(text)):
        with path.open("r+b") as file:
            file.seek(number)
            file.write(text[number : number + 1])
        os.utime(path, (number + 1, number + 1))
        data = reading.wait(1)
        found, place = found + decoder.decode(data, "x", place), place + len(data)
    assert found == text.decode()


def test_a_character_may_be_completed_while_the_space_behind_it_is_searched(path, monkeypatch):
    path.write_bytes(b"\xc3" + bytes(100))
    reading = Reading(path)

    def completed(*args):
        path.write_bytes(b"\xc3\xa9\n" + bytes(98))
        return end_of_zeros(*args)

    monkeypatch.setattr(tail, "end_of_zeros", completed)
    chunk = reading.source.poll()
    assert chunk is not None and chunk.data == b"\xc3\xa9\n"


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_for_a_moment_is_not_taken_for_another(path, monkeypatch, error):
    add(path, b"one\n")
    reading = Reading(path)
    reading.poll()
    path.with_name("new").write_bytes(b"one\ntwo\n")
    path.with_name("new").replace(path)
    real = tail.open_file

    def fails_once(*args):
        monkeypatch.setattr(tail, "open_file", real)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(tail, "open_file", fails_once)
    assert reading.wait(20) == b"two\n"


def test_the_first_bytes_of_a_character_that_was_lost_are_read_with_what_follows(path):
    path.write_bytes(b"one \xe6" + bytes(2 * CHUNK) + b"two\n")
    reading = Reading(path)
    assert reading.wait().replace(b"\0", b"") == b"one \xe6two\n"
