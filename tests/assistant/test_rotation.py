"""A rotated file is read completely and only once, whatever other files are next to it."""

import itertools
import os
import random
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_stream_assistant import rotation, tail
from mlx_stream_assistant.rotation import rotation_number
from mlx_stream_assistant.tail import GRACE
from tests.fakes.following import Reading, add, rotate, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.log"


def read_one(path: Path) -> Reading:
    """Return a `Reading` that has read "one"."""
    write(path, b"one\n", 2)
    reading = Reading(path)
    reading.poll()
    return reading


def rotated_unseen(path: Path) -> Reading:
    """Return a `Reading` that has read "one"; "two" is in x.log.1, and "three" in x.log."""
    reading = read_one(path)
    write(path, b"two\n", 3)
    rotate(path)
    write(path, b"three\n", 4)
    reading.restart()
    return reading


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("unread", [b"", b"two\nhalf a li"])
def test_rotated_more_than_once_unseen(path, unread, restart, cut):
    reading = read_one(path)
    write(path.with_name("x.log.1"), b"of long ago\n", 1)
    write(path, unread, 3)
    for number in range(4, 7):
        if cut:
            path.with_name("kept").write_bytes(path.read_bytes())
            os.utime(path.with_name("kept"), (number - 1, number - 1))
        rotate(path)
        if cut:  # the file is copied, then truncated in place
            path.with_name("x.log.1").rename(path)
            path.with_name("kept").rename(path.with_name("x.log.1"))
            os.truncate(path, 0)
        write(path, b"%d\n" % number, number)
    for _ in range(30):
        if restart:
            reading.restart()
        reading.wait()
    assert reading.taken == b"one\n" + unread + b"4\n5\n6\n"


@pytest.mark.parametrize(
    "names", [("-20261128", "-20261129"), (".2026-11-28_23", ".2026-11-29_00")]
)
def test_rotated_more_than_once_by_date(path, names):
    reading = read_one(path)
    write(path.with_name(f"x.log{names[0][:-1]}"), b"another kind\n", 1)
    for second, name in enumerate(names, 3):
        path.rename(path.with_name(f"x.log{name}"))
        write(path, b"%d\n" % second, second)
    reading.restart()
    reading.wait(20)
    assert reading.taken == b"one\n3\n4\n" and len(reading.told) == 2


@pytest.mark.parametrize("kept", [(1, 2, 3), (1,), (3,)])
def test_other_rotated_files_are_not_read_again(path, kept):
    """Later files have higher numbers, one is written to after being read, and one is gone."""
    reading = Reading(path)
    for number in range(1, 4):
        write(path, b"%d\n" % number, number)
        reading.wait()
        path.rename(path.with_name(f"x.log.{number}"))
    write(path, b"4\n", 4)
    reading.wait()
    for number in {1, 2, 3} - {*kept}:
        path.with_name(f"x.log.{number}").unlink()
    write(path.with_name(f"x.log.{kept[-1]}"), b"late\n", 9)
    path.rename(path.with_name("x.log.4"))
    write(path, b"5\n", 10)
    reading.restart()
    reading.wait(20)
    assert reading.taken == b"1\n2\n3\n4\n5\n"
    assert [line for line in reading.told if "newer than what was read" in line]
    path.unlink()
    write(path.with_name("x.log.5"), b"new\n", 11)
    write(path, b"6\n", 12)
    reading.told.clear()
    reading.restart()
    reading.wait()
    assert reading.taken == b"1\n2\n3\n4\n5\n6\n"
    assert [line for line in reading.told if line.endswith("newer than what was read: x.log.5")]


def test_a_binary_file_in_between_is_passed_over(path):
    reading = read_one(path)
    for second, data in ((3, b"\0\0"), (4, b"two\n"), (5, b"three\n")):
        rotate(path)
        write(path, data, second)
    reading.wait(30)
    assert reading.taken == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("names", [("x.log.2", "x.log.1"), ("x.log-20261128", "x.log-20261129")])
@pytest.mark.parametrize("restart", [False, True])
def test_rotated_files_that_are_there_are_read_first_the_oldest_first(path, names, restart):
    for second, name in enumerate((*names, "x.log"), 1):
        write(path.with_name(name), b"%d\n" % second, second)
    write(path.with_name("x.log~"), b"a copy that an editor left\n", 1)
    reading = Reading(path)
    for _ in range(5):
        reading.wait()
        if restart:
            reading.restart()
    assert reading.taken == b"1\n2\n3\n" and "not read" not in str(reading.told)
    other = Reading(path, from_end=True)
    other.path.unlink()  # rotated files are not new, even if the file itself comes later
    other.wait()
    add(path, b"4\n")
    other.wait(10)
    assert other.taken == b"4\n"


