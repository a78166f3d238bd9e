"""Full disks and altered files cannot corrupt a saved conversation unnoticed."""

import os
import random
import resource
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_stream.chat.schema import digest, pack_ids, turn_checksum
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError
from mlx_stream.program.sqlite import files
from tests.chat.test_store import (
    ANSWER,
    HEADER,
    ODD,
    STAND,
    UNDO,
    changed,
    kept,
    refusal,
    standing,
)
from tests.chat.test_store import said as exchanges_of

FLIPS = 300


# --- full disks ---

LONG = replace(ODD[0], reply="word " * 50_000)


def unharmed_by(store: Store, fill: Callable[[], None], empty: Callable[[], None]) -> list[str]:
    """Write to a full disk, check that nothing changed, and write again once there is room."""
    lines = []
    longer = replace(HEADER, system=LONG.reply)
    for method, value in (
        (store.write, changed(ANSWER, 5, LONG)),
        (store.write, changed(ANSWER, 4, LONG)),
        (store.write, changed(STAND, 4, LONG)),
        (store.write, changed(STAND, 4, header=longer)),
        (store.update, longer),
    ):
        fill()
        try:
            lines.append(refusal(method, value))
            assert exchanges_of(store) == ODD and standing(store) == (HEADER, 4, "04", 4)
            with Store.open(store.path) as again:
                again.verify()
            # A short text still fits, and taking something back still works.
            store.write(changed(STAND, 4, None, 4, "05"))
            store.write(changed(UNDO, 4, None, 3, "03"))
            assert exchanges_of(store) == ODD[:3]
        finally:
            empty()
        store.write(changed(ANSWER, 4, ODD[3], 4, "04"))
    store.write(changed(ANSWER, 5, LONG))
    assert exchanges_of(store) == [*ODD, LONG]
    store.verify()
    with Store.open(store.path) as again:
        assert exchanges_of(again) == [*ODD, LONG]
    return lines


