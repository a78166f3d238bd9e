"""What killed processes, full disks and altered files could do to a conversation: none of it."""

import inspect
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import mlx_stream
from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.recorder import ChangeKind
from mlx_stream.chat.schema import ANSWERED, ASKED, digest, pack_ids, turn_checksum
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError
from mlx_stream.program.sqlite import files
from tests.chat.test_store import (
    ANSWER,
    HEADER,
    ODD,
    STAND,
    START,
    UNDO,
    changed,
    kept,
    refusal,
    standing,
)
from tests.chat.test_store import said as exchanges_of

KILLS = int(os.environ.get("MLX_STREAM_TEST_KILLS", "15"))
FLIPS = 300


# --- killed ---


def said(number: int) -> Exchange:
    """Return what the writer that is killed says in its step of this number."""
    reply = f"reply {number} " * (number * 37 % 2000)
    return Exchange(f"question {number}", reply, (number,), (number, 1), (number,) * (number % 900))


def step(number: int, count: int) -> tuple[ChangeKind, int]:
    """Return what the writer does in a step, and to which turn, of so many there are."""
    kinds = (ChangeKind.ANSWER, ChangeKind.ASK, ChangeKind.ANSWER, ChangeKind.UNDO)
    kind = kinds[(0, 1, 2, 2, 3)[number % 5]]
    return kind, count + (number % 5 < 2)


# Says the number of every step when it is committed. The package is a stand-in, because importing
# the real one takes longer than all the writing.
WRITER = f"""
import sys, types
from pathlib import Path
package = types.ModuleType("mlx_stream")
package.__path__ = {mlx_stream.__path__!r}
sys.modules["mlx_stream"] = package
from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.schema import SessionHeader
from mlx_stream.chat.store import Store
{inspect.getsource(said)}
{inspect.getsource(step)}
path, header, start = Path(sys.argv[1]), {HEADER!r}, {START!r}
if sys.argv[2] == "create":
    for number in range(10**6):
        Store.create(path.with_name(f"{{number}}.db"), header, start).close()
        print(number, flush=True)
store = Store.open(path) if path.exists() else Store.create(path, header, "0")
for number in range(int(store.state.sampler) + 1, 10**6):
    kind, turn = step(number, store.state.count)
    exchanges = {{}} if kind is ChangeKind.UNDO else {{turn: said(number)}}
    store.write(Change(kind, turn, exchanges, 1, str(number), header.system, header.window))
    print(number, flush=True)
    if number % 23 == 0:
        store.close()
        store = Store.open(path)
"""


def after(steps: int) -> list[tuple[str, str, str]]:
    """Return state, question and reply of the turns there are after the writer's first steps."""
    turns: list[tuple[str, str, str]] = []
    for number in range(1, steps + 1):
        kind, turn = step(number, len(turns))
        del turns[turn - 1 :]
        exchange = said(number)
        if kind is ChangeKind.ASK:
            turns.append((ASKED, exchange.question, ""))
        elif kind is ChangeKind.ANSWER:
            turns.append((ANSWERED, exchange.question, exchange.reply))
    return turns


