"""The list of saved conversations is read quickly, and says what opening each one would show."""

import os
import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from mlx_stream.chat import store as store_module
from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.manage import rename_session
from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.schema import SessionHeader
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store, first_question
from mlx_stream.chat.summaries import SummaryReader, last_time, latest_session, session_summaries
from mlx_stream.errors import SessionError
from mlx_stream.program.lock import Lock
from mlx_stream.program.paths import data_folder

EXCHANGE = Exchange("Who?", "I.", (), (1, 2), (3,), "", "stop")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "a home, with % and ü"
    monkeypatch.setenv("MLX_STREAM_HOME", str(folder))
    return folder


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock with one that advances a second whenever it is read."""
    seconds = iter(range(10, 60))
    monkeypatch.setattr(store_module, "now", lambda: f"2026-11-30T12:00:{next(seconds)}Z")


def write(name, turns=2, asked=False, first=1):
    header = SessionHeader.new(
        model="m", fingerprint="2:f", system=None, window=64, sinks=4, evict="turn"
    )
    header = replace(header, created="2026-11-30T12:00:00Z")
    with Store.create(session_paths(name).database, header, "00") as store:
        for number in range(1, turns + 1):
            kind = ChangeKind.ASK if asked and number == turns else ChangeKind.ANSWER
            change = Change(kind, number, {number: EXCHANGE}, min(first, number), "00", None, 64)
            store.write(change)


def change(name, *statements):
    with closing(sqlite3.connect(session_paths(name).database, isolation_level=None)) as found:
        for statement in statements:
            found.execute(statement)
        found.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def slowly(name):
    """Return what a summary should contain, found by opening the session."""
    with Store.open(session_paths(name).database) as store:
        state = store.state
        title = first_question(store)
        return (
            state.count,
            len(store.exchanges(store.state.first)),
            last_time(store),
            state.header,
            title,
        )


def quickly(name):
    (found,) = (one for one in session_summaries() if one.name == name)
    return found.exchanges, found.attended, found.used, found.header, found.title


@pytest.mark.usefixtures("clock")
def test_what_is_read_quickly_is_what_opening_reads(monkeypatch):
    write("empty", turns=0)
    write("whole", turns=5)
    write("asked", turns=3, asked=True)
    write("evicted", turns=5, first=4)
    names = ("empty", "whole", "asked", "evicted")
    wanted = {name: slowly(name) for name in names}
    monkeypatch.setattr(Store, "open", lambda *_: pytest.fail("it was opened"))
    assert {name: quickly(name) for name in names} == wanted
    assert latest_session() == "evicted"
    assert not [path for path in session_paths("x").database.parent.iterdir() if "-" in path.name]


@pytest.mark.usefixtures("clock")
def test_an_open_session_with_a_log_is_read_whole():
    write("open", turns=1)
    write("later", turns=1)
    with Store.open(session_paths("open").database) as store:
        store.write(Change(ChangeKind.ANSWER, 2, {2: EXCHANGE}, 1, "00", None, 64))
        assert session_paths("open").database.with_name("open.db-wal").stat().st_size
        assert quickly("open") == slowly("open") and quickly("open")[0] == 2
        assert latest_session() == "open"


DAMAGES = {
    "altered": "UPDATE session SET window = 65",
    "cut short": "DELETE FROM turns WHERE number = 2",
    "other tables": "CREATE TABLE more (x)",
    "forged": "DROP TABLE turns; CREATE VIEW turns AS WITH RECURSIVE n(x) AS "
    "(SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS number, 'answered' AS state, '' AS time, "
    "'' AS checksum FROM n",
    "no text": "UPDATE session SET model = CAST(x'ff' AS TEXT)",
    "no time": "UPDATE turns SET time = 'soon'; UPDATE session SET created = 'soon'",
    "newer": "PRAGMA user_version = 3; CREATE TABLE more (x)",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_session_is_listed_as_such(damage):
    write("good", turns=1)
    write("bad")
    change("bad", *DAMAGES[damage].split("; "))
    os.utime(session_paths("bad").database, (2**31, 2**31))
    with pytest.raises(SessionError) as caught:
        slowly("bad")
    (bad,) = (one for one in session_summaries() if one.name == "bad")
    assert (bad.header, bad.damage) == (None, str(caught.value))
    when_is_known = damage in ("altered", "cut short", "no text")
    assert latest_session() == ("bad" if when_is_known else "good")  # `chat` says what is wrong


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("seed", range(3))
def test_the_session_that_was_used_last_whatever_the_dates_of_the_files(seed):
    luck = random.Random(seed)
    names = [f"s{number}" for number in range(6)]
    luck.shuffle(names)
    for name in names:
        write(name, turns=luck.randint(1, 3))
    for name in names:
        second = luck.choice((1, 2**31, 2**33))
        os.utime(session_paths(name).database, (second, second))
    assert latest_session() == names[-1]
    assert [one.name for one in session_summaries()] == names[::-1]


def test_bytes_on_disk_are_of_all_files_of_a_session():
    write("a")
    write("ab")
    paths = session_paths("a")
    paths.snapshot.parent.mkdir(parents=True)
    paths.snapshot.write_bytes(b"x" * 1_000)
    paths.database.with_name(".a.db.new").write_bytes(b"x" * 100)
    (a,) = (one for one in session_summaries() if one.name == "a")
    assert a.bytes == paths.database.stat().st_size + 1_100


def test_three_thousand_sessions_are_read_without_opening_one(monkeypatch):
    write("s0000")
    one = session_paths("s0000").database
    for number in range(1, 3_000):
        shutil.copyfile(one, session_paths(f"s{number:04}").database)
    monkeypatch.setattr(Store, "open", lambda *_: pytest.fail("it was opened"))
    assert len(session_summaries()) == 3_000 and latest_session()
    with SummaryReader.open(data_folder()) as reader:
        assert len(reader.files) == 3_000


def test_a_renamed_conversation_is_the_same_under_its_new_name():
    write("old")
    write("taken")
    paths = session_paths("old")
    paths.snapshot.parent.mkdir(parents=True, exist_ok=True)
    paths.snapshot.write_bytes(b"state")
    before = slowly("old")
    rename_session("old", "new")
    assert slowly("new") == before and quickly("new")[-1] == "Who?"
    assert session_paths("new").snapshot.read_bytes() == b"state" and not paths.lock.exists()
    with pytest.raises(SessionError, match="does not exist"):
        rename_session("old", "other")
    with pytest.raises(SessionError, match="already exists"):
        rename_session("new", "taken")
    with pytest.raises(SessionError, match="is not a valid session name"):
        rename_session("new", "../new")
    with Lock.acquire(session_paths("new").lock), pytest.raises(SessionError, match="is open"):
        rename_session("new", "other")
    assert slowly("new") == before
