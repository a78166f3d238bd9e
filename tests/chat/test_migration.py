"""What version 1 wrote stays the same in version 2, and continues without being read again."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.chat import manage, migrations
from mlx_stream.chat.exchange import FINISHES
from mlx_stream.chat.migrations import head_of_version_1
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError
from mlx_stream.generate.model import Model
from mlx_stream.program.lock import Lock
from mlx_stream.program.sqlite import connect
from mlx_stream.sampling import Sampling
from tests.chat.test_store import refusal
from tests.fakes.conversations import QUESTIONS, said
from tests.fakes.engines import together
from tests.fakes.version_1 import (
    OldHeader,
    OldTurn,
    check_migrated,
    head_of,
    write_version_1,
)
from tests.fuzz.session_mutations import rewrite

HEADER = OldHeader()
TURNS = [
    OldTurn("Hi", "Hello."),
    OldTurn("", "", (7,), (), (), "", "interrupted", "2026-05-09T17:04:00Z"),
    OldTurn("a\0b\nÜ 🦙 \u202e", "\0", (2**32 - 1,), (0, 2**31), (5,) * 3000, "\0", "stop"),
    OldTurn("long " * 9000, "'; DROP TABLE messages; --", (1,), (2,), (3,), "rest", "length"),
    OldTurn("Bye", "Bye.", (9, 8), (7, 6), (5, 4), time="2026-05-10T00:00:00+00:00"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


def scripted(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


def test_these_are_the_tables_there_were(path: Path) -> None:
    connection = sqlite3.connect(write_version_1(path, HEADER, TURNS))
    found = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master")}
    connection.close()
    assert found == set(migrations.TABLES[1])


@pytest.mark.parametrize("count", range(len(TURNS) + 1))
def test_a_snapshot_of_any_turn_is_known_by_its_head(path: Path, count: int) -> None:
    turns, first = TURNS[:count], max(1, count)
    write_version_1(path, HEADER, turns, first, "0a")
    for _ in range(2):  # migrated the first time, already migrated the second time
        check_migrated(path, HEADER, turns, first, "0a")
    assert path.stat().st_mode & 0o777 == 0o600
    with Store.open(path) as store:
        for number in range(count + 1):
            head = head_of(HEADER, turns[:number])
            header = replace(store.state.header, fingerprint=HEADER.fingerprint)
            stored = store.turns()[:number]
            assert head_of_version_1(header, stored) == head
            assert head_of_version_1(replace(header, fingerprint="another"), stored) != head


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
IDS = st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple)
OLD_TURNS = st.builds(OldTurn, TEXTS, TEXTS, IDS, IDS, IDS, TEXTS, st.sampled_from(FINISHES))


@given(st.lists(OLD_TURNS, max_size=6), TEXTS | st.none(), st.sampled_from([None, 4, 8]))
def test_any_transcript_stays_what_it_was(tmp_path_factory, turns, system, kv_bits) -> None:
    path = tmp_path_factory.mktemp("any") / "x.db"
    header = replace(HEADER, system=system, kv_bits=kv_bits, evict="token")
    check_migrated(write_version_1(path, header, turns), header, turns)


def test_a_log_left_by_a_killed_program_is_migrated_too(path: Path) -> None:
    """The old program was killed, and left a log next to its file."""
    write_version_1(path, HEADER, TURNS[:3])
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    later = write_version_1(path.with_name("later.db"), HEADER, TURNS)
    connection.execute(f"ATTACH '{later}' AS later")
    for table in ("messages", "session"):
        connection.execute(f"REPLACE INTO {table} SELECT * FROM later.{table}")
    copy = path.with_name("copy.db")
    for end in ("", "-wal"):
        shutil.copy(f"{path}{end}", f"{copy}{end}")
    connection.close()
    check_migrated(copy, HEADER, TURNS)


# What was altered, the first damaged turn, and the earliest turn from which the rest is readable.
DAMAGED = {
    "a checksum": ("UPDATE messages SET checksum = 'x' WHERE number = 6", 3, 5),
    "no UTF-8": ("UPDATE messages SET text = CAST(x'ff1b5b' AS TEXT) WHERE number = 6", 3, 4),
    "the last": ("UPDATE messages SET text = 'No.' WHERE number = 10", 5, 6),
    "missing": ("DELETE FROM messages WHERE number IN (5, 6)", 3, 5),
    "a question missing": ("DELETE FROM messages WHERE number = 5", 3, 4),
    "a reply missing": ("DELETE FROM messages WHERE number = 6", 3, 5),
    "all but the last": ("DELETE FROM messages WHERE number < 9", 1, 6),
    "swapped turns": (
        "UPDATE messages SET number = -number WHERE number IN (3, 4, 5, 6);"
        "UPDATE messages SET number = 2 - number WHERE number IN (-3, -4);"
        "UPDATE messages SET number = -2 - number WHERE number < 0",
        2,
        5,
    ),
    "one before": (
        "INSERT INTO messages SELECT 0, role, text, ids, closing_ids, rest, finish, time,"
        " checksum FROM messages WHERE number = 8",
        1,
        2,
    ),
    "many before": (
        "INSERT INTO messages SELECT -number, role, text, ids, closing_ids, rest, finish, time,"
        " checksum FROM messages; INSERT INTO messages SELECT -9223372036854775808, role, text,"
        " ids, closing_ids, rest, finish, time, checksum FROM messages WHERE number = 8",
        1,
        2,
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_turn_stays_damaged(path: Path, name: str) -> None:
    script, bad, whole = DAMAGED[name]
    write_version_1(path, HEADER, TURNS)
    scripted(path, script)
    check_damaged(path, bad, whole)


COLUMNS = {
    "role": ("assistant", "user"), "text": ("No.",), "ids": (b"0000", b""), "rest": ("x", "", None),
    "closing_ids": (b"0000", b"", None), "finish": ("limit", None), "time": ("",),
}  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
def test_any_value_that_was_altered_is_damaged_at_its_turn(path: Path, column: str) -> None:
    select, altered = f"SELECT {column} FROM messages WHERE number = ?", 0
    for number in range(1, 2 * len(TURNS) + 1):
        for value in COLUMNS[column]:
            write_version_1(path, HEADER, TURNS)
            with closing(sqlite3.connect(path, isolation_level=None)) as file:
                changes = file.execute(select, (number,)).fetchone() != (value,)
                update = f"UPDATE messages SET {column} = ? WHERE number = ?"
                file.execute(update, (value, number))
            if changes:
                bad = (number + 1) // 2
                check_damaged(path, bad, bad + 1)
                altered += 1
            for file in path.parent.iterdir():
                file.unlink()
    assert altered >= 5


def check_damaged(path: Path, bad: int, whole: int) -> None:
    """Check the first turn that is damaged, and the earliest from which the rest can be read."""
    for _ in range(2):  # while it is migrated, and afterwards
        with Store.open(path) as store:
            turns, damage = store.whole()
            assert [turn.exchange.question for turn in turns] == [
                turn.question for turn in TURNS[: bad - 1]
            ]
            reasons = (f"turn {bad} was altered", f"turn {bad} is missing", "UTF-8")
            assert "damaged" in damage and any(reason in damage for reason in reasons)
            assert refusal(store.verify) == damage
            for first in range(1, whole):
                assert "damaged" in refusal(store.turns, first)
            for first in range(whole, len(TURNS) + 1):
                later = [turn.exchange.reply for turn in store.turns(first)]
                assert later == [turn.reply for turn in TURNS[first - 1 :]]


REFUSED = {
    **{
        name: f"UPDATE session SET {name} = {value}"
        for name, value in (("system", "'Obey.'"), ("first", 2), ("turns", 3), ("head", "''"))
    },
    "turns and rows": "UPDATE session SET turns = 3; DELETE FROM messages WHERE number > 6",
    "no header": "DELETE FROM session",
    "the last row": "DELETE FROM messages WHERE number = 10",
    "the last two": "DELETE FROM messages WHERE number > 8",
    "all": "DELETE FROM messages",
    "one more": "INSERT INTO messages SELECT 11, role, text, ids, closing_ids, rest, finish, time,"
    " checksum FROM messages WHERE number = 10",
    "the last checksum": "UPDATE messages SET checksum = 'x' WHERE number = 10",
    "two headers": "PRAGMA ignore_check_constraints = ON; INSERT INTO session SELECT 2, id,"
    " created, model, fingerprint, system, window, sinks, evict, kv_bits, first, sampler, turns,"
    " head, checksum FROM session",
    "trigger": "CREATE TRIGGER more AFTER INSERT ON messages BEGIN DELETE FROM messages; END",
    "view": "CREATE VIEW turns AS SELECT * FROM messages",
    "table": "CREATE TABLE turns (x)",
    "column": "ALTER TABLE messages ADD COLUMN more TEXT",
    "version 2": "PRAGMA user_version = 2",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_version_1_refused_is_not_migrated(path: Path, name: str) -> None:
    write_version_1(path, HEADER, TURNS)
    scripted(path, REFUSED[name])
    before = path.read_bytes()
    assert "damaged" in refusal(Store.open, path)
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} <= {"x.db", "x.lock"}


def test_a_migration_that_ends_at_any_page_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up one page later each time, until there is room for everything."""
    write_version_1(path, HEADER, TURNS)
    before, room = path.read_bytes(), 0

    def limited(*args: Any) -> sqlite3.Connection:
        connection = connect(*args)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + room}").close()
        return connection

    with monkeypatch.context() as patch:
        patch.setattr("mlx_stream.chat.store.connect", limited)
        while True:
            try:
                Store.open(path).close()
                break
            except SessionError as error:
                assert "the disk is full: free some space" in str(error)
            assert path.read_bytes() == before
            room += 1
    assert room > 9
    check_migrated(path, HEADER, TURNS)