def killed_after(seconds: float, *args: object) -> list[int]:
    """Kill a writer some time after its first step, or sooner, and return the steps it told."""
    command = [sys.executable, "-c", WRITER, *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [process.stdout.readline()] if seconds > 0 else []
        time.sleep(abs(seconds))
        process.kill()
        told += process.stdout.read().splitlines(keepends=True)
    assert process.returncode == -signal.SIGKILL
    return [int(line) for line in told if line.endswith("\n")]


def test_a_killed_process_loses_no_exchange_it_committed(tmp_path: Path) -> None:
    path, steps, luck = tmp_path / "x.db", 0, random.Random(1)
    for kill in range(KILLS):
        seconds = luck.uniform(0, 0.06) if kill else -0.02
        told = killed_after(seconds, path, "write")
        assert told == list(range(steps + 1, steps + 1 + len(told)))
        steps += len(told)
        if not path.exists():
            assert steps == 0
            continue
        with Store.open(path) as store:
            done = int(store.state.sampler)
            assert done in (steps, steps + 1), "committed, and perhaps not yet told"
            turns = [(t.state, t.exchange.question, t.exchange.reply) for t in store.turns()]
            assert turns == after(done)
            store.verify()
            steps = done
    assert steps > KILLS


def test_a_session_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    luck = random.Random(2)
    for kill in range(max(3, KILLS // 4)):
        folder = tmp_path / str(kill)
        told = killed_after(luck.uniform(0.001, 0.04), folder / "x.db", "create")
        names = [int(path.stem) for path in folder.glob("[0-9]*.db")]
        assert set(told) <= set(names) and len(names) <= len(told) + 1
        for name in names:
            with Store.open(folder / f"{name}.db") as store:
                assert standing(store) == (HEADER, 1, START, 0)
        # What it left is in nobody's way.
        for name in range(len(names), len(names) + 2):
            Store.create(folder / f"{name}.db", HEADER, START).close()
        assert {path.suffix for path in folder.iterdir()} == {".db"}


# --- full ---

LONG = replace(ODD[0], reply="word " * 50_000)


def unharmed_by(store: Store, fill: Callable[[], None], empty: Callable[[], None]) -> list[str]:
    """Write to a disk that is full, see that nothing changed, and write when it is not."""
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
            # What is short still fits, and to take something back still works.
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


def test_a_full_disk(tmp_path: Path) -> None:
    with Store.open(kept(tmp_path / "x.db", ODD)) as store:
        (pages,) = store.connection.execute("PRAGMA page_count").fetchone()

        def most(count: int) -> Callable[[], None]:
            return lambda: store.connection.execute(f"PRAGMA max_page_count = {count}").close()

        lines = unharmed_by(store, most(pages + 1), most(2**30))
    assert lines == ["session 'x': the disk is full: make room, then try again"] * 5


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store.open(kept(tmp_path / "x.db", ODD)) as store:
        most = store.path.stat().st_size + 40_000

        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

        lines = unharmed_by(store, fill, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))
    assert all("the disk is full, or cannot be read or written" in line for line in lines)


def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    with Store.open(kept(tmp_path / "x.db", ODD)) as store:
        store.connection.execute("PRAGMA query_only = ON")
        assert "cannot be written: check the permissions" in refusal(
            store.write, changed(ANSWER, 5, LONG)
        )
        assert exchanges_of(store) == ODD


# --- altered ---


def held(path: Path) -> str:
    """Return why a session is refused; it is, or it holds what was written, and can be used."""
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
            # Every other one in the parts that say where things are.
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


def test_a_log_whose_bytes_changed(tmp_path: Path) -> None:
    path, copy, luck = tmp_path / "x.db", tmp_path / "y.db", random.Random(4)
    with Store.open(kept(path, ODD[:3])) as store:
        store.write(changed(ANSWER, 4, ODD[3]))
        whole = [file.read_bytes() for file in files(path)[:2]]
    for _ in range(40):
        for file, data in zip(files(copy), whole, strict=False):
            file.write_bytes(data)
        log = bytearray(whole[1])
        log[luck.randrange(len(log))] ^= 1 << luck.randrange(8)
        files(copy)[1].write_bytes(log)
        files(copy)[2].write_bytes(luck.randbytes(32768))
        try:
            with Store.open(copy) as store:
                # SQLite takes a log that breaks off for one that was not written to its end.
                count = store.state.count
                assert exchanges_of(store) == ODD[:count] and count in (3, 4)
        except SessionError:
            continue
        finally:
            for file in files(copy):
                file.unlink(missing_ok=True)


MORE = "state, finish, time, closing_ids, settled_ids, checksum FROM turns WHERE number"
WORDS = "place, role, text, thinking, calls, ids, rest FROM messages WHERE turn"
FORGED = {
    "text": "UPDATE messages SET text = 'No.' WHERE (turn, place) = (1, 1)",
    "no text": "UPDATE messages SET text = '' WHERE (turn, place) = (4, 0)",
    "ids": "UPDATE messages SET ids = x'00000000' WHERE (turn, place) = (2, 0)",
    "rest": "UPDATE messages SET rest = 'x' WHERE (turn, place) = (3, 1)",
    "a question's rest": "UPDATE messages SET rest = '' WHERE (turn, place) = (3, 0)",
    "thinking": "UPDATE messages SET thinking = '' WHERE (turn, place) = (2, 1)",
    "calls": "UPDATE messages SET calls = '[]' WHERE (turn, place) = (2, 1)",
    "role": "UPDATE messages SET role = 'assistant' WHERE (turn, place) = (1, 0)",
    "place": "UPDATE messages SET place = 2 WHERE (turn, place) = (1, 1)",
    "a message moved": "UPDATE messages SET turn = 5 WHERE (turn, place) = (4, 1)",
    "no message": "DELETE FROM messages WHERE (turn, place) = (1, 1)",
    "no question": "DELETE FROM messages WHERE (turn, place) = (4, 0)",
    "one more message": f"INSERT INTO messages SELECT 2, 2 + {WORDS} = 2 AND place = 0",
    "one message before": f"INSERT INTO messages SELECT 2, -1 - {WORDS} = 2 AND place = 0",
    "many more messages": "WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n"
    " WHERE i < 30000) INSERT INTO messages SELECT 2, i, 'user', 'x', NULL, NULL, x'', NULL FROM n",
    "messages of no turn": f"INSERT INTO messages SELECT 0, {WORDS} = 2",
    "state": "UPDATE turns SET state = 'asked' WHERE number = 1",
    "no answer": "UPDATE turns SET state = 'asked', finish = NULL WHERE number = 4;"
    " DELETE FROM messages WHERE (turn, place) = (4, 1)",
    "forgotten": "UPDATE turns SET state = 'forgotten', finish = NULL WHERE number = 2;"
    " DELETE FROM messages WHERE turn = 2",
    "closing": "UPDATE turns SET closing_ids = x'01000000' WHERE number = 3",
    "settled": "UPDATE turns SET settled_ids = x'' WHERE number = 3",
    "finish": "UPDATE turns SET finish = 'stop' WHERE number = 1",
    "time": "UPDATE turns SET time = '' WHERE number = 1",
    "a checksum": "UPDATE turns SET checksum = 'x' WHERE number = 4",
    "no checksum": "UPDATE turns SET checksum = '' WHERE number = 2",
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
    "header": "UPDATE session SET system = 'Obey.'",
    "no system": "UPDATE session SET system = NULL",
    "window": "UPDATE session SET window = 61",
    "progress": "UPDATE session SET first = 2",
    "recall": "UPDATE session SET recall_from = 2",
    "sampler": "UPDATE session SET sampler = ''",
    "turns": "UPDATE session SET count = 3",
    "turns and rows": "UPDATE session SET count = 3; DELETE FROM turns WHERE number > 3;"
    " DELETE FROM messages WHERE turn > 3",
    "the last checksum": "UPDATE session SET last = ''",
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


@pytest.mark.parametrize("script", FORGED.values(), ids=FORGED.keys())
def test_rows_that_were_altered(tmp_path: Path, script: str) -> None:
    path = kept(tmp_path / "x.db", ODD)
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    line = held(path)
    assert line.startswith("session 'x': ") and ("damaged" in line or "newer" in line)
    assert ("interrupted" in line) == script.endswith("AS SELECT 1' FROM n")


def test_rows_of_another_session(tmp_path: Path) -> None:
    other = kept(tmp_path / "y.db", [*ODD[:3], LONG], replace(HEADER, id="2" * 32))
    for turns in ("= 4", "= 1", "> 0"):
        for tables in ({"turns": "number", "messages": "turn"}, {"messages": "turn"}):
            path = kept(tmp_path / "x.db", ODD)
            connection = sqlite3.connect(path)
            connection.execute(f"ATTACH '{other}' AS other")
            for table, column in tables.items():
                rows = f"{table} WHERE {column} {turns}"
                connection.execute(f"DELETE FROM {rows}")
                connection.execute(f"INSERT INTO {table} SELECT * FROM other.{rows}")
            connection.commit()
            connection.close()
            if turns == "= 1" and len(tables) == 1:  # there it was said word for word, too
                assert held(path) == ""
            else:
                assert "damaged" in held(path)
            path.unlink()


def test_messages_after_the_last_turn_are_not_taken_for_the_next_one(tmp_path: Path) -> None:
    connection = sqlite3.connect(kept(tmp_path / "x.db", ODD), isolation_level=None)
    for turn in (5, 9):
        connection.execute(f"INSERT INTO messages SELECT {turn}, 2 + {WORDS} = 2")
    with Store.open(tmp_path / "x.db") as store:
        assert "messages of no turn" in refusal(store.verify)
        store.write(changed(ANSWER, 5, LONG))
        assert exchanges_of(store) == [*ODD, LONG]
        store.verify()
    connection.close()


def test_what_was_altered_while_it_is_open(tmp_path: Path) -> None:
    path = kept(tmp_path / "x.db", ODD)
    with Store.open(path) as store:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute(FORGED["text"])
        assert "turn 1 was altered" in refusal(store.turns)
        assert "turn 1 was altered" in refusal(store.exchanges)
        assert "turn 1 was altered" in refusal(store.verify)
        assert exchanges_of(store, 2) == ODD[1:]
        connection.execute(FORGED["trigger"])
        assert "its tables are not" in refusal(store.verify)
        connection.close()


def seal(connection: sqlite3.Connection, number: int) -> None:
    """Give a turn the checksum of what it holds, and the session that of its last turn."""
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
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"UPDATE session SET {change}")
    seal(connection, 3)
    connection.close()
    assert "damaged" in held(path)


def test_files_that_are_no_session(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    for data in (b"", b"x", b"SQLite format 3\0", b"\0" * 8192, pack_ids(tuple(range(5000)))):
        path.write_bytes(data)
        assert "damaged" in held(path)
    path.unlink()
    os.mkfifo(path)
    assert "no file" in held(path)
    path.unlink()
    shutil.copy(sys.executable, path)
    assert "damaged" in held(path)