@pytest.mark.parametrize("where", ["disk", "file"])
def test_a_full_disk(tmp_path: Path, where: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store.open(kept(tmp_path / "x.db", ODD)) as store:
        (pages,) = store.connection.execute("PRAGMA page_count").fetchone()
        most = store.path.stat().st_size + 40_000

        def limit(pages: int, size: int) -> None:
            if where == "disk":
                store.connection.execute(f"PRAGMA max_page_count = {pages}").close()
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

        fill, empty = (pages + 1, most), (2**30, before[0])
        lines = unharmed_by(store, lambda: limit(*fill), lambda: limit(*empty))
        store.connection.execute("PRAGMA query_only = ON")
        line = refusal(store.write, changed(ANSWER, 4, ODD[0]))
        assert "cannot be written: check the permissions" in line
    full = "the disk is full: " if where == "disk" else "the disk is full, or cannot be read or"
    assert all(line.startswith(f"session 'x': {full}") for line in lines)


# --- altered files ---


def held(path: Path) -> str:
    """Return why a session is refused, or check that it holds what was written and can be used."""
    try:
        with Store.open(path) as store:
            assert exchanges_of(store) == ODD
            assert standing(store) == (HEADER, 4, "04", 4)
            assert exchanges_of(store, 3) == ODD[2:]
            store.write(changed(ANSWER, 5, LONG))
            assert exchanges_of(store) == [*ODD, LONG]
            store.write(changed(UNDO, 5, None, 4, "04"))
            assert exchanges_of(store) == ODD
            store.verify()
    except SessionError as error:
        line = str(error)
        assert "\n" not in line and line.isprintable() and len(line) < 500
        return line
    return ""


def test_bytes_that_changed(tmp_path: Path) -> None:
    whole, luck = kept(tmp_path / "x.db", ODD).read_bytes(), random.Random(3)
    path, refused = tmp_path / "y.db", 0
    for number in range(FLIPS):
        data = bytearray(whole)
        for _ in range(1 + number % 3):
            # Every other file is altered only in the parts that hold its layout.
            at = luck.randrange(len(data) if number % 2 else 100)
            if number % 4 == 2:
                at = 4096 * luck.randrange(len(data) // 4096) + luck.randrange(16)
            data[at] ^= 1 << luck.randrange(8)
        if number % 10 == 5:
            del data[luck.randrange(len(data)) :]
        elif number % 10 == 7:
            a, b = (4096 * luck.randrange(len(data) // 4096) for _ in range(2))
            data[a : a + 4096] = luck.choice([data[b : b + 4096], luck.randbytes(4096)])
        for old in files(path):
            old.unlink(missing_ok=True)
        path.write_bytes(data)
        refused += bool(held(path))
    assert FLIPS / 3 < refused < FLIPS


MORE = "state, finish, time, closing_ids, settled_ids, checksum FROM turns WHERE number"
WORDS = "place, role, text, thinking, calls, ids, rest FROM messages WHERE turn"
FORGED = {
    "text": "UPDATE messages SET text = 'No.' WHERE (turn, place) = (1, 1)",
    "a message moved": "UPDATE messages SET turn = 5 WHERE (turn, place) = (4, 1)",
    "no message": "DELETE FROM messages WHERE (turn, place) = (1, 1)",
    "no question": "DELETE FROM messages WHERE (turn, place) = (4, 0)",
    "one more message": f"INSERT INTO messages SELECT 2, 2 + {WORDS} = 2 AND place = 0",
    "one message before": f"INSERT INTO messages SELECT 2, -1 - {WORDS} = 2 AND place = 0",
    "many more messages": "WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n"
    " WHERE i < 30000) INSERT INTO messages SELECT 2, i, 'user', 'x', NULL, NULL, x'', NULL FROM n",
    "messages of no turn": f"INSERT INTO messages SELECT 0, {WORDS} = 2",
    "no answer": "UPDATE turns SET state = 'asked', finish = NULL WHERE number = 4;"
    " DELETE FROM messages WHERE (turn, place) = (4, 1)",
    "forgotten": "UPDATE turns SET state = 'forgotten', finish = NULL WHERE number = 2;"
    " DELETE FROM messages WHERE turn = 2",
    "the last row": "DELETE FROM turns WHERE number = 4",
    "the last turn": "DELETE FROM turns WHERE number = 4; DELETE FROM messages WHERE turn = 4",
    "the first": "DELETE FROM turns WHERE number = 1; DELETE FROM messages WHERE turn = 1",
    "one between": "DELETE FROM turns WHERE number = 3",
    "all": "DELETE FROM turns; DELETE FROM messages",
    "swapped": "UPDATE turns SET number = -number WHERE number IN (1, 3);"
    "UPDATE turns SET number = 4 + number WHERE number < 0",
    "swapped whole": "UPDATE turns SET number = -number WHERE number IN (1, 3);"
    "UPDATE turns SET number = 4 + number WHERE number < 0;"
    "UPDATE messages SET turn = -turn WHERE turn IN (1, 3);"
    "UPDATE messages SET turn = 4 + turn WHERE turn < 0",
    "said in another turn": "UPDATE messages SET turn = -turn WHERE turn IN (1, 3);"
    "UPDATE messages SET turn = 4 + turn WHERE turn < 0",
    "one more": f"INSERT INTO turns SELECT 5, {MORE} = 4;"
    f" INSERT INTO messages SELECT 5, {WORDS} = 4",
    "one before": f"INSERT INTO turns SELECT 0, {MORE} = 4",
    "far before": f"INSERT INTO turns SELECT -9223372036854775808, {MORE} = 4",
    "moved": "UPDATE turns SET number = number + 1 WHERE number = 4",
    "turns and rows": "UPDATE session SET count = 3; DELETE FROM turns WHERE number > 3;"
    " DELETE FROM messages WHERE turn > 3",
    "no header": "DELETE FROM session",
    "two headers": "PRAGMA ignore_check_constraints = ON; INSERT INTO session SELECT 2, id,"
    " created, model, fingerprint, system, window, sinks, evict, kv_bits, first, sampler,"
    " recall_from, count, last, checksum FROM session",
    "view": "CREATE VIEW more AS SELECT * FROM messages",
    "a view instead": "ALTER TABLE messages RENAME TO old;"
    " CREATE VIEW messages AS SELECT * FROM old",
    "trigger": "CREATE TRIGGER more AFTER INSERT ON messages BEGIN DELETE FROM messages; END",
    "table": "CREATE TABLE more (x)",
    "index": "CREATE INDEX more ON messages (text)",
    "column": "ALTER TABLE messages ADD COLUMN more TEXT",
    "no table": "DROP TABLE messages",
    "a table of before": "DROP TABLE turns",
    "statistics": "ANALYZE",
    "endless": "PRAGMA writable_schema = ON; INSERT INTO sqlite_master"
    " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
    " SELECT 'view', 'v' || i, 'v' || i, 0, 'CREATE VIEW v' || i || ' AS SELECT 1' FROM n",
    "not ours": "PRAGMA application_id = 0",
    "version 0": "PRAGMA user_version = 0",
    "version -1": "PRAGMA user_version = -1",
    "version 1": "PRAGMA user_version = 1",
    "version 3": "PRAGMA user_version = 3",
    "no UTF-8": "UPDATE messages SET text = CAST(x'ff1b5b' AS TEXT) WHERE (turn, place) = (1, 1)",
}


KEYS = {"session": "row", "turns": "number", "messages": "turn, place"}


def test_any_value_that_was_altered_is_found(tmp_path: Path) -> None:
    altered = 0
    with closing(sqlite3.connect(kept(tmp_path / "x.db", ODD))) as whole:
        for table, key in KEYS.items():
            columns = whole.execute(f"PRAGMA table_info({table})").fetchall()
            for row in whole.execute(f"SELECT * FROM {table}").fetchall():
                same = " AND ".join(f"{c[1]} = {row[c[0]]}" for c in columns if c[1] in key)
                for (_, name, kind, needed, *_), old in zip(columns, row, strict=True):
                    for new in others(old, kind, needed):
                        script = f"UPDATE {table} SET {name} = ? WHERE {same}"
                        altered += altered_is_found(tmp_path / "y.db", whole, script, new)
    assert altered > 100


def others(old: Any, kind: str, needed: int) -> list[Any]:
    """Return values that may replace a value in a column of type `kind`."""
    found: list[Any] = [] if needed else [None]
    if kind == "INTEGER":
        found += [(old or 0) + 1, -1]
    elif kind == "TEXT":
        found += ["", f"{old}x"]
    else:
        found += [b"", (old or b"") + b"\0" * 4]
    return [new for new in found if new != old]


def altered_is_found(path: Path, whole: sqlite3.Connection, script: str, new: Any) -> bool:
    """Change a value; check that this is found, and return whether the tables allow the change."""
    with closing(sqlite3.connect(path)) as file:
        whole.backup(file)
        try:
            file.execute(script, (new,))
        except sqlite3.IntegrityError:
            return False
        file.commit()
    with pytest.raises(SessionError, match="damaged"), Store.open(path) as store:
        store.verify()
    return True


@pytest.mark.parametrize("script", FORGED.values(), ids=FORGED.keys())
def test_rows_that_were_altered(tmp_path: Path, script: str) -> None:
    path = kept(tmp_path / "x.db", ODD)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    line = held(path)
    assert line.startswith("session 'x': ") and ("damaged" in line or "newer" in line)
    assert ("interrupted" in line) == script.endswith("AS SELECT 1' FROM n")


def test_rows_that_are_altered_while_it_is_open(tmp_path: Path) -> None:
    path = kept(tmp_path / "x.db", ODD)
    with Store.open(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute(FORGED["text"])
        for read in (store.turns, store.exchanges, store.verify):
            assert "turn 1 was altered" in refusal(read)
        assert exchanges_of(store, 2) == ODD[1:]
        file.execute(FORGED["trigger"])
        assert "conversation's tables" in refusal(store.verify)


def test_rows_of_another_session(tmp_path: Path) -> None:
    other = kept(tmp_path / "y.db", [*ODD[:3], LONG], replace(HEADER, id="2" * 32))
    for turns in ("= 4", "= 1", "> 0"):
        for tables in ({"turns": "number", "messages": "turn"}, {"messages": "turn"}):
            path = kept(tmp_path / "x.db", ODD)
            with closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute(f"ATTACH '{other}' AS other")
                for table, column in tables.items():
                    rows = f"{table} WHERE {column} {turns}"
                    connection.execute(f"DELETE FROM {rows}")
                    connection.execute(f"INSERT INTO {table} SELECT * FROM other.{rows}")
            if turns == "= 1" and len(tables) == 1:  # the same words were said there, too
                assert held(path) == ""
            else:
                assert "damaged" in held(path)
            path.unlink()


def test_messages_after_the_last_turn_are_not_taken_for_the_next_one(tmp_path: Path) -> None:
    connection = sqlite3.connect(kept(tmp_path / "x.db", ODD), isolation_level=None)
    for turn in (5, 9):
        connection.execute(f"INSERT INTO messages SELECT {turn}, 2 + {WORDS} = 2")
    with Store.open(tmp_path / "x.db") as store:
        assert "messages do not belong to any turn" in refusal(store.verify)
        store.write(changed(ANSWER, 5, LONG))
        assert exchanges_of(store) == [*ODD, LONG]
        store.verify()
    connection.close()


def seal(connection: sqlite3.Connection, number: int) -> None:
    """Give a turn the checksum of its contents, and give the session its last turn's checksum."""
    ((*turn, _),) = connection.execute("SELECT * FROM turns WHERE number = ?", (number,)).fetchall()
    said = "SELECT * FROM messages WHERE turn = ? ORDER BY place"
    messages = connection.execute(said, (number,)).fetchmany(3)
    checksum = turn_checksum(HEADER.id, tuple(turn), messages)
    connection.execute("UPDATE turns SET checksum = ? WHERE number = ?", (checksum, number))
    ((*values, count, last, _),) = connection.execute("SELECT * FROM session").fetchall()
    last = checksum if number == count else last
    sealed = digest("session", *values, count, last)
    connection.execute("UPDATE session SET last = ?, checksum = ?", (last, sealed))


UNLIKE = {
    "role": "UPDATE messages SET role = 'system' WHERE (turn, place) = ({n}, 1)",
    "roles": "UPDATE messages SET role = 'user' WHERE turn = {n}",
    "state": "UPDATE turns SET state = 'asked' WHERE number = {n}",
    "no state": "UPDATE turns SET state = 'x' WHERE number = {n}",
    "a finish that is none": "UPDATE turns SET finish = 'never' WHERE number = {n}",
    "no finish": "UPDATE turns SET finish = NULL WHERE number = {n}",
    "time": "UPDATE turns SET time = 'now' WHERE number = {n}",
    "no time": "UPDATE turns SET time = '2026-02-31T00:00:00Z' WHERE number = {n}",
    "ids": "UPDATE messages SET ids = x'616263' WHERE (turn, place) = ({n}, 1)",
    "closing": "UPDATE turns SET closing_ids = x'61' WHERE number = {n}",
    "settled": "UPDATE turns SET settled_ids = x'61' WHERE number = {n}",
    "no rest": "UPDATE messages SET rest = NULL WHERE (turn, place) = ({n}, 1)",
    "no answer": "DELETE FROM messages WHERE (turn, place) = ({n}, 1)",
    "no question": "DELETE FROM messages WHERE (turn, place) = ({n}, 0)",
    "no message": "DELETE FROM messages WHERE turn = {n}",
    "places": "UPDATE messages SET place = place + 2 WHERE turn = {n}",
    "one more": "INSERT INTO messages SELECT turn, 2, 'user', text, thinking, calls, ids, rest"
    " FROM messages WHERE (turn, place) = ({n}, 0)",
    "half forgotten": "UPDATE turns SET state = 'forgotten', finish = NULL WHERE number = {n}",
    "half asked": "UPDATE turns SET state = 'asked', finish = NULL WHERE number = {n}",
}


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("script", UNLIKE.values(), ids=UNLIKE.keys())
def test_rows_that_are_no_turn_though_their_checksums_agree(
    tmp_path: Path, script: str, number: int
) -> None:
    path = kept(tmp_path / "x.db", ODD)
    connection = sqlite3.connect(path, isolation_level=None)
    seal(connection, number)
    assert held(path) == "", "what is not altered is sealed as it was"
    connection.execute(script.format(n=number))
    seal(connection, number)
    connection.close()
    with Store.open(path) as store:
        for read in (store.turns, store.exchanges, store.verify):
            assert "damaged" in refusal(read)
        turns, damage = store.whole()
        assert [turn.exchange for turn in turns] == ODD[: number - 1] and "damaged" in damage


@pytest.mark.parametrize(
    "change",
    ["first = 0", "first = 6", "recall_from = 0", "recall_from = 6", "count = -1", "window = 0"],
)
def test_a_state_that_cannot_be_though_its_checksum_agrees(tmp_path: Path, change: str) -> None:
    path = kept(tmp_path / "x.db", ODD)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"UPDATE session SET {change}")
        seal(connection, 3)
    assert "damaged" in held(path)


def test_files_that_are_no_session(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    for data in (b"", b"x", b"SQLite format 3\0", b"\0" * 8192, pack_ids(tuple(range(5000)))):
        path.write_bytes(data)
        assert "damaged" in held(path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in held(path)
    path.unlink()
    shutil.copy(sys.executable, path)
    assert "damaged" in held(path)