def test_rotated_files_in_no_clear_order_are_reported_and_not_read(path):
    for second, name in enumerate(("x.log.1", "x.log.3", "x.log"), 1):
        write(path.with_name(name), b"%d\n" % second, second)
    reading = Reading(path)
    reading.wait()
    assert reading.taken == b"3\n"
    assert reading.told == [f"{path}: not read, in no clear order: x.log.1, x.log.3"]


def test_a_look_in_the_middle_of_a_rotation_loses_nothing(path):
    reading = read_one(path)
    for second, data in ((3, b"two\n"), (4, b"three\n")):
        rotate(path)
        write(path, data, second)
    second, third = (path.with_name(f"x.log.{number}") for number in (2, 3))
    second.rename(third)  # and x.log.1 has not been renamed yet
    reading.restart()
    reading.wait(1)
    path.with_name("x.log.1").rename(second)
    path.rename(path.with_name("x.log.1"))
    write(path, b"four\n", 5)
    reading.wait(20)
    assert reading.taken == b"one\ntwo\nthree\nfour\n" and "not read" not in str(reading.told)


@pytest.mark.parametrize("missing", range(1, 5))
def test_a_listing_that_misses_a_file_loses_nothing(path, monkeypatch, missing):
    """A file that is renamed while its folder is listed may not be in the list."""
    reading, scandir, listings = read_one(path), os.scandir, []
    for second, data in ((3, b"two\n"), (4, b"three\n")):
        rotate(path)
        write(path, data, second)

    @contextmanager
    def misses_one(folder):
        listings.append(folder)
        with scandir(folder) as entries:
            yield [one for one in entries if one.name != "x.log.1" or len(listings) != missing]

    monkeypatch.setattr(os, "scandir", misses_one)
    reading.restart()
    reading.wait(20)
    assert reading.taken == b"one\ntwo\nthree\n" and len(listings) > 4


def test_only_the_latest_rotated_file_is_waited_for(path):
    """300 files would take 300 times GRACE."""
    for number in range(300):
        write(path.with_name(f"x.log.{300 - number}"), b"%d\n" % number, number)
    write(path, b"300\n", 300)
    reading = Reading(path)
    reading.wait(8)
    assert reading.taken == b"".join(b"%d\n" % number for number in range(301))


def replace_open_file(monkeypatch, opened) -> None:
    """Replace the function that opens the followed file and those in its folder."""
    for module in (tail, rotation):
        monkeypatch.setattr(module, "open_file", opened)


@pytest.fixture
def locked(monkeypatch):
    """Return a set of names that cannot be opened: simulated, because root can open any file."""
    names: set[str] = set()
    whole = tail.open_file

    def opened(path: Path) -> int:
        if path.name in names:
            raise PermissionError(13, "Permission denied")
        return whole(path)

    replace_open_file(monkeypatch, opened)
    return names


@pytest.mark.parametrize("how", ["cut", "renamed", "in between"])
def test_another_file_that_may_not_be_read_is_taken_as_not_there(path, locked, how):
    reading = read_one(path)
    if how == "cut":
        add(path.with_name("x.log.1"), b"one\nmore than was read\n")
        os.truncate(path, 0)
    else:
        add(path, b"unread\n" if how == "renamed" else b"")
        rotate(path)
    if how == "in between":
        write(path, b"not read\n", 2**31)
        rotate(path)
    locked.add("x.log.1")
    reading.restart()
    reading.wait(5)
    add(path, b"two\n")
    reading.wait(20)
    assert reading.taken == b"one\ntwo\n"
    assert sum("x.log.1: cannot be read: Permission denied" in line for line in reading.told) == 1
    assert sum("can be read again" in line for line in reading.told) == (how != "cut")
    add(path, b"three\n")
    assert reading.wait() == b"three\n"
    rotate(path)
    reading.wait(10)
    assert sum("Permission denied" in line for line in reading.told) == 2