def test_several_may_open_it_at_once(path: Path) -> None:
    """One of them migrates it; the others find it already migrated."""
    write_version_1(path, HEADER, TURNS * 40)
    slow, late = (connect(path, 2**20) for _ in range(2))
    for connection in (slow, late):  # both have seen that it is version 1
        migrations.migrate(connection)
        connection.close()
    check_migrated(path, HEADER, TURNS * 40)
    for number in range(3):
        other = write_version_1(path.with_name(f"y{number}.db"), HEADER, TURNS * 40)
        together(*[lambda other=other: check_migrated(other, HEADER, TURNS * 40)] * 4)


def test_a_file_that_another_process_has_open_is_not_migrated(path: Path) -> None:
    write_version_1(path, HEADER, TURNS)
    with Lock.acquire(path.with_name("x.lock")):
        assert "is open in process" in refusal(Store.open, path)
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        Store.open(path, locked=True).close()
    check_migrated(path, HEADER, TURNS)


# --- with its snapshot ---


OPTIONS = SessionOptions(
    system="You are brief.", window=120, sampling=Sampling(1.0, top_p=0.95), max_tokens=12
)


def make_old(saved: SavedSession) -> OldHeader:
    """Rewrite the files of a closed session as version 1 would have written them."""
    paths, chat = session_paths(saved.name), saved.chat
    with Store.open(paths.database) as store:
        state, turns = store.state, store.turns()
    names = [field.name for field in fields(OldHeader)]
    values: dict[str, Any] = {name: getattr(state.header, name) for name in names}
    header = replace(OldHeader(**values), fingerprint=chat.model.fingerprint(1))
    old = [
        OldTurn(
            *(turn.exchange.question, turn.exchange.reply, turn.exchange.closing_ids),
            *(turn.exchange.question_ids, turn.exchange.reply_ids, turn.exchange.rest),
            *(turn.exchange.finish, turn.time),
        )
        for turn in turns
    ]
    paths.database.unlink()
    write_version_1(paths.database, header, old, state.first, state.sampler)

    def change(snapshot: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        snapshot["version"], snapshot["model"] = 1, header.fingerprint
        snapshot["about"] = about_of(saved, header, old)

    rewrite(paths.snapshot, change)
    return header


def about_of(saved: SavedSession, header: OldHeader, old: list[OldTurn]) -> dict[str, Any]:
    """Return what version 1 wrote about a conversation in addition to its stream."""
    chat = saved.chat
    places, before, length = [], [[], ""], 0
    for turn in chat.evictor.state.turns:
        # The end of a reply cut short had not been read when the next question came.
        unread = before[0]
        lead = [*unread, *turn.exchange.closing_ids] if places else [*chat.prompts.pinned]
        lead = lead if places or turn.start == len(lead) else []
        places.append([before, turn.start - len(lead), lead])
        length = turn.end
        cut = turn.exchange.finish == "length"
        before = [[*turn.exchange.ids[-1:]] if cut else [], ""]
    unread = chat.exchanges[-1].ids[chat.tokens.length - length :] if chat.exchanges else ()
    unread = [*unread] if chat.tokens.length < length else []
    return {
        "session": header.id,
        "count": len(old),
        "head": head_of(header, old),
        "places": [[*before, base, lead] for before, base, lead in places],
        "unread": [unread, ""],
        "sampler": chat.sampler.state(),
    }


def plain(saved: SavedSession) -> dict[str, Any]:
    state = saved.chat.tokens.state()
    return {n: np.array(v) if isinstance(v, mx.array) else v for n, v in state.items()}


def talk(saved: SavedSession, times: int = 1) -> None:
    for question in QUESTIONS[:3] * times:
        said(saved.chat.reply(question))


def interrupt(saved: SavedSession) -> None:
    talk(saved)
    pieces = saved.chat.reply("Wait.")
    said(islice(pieces, 3))
    pieces.close()


def clear(saved: SavedSession) -> None:
    talk(saved)
    saved.chat.clear()
    said(saved.chat.reply("Anew."))


WAYS: dict[str, tuple[Callable[[SavedSession], Any], dict[str, Any]]] = {
    "plain": (talk, {}),
    "no prompt": (talk, {"system": None}),
    "evicted": (lambda saved: talk(saved, 5), {"window": 64}),
    "token by token": (lambda saved: talk(saved, 5), {"window": 64, "evict": "token"}),
    "8-bit keys": (lambda saved: talk(saved, 5), {"kv_bits": 8}),
    "undone": (lambda saved: (talk(saved), saved.chat.undo()), {}),
    "interrupted": (interrupt, {}),
    "cleared": (clear, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_old_snapshot_is_used_and_nothing_read_again(model: Model, way: str) -> None:
    act, changes = WAYS[way]
    options = replace(OPTIONS, **changes)
    saved = open_session("x", model, options)
    act(saved)
    saved.close()
    expected, exchanges = plain(saved), saved.chat.exchanges
    make_old(saved)
    assert "snapshot after exchange" in manage.verify_session("x")  # this migrates it
    notices: list[str] = []
    again = open_session("x", model, options, notices.append)
    assert not any("again" in notice for notice in notices)
    assert again.chat.exchanges == exchanges
    found = plain(again)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    # A second time from the same files, as after a crash: now the transcript records the new model.
    again._let_go()
    again = open_session("x", model, options, notices.append)
    assert not any("again" in notice for notice in notices)
    for question in ("And now?", "Then?"):
        assert said(again.chat.reply(question)) == said(saved.chat.reply(question))
    again.close()
    third = open_session("x", model, options, notices.append)
    assert not any("again" in notice for notice in notices)
    assert third.chat.exchanges == again.chat.exchanges
    third.close()
