"""A followed file is read completely and only once, whatever happens to it in the meantime."""

import itertools
import os
from pathlib import Path

import pytest

from mlx_stream_assistant import tail
from mlx_stream_assistant.decode import CHUNK, NotText, decode, line_end, whole_characters
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
    assert reading.poll() == b"" and "reading it from its end" in reading.told[-1]
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


def test_a_renamed_file_is_read_to_its_end_before_the_new_one(path):
    add(path, b"one\n")
    reading = Reading(path)
    reading.poll()
    reading.clock.now += 1000  # the file is quiet for a long time
    path.rename(path.with_name("x.log.1"))
    add(path, b"three\n")
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
    assert any("reading it from its beginning" in line for line in reading.told)


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


@pytest.mark.parametrize("renamed", [False, True])
def test_a_binary_file_is_refused_and_what_comes_in_its_place_is_read(path, renamed):
    add(path, b"one\n")
    reading = Reading(path)
    reading.poll()
    add(path, b"\x7fELF\x00\x00\n")
    reading.wait()
    reading.wait()
    assert reading.taken == b"one\n"
    assert [line for line in reading.told if "byte 8 is 0" in line] == reading.told
    assert "byte 8 is 0" in reading.source.state["complaint"]
    if renamed:
        path.rename(path.with_name("x.log.1"))
    path.write_bytes(b"two\n")
    reading.wait(2 * GRACE)
    assert reading.taken == b"one\ntwo\n"
    assert reading.source.state["complaint"] == ""


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
    assert decode("aé".encode(), "x") == "aé"
    assert decode(b"a" * 99 + b"\xff", "x") == "a" * 99 + "\ufffd"
    for data in (b"a\0b", "é".encode("utf-16"), bytes(range(128, 256))):
        with pytest.raises(NotText, match="x: is not"):
            decode(data, "x")


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
            assert arrival == source.poll()  # the same until it is taken
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
    assert told == ["standard input: ended"]
    os.close(read)


def test_binary_standard_input_is_refused():
    read, write = os.pipe()
    told: list[str] = []
    source = StandardInput(told.append, read)
    os.write(write, b"\x00\x01\x02")
    source.read()
    assert source.poll() is None and not source.wants
    assert "byte 0 is 0" in told[0] and "byte 0 is 0" in source.state["complaint"]
    os.close(read)
    os.close(write)