def test_only_what_rotation_names_is_a_copy_and_only_if_it_is_newer(path):
    for name in ("x.log.err", "x.log2", "x.log.1.gz", "x.log.tmp"):
        write(path.with_name(name), b"# started\nof another\n", 5)
    write(path, b"# started\n", 2)
    reading = Reading(path)
    reading.poll()
    write(path.with_name("x.log.1"), b"# started\nread long ago\n", 1)
    path.write_bytes(b"new\n")
    reading.restart()
    reading.wait()
    assert reading.taken == b"# started\nnew\n"
    assert len(reading.told) == 1


def test_how_rotation_names_files():
    for number in (10, 9, 0):
        assert rotation_number("x.log", f"x.log.{number}") == (".", (-number,))
    for end in ("-20261128", ".2026-11-28", "-20261128-1764300000", ".old", ".bak", "~"):
        assert rotation_number("x.log", f"x.log{end}")
    for other in ("x.log", "x.log.err", "x.log.1.gz", "y.log.1", "x.log1", "x.log.", "x.log.1.err"):
        assert rotation_number("x.log", other) is None
    for other in ("x-2.log", "x-2026.log", "y-20261128.log", "x-20261128.txt", "x-20261128.log.gz"):
        assert rotation_number("x.log", other) is None


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ("-20261127", "-20261128", "-20261129"),
        (".2026-11-28.8", ".2026-11-28.9", ".2026-11-28.10"),
        ("-2026-11-27T10-00-00.000", "-2026-11-28T10-00-00.000", "-2026-11-29T10-00-00.000"),
        ("__2026-11-27_00-00-00", "__2026-11-28_00-00-00", "__2026-11-29_00-00-00"),
    ],
)
def test_a_date_may_stand_before_the_last_suffix(path, names, copied):
    old, *new = (path.with_name(f"x{name}.log") for name in names)
    write(old, b"zero\n", 1)
    write(path, b"one\n", 2)
    reading = Reading(path)
    reading.wait(20)
    for second, name in enumerate(new, 3):
        write(path, b"%d\n" % second, second)
        if copied:
            write(name, path.read_bytes(), second)
            os.truncate(path, 0)
        else:
            path.rename(name)
    write(path, b"last\n", 9)
    reading.restart()
    reading.wait(20)
    assert reading.taken == b"zero\none\n3\n4\nlast\n"
    assert not [line for line in reading.told if "not read" in line]


def test_files_that_are_renamed_while_they_are_looked_for(path, monkeypatch):
    reading = rotated_unseen(path)
    whole, opens = tail.open_file, itertools.count()

    def opened(found: Path) -> int:
        if (number := next(opens)) in (0, 1, 3, 4, 8, 13):
            rotate(path)
            write(path, b"%d\n" % number, 10 + number)
        return whole(found)

    replace_open_file(monkeypatch, opened)
    reading.wait(60)
    assert next(opens) > 13
    assert reading.taken == b"one\ntwo\nthree\n0\n1\n3\n4\n8\n13\n"
    assert not [line for line in reading.told if "cannot be read" in line]


def test_a_copy_of_no_more_than_was_read_is_left(path):
    reading = read_one(path)
    path.with_name("x.log.1").write_bytes(b"one\n")
    path.write_bytes(b"")
    assert reading.wait() == b""
    add(path, b"two\n")
    assert reading.wait() == b"two\n"
    assert reading.told == [f"{path}: was truncated: reading from the beginning"]


@pytest.mark.parametrize("seed", range(4))
def test_a_random_life_of_a_file(path, seed):
    """The reader is also killed before it has saved what it read; the file is renamed often."""
    luck, number, now = random.Random(seed), 0, 0
    reading, written = Reading(path), b""
    rotates = (
        rotate if seed % 2 else lambda path: path.rename(path.with_name(f"x.log-{10**9 + now}"))
    )
    for step in range(600):
        what = luck.choices(("add", "rename", "restart", "wait", "poll"), (6, 1, 2, 2, 3))[0]
        if what == "add" or step == 0:
            line = f"line {number} {'é' * luck.randint(0, 900)}\n".encode()
            now += 1
            write(path, line, now)
            written, number = written + line, number + 1
            if step == 0:
                reading.wait()  # text written before the first look may be missed
        elif what == "rename" and path.exists():
            rotates(path)
        elif what == "restart":
            reading.restart()
        elif what == "wait":
            reading.wait(luck.choice((1, GRACE + 1)))
        elif (arrival := reading.source.poll()) and luck.random() < 0.7:
            reading.source.ack(arrival)
            reading.place, reading.taken = arrival.place, reading.taken + arrival.data
    reading.wait(400)
    assert reading.taken == written and number > 100
    assert not [line for line in reading.told if "not read" in line]


@pytest.mark.parametrize("restart", [False, True])
def test_an_empty_rotated_file_may_be_older_than_the_end_of_the_one_before(path, restart):
    reading = read_one(path)
    rotate(path)
    write(path, b"", 3)  # created before the writer notices the rename
    write(path.with_name("x.log.1"), b"two\n", 4)
    rotate(path)
    write(path, b"three\n", 5)
    rotate(path)
    write(path, b"four\n", 6)
    if restart:
        reading.restart()
    reading.wait(20)
    assert reading.taken == b"one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize("restart", [False, True])
def test_the_file_behind_a_link_may_be_rotated_in_a_folder_of_its_own(tmp_path, path, restart):
    real = tmp_path / "real" / "json.log"
    real.parent.mkdir()
    path.symlink_to(real)
    write(real.with_name("json.log.1"), b"zero\n", 1)
    write(real, b"one\n", 2)
    reading = Reading(path)
    reading.wait(10)
    for second, line in enumerate((b"two\n", b"three\n", b"four\n"), 3):
        write(real, line, second)
        rotate(real)
    if restart:
        reading.restart()
    reading.wait(20)
    assert reading.taken == b"zero\none\ntwo\nthree\nfour\n"


def test_a_copy_may_be_older_than_the_last_read(path):
    lines = b"".join(b"line %d\n" % number for number in range(1_000))
    write(path, lines, 2)
    reading = Reading(path)
    for second in (3, 4):
        chunk = reading.source.poll()
        assert chunk
        reading.source.ack(chunk)
        reading.taken += chunk.data
        if second == 3:
            write(path.with_name("x.log.1"), lines, 3)
            write(path, b"between the copy and the truncation\n", 4)
    assert len(reading.taken) < len(lines)
    os.truncate(path, 0)
    write(path, b"new\n", 5)
    reading.wait(20)
    assert reading.taken == lines + b"new\n"


def test_a_copy_beside_a_file_of_another_device_number_is_not_read(path):
    reading = read_one(path)
    write(path.with_name("x.log.1"), b"one\n", 3)
    write(path, b"two\n", 4)
    assert reading.place
    reading.place = {**reading.place, "device": 1}
    reading.restart()
    reading.wait(20)
    assert reading.taken == b"one\ntwo\n"


@pytest.mark.parametrize("names", [(".2", ".1"), (".1",), (".1", ".0"), ("-20261128", "-20261129")])
def test_newer_rotated_files_are_read_though_the_one_that_was_read_is_gone(path, names):
    """It was compressed, or there were more rotations than kept files."""
    reading = read_one(path)
    write(path.with_name(f"x.log{names[0][:-1]}7"), b"of long ago\n", 1)
    path.rename(path.with_name("x.log.3.gz"))
    for second, name in enumerate(names, 3):
        write(path.with_name(f"x.log{name}"), b"%d\n" % second, second)
    write(path, b"last\n", 9)
    reading.restart()
    reading.wait(20)
    between = b"".join(b"%d\n" % second for second, _ in enumerate(names, 3))
    assert reading.taken == b"one\n" + between + b"last\n"
    assert not [line for line in reading.told if "not read" in line]


@pytest.mark.parametrize("reused", ["x.log", "x.log.1"])
def test_the_inode_of_a_file_that_is_gone_may_be_used_again(path, reused):
    reading = read_one(path)
    path.unlink()
    write(path, b"two\n", 3)
    rotate(path)
    write(path, b"three\n", 4)
    assert reading.place is not None
    reading.place["inode"] = path.with_name(reused).stat().st_ino
    reading.restart()
    reading.wait(20)
    assert reading.taken == b"one\ntwo\nthree\n"


def test_another_file_that_got_the_inode_of_an_empty_one_is_not_read(path):
    reading = read_one(path)
    os.truncate(path, 0)
    reading.wait()
    path.rename(path.with_name("other"))  # as if it had been deleted and another file created
    write(path.with_name("other"), b"private\n", 3)
    reading.source.close()
    write(path, b"two\n", 4)
    reading.wait(20)
    assert reading.taken == b"one\ntwo\n"


def test_a_file_that_is_rotated_after_it_was_looked_for_is_not_read_again(path, monkeypatch):
    reading = read_one(path)
    write(path, b"two\n", 3)
    assert reading.place is not None
    reading.place["device"] += 1  # after a restart
    reading.restart()
    real = tail.open_file

    def rotated(*args):
        monkeypatch.setattr(tail, "open_file", real)
        rotate(path)
        write(path, b"", 4)
        return real(*args)

    monkeypatch.setattr(tail, "open_file", rotated)
    assert reading.wait(20) == b"two\n"


def test_a_backup_copy_that_has_the_old_inode_is_not_a_rotated_file(path):
    reading = read_one(path)
    path.rename(path.with_name("x.log~"))
    write(path, b"one\ntwo\n", 3)
    rotate(path)
    path.unlink(missing_ok=True)
    path.with_name("x.log.1").unlink()
    write(path, b"three\n", 4)
    rotate(path)
    write(path, b"four\n", 5)
    reading.restart()
    reading.wait(20)
    assert reading.taken == b"one\nthree\nfour\n"


def test_a_save_that_is_not_finished_is_no_rotation(path):
    write(path.with_name("x.log.1"), b"of long ago\n", 1)
    write(path, b"one\n", 2)
    reading = Reading(path)
    reading.wait(20)
    os.utime(path.with_name("x.log.1"), (5, 5))
    path.rename(path.with_name("x.log~"))
    write(path, b"on", 6)
    assert reading.poll() == b""
    write(path, b"e\ntwo\n", 7)
    path.with_name("x.log~").unlink()
    assert reading.wait(20) == b"two\n"


@pytest.mark.parametrize("late", [b"late\n", b""])
def test_a_file_that_was_written_to_after_the_next_began_is_not_read_again(path, late):
    reading = read_one(path)
    rotate(path)
    write(path, b"", 3)
    write(path.with_name("x.log.1"), late, 4)
    reading.wait(20)
    path.with_name("new").write_bytes(b"two\n")
    os.utime(path.with_name("new"), (5, 5))
    path.with_name("new").replace(path)
    reading.wait(20)
    assert reading.taken == b"one\n" + late + b"two\n"


def copy_and_truncate(path: Path, second: int) -> None:
    """Rotate x.log in the way used when its writer keeps the file open."""
    data = path.read_bytes()
    rotate(path)
    path.with_name("x.log.1").rename(path)
    write(path.with_name("x.log.1"), data, second)
    os.truncate(path, 0)
    os.utime(path, (second, second))


def test_a_file_may_be_truncated_twice_with_only_the_last_copy_kept(path):
    reading = read_one(path)
    copy_and_truncate(path, 3)
    write(path, b"two\n", 4)
    copy_and_truncate(path, 5)
    path.with_name("x.log.2").rename(path.with_name("x.log.2.gz"))
    write(path, b"three\n", 6)
    reading.wait(20)
    assert reading.taken == b"one\ntwo\nthree\n"


def test_an_empty_file_may_have_been_written_to_copied_and_truncated(path):
    reading = read_one(path)
    copy_and_truncate(path, 3)
    reading.wait()
    write(path, b"two\n", 4)
    copy_and_truncate(path, 5)
    reading.wait()
    write(path, b"three\n", 6)
    reading.wait(20)
    assert reading.taken == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("before", ["", "copied", "renamed"])
def test_an_empty_file_may_be_written_to_copied_and_truncated_unseen(path, before):
    """It was empty at the first poll, or since a rotated file was read to its end."""
    write(path, b"", 1)
    reading = Reading(path)
    reading.wait()
    expected = b"three\nfour\n"
    if before:
        write(path, b"one\n", 2)
        reading.wait()
        write(path, b"two\n", 3)
        copy_and_truncate(path, 4) if before == "copied" else rotate(path)
        write(path, b"", 5)
        reading.wait(20)
        expected = b"one\ntwo\n" + expected
    write(path, b"three\n", 6)
    copy_and_truncate(path, 7)
    reading.wait(20)
    write(path, b"four\n", 8)
    reading.wait(20)
    assert reading.taken == expected


def test_a_late_line_of_a_renamed_file_is_no_copy_of_the_empty_one(path):
    reading = read_one(path)
    rotate(path)
    write(path, b"", 3)
    reading.wait(20)
    write(path.with_name("x.log.1"), b"late\n", 4)
    write(path, b"two\n", 5)
    reading.wait(20)
    assert reading.taken == b"one\ntwo\n"
