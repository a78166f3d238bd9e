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
from mlx_stream.chat.schema import digest, pack_ids
from mlx_stream.chat.store import SessionProgress, Store
from mlx_stream.errors import SessionError
from mlx_stream.program.sqlite import files
from tests.chat.test_store import HEADER, ODD, START, kept, refusal

KILLS = int(os.environ.get("MLX_STREAM_TEST_KILLS", "15"))
FLIPS = 300


# --- killed ---


def said(number: int) -> Exchange:
    """Return what the writer that is killed says in its step of this number."""
    reply = f"reply {number} " * (number * 37 % 2000)
    return Exchange(f"question {number}", reply, (number,), (number, 1), (number,) * (number % 900))


# Says the number of every step when it is committed. The package is a stand-in, because importing
# the real one takes longer than all the writing.
WRITER = f"""
import sys, types
from pathlib import Path
package = types.ModuleType("mlx_stream")
package.__path__ = {mlx_stream.__path__!r}
sys.modules["mlx_stream"] = package
from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.schema import SessionHeader, SessionProgress
from mlx_stream.chat.store import Store
{inspect.getsource(said)}
path, header, start = Path(sys.argv[1]), {HEADER!r}, {START!r}
if sys.argv[2] == "create":
    for number in range(10**6):
        Store.create(path.with_name(f"{{number}}.db"), header, start).close()
        print(number, flush=True)
store = Store.open(path) if path.exists() else Store.create(path, header, SessionProgress(1, "0"))
for number in range(int(store.progress.sampler) + 1, 10**6):
    after = SessionProgress(1, str(number))
    if number % 5 == 3:
        store.replace(said(number), after)
    elif number % 5 == 4:
        store.undo(after)
    else:
        store.append(said(number), after)
    print(number, flush=True)
    if number % 23 == 0:
        store.close()
        store = Store.open(path)
"""


def after(steps: int) -> list[Exchange]:
    """Return the exchanges there are after the writer's first steps."""
    exchanges: list[Exchange] = []
    for number in range(1, steps + 1):
        if number % 5 == 4:
            exchanges.pop()
        else:
            exchanges[len(exchanges) - (number % 5 == 3) :] = [said(number)]
    return exchanges


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
            done = int(store.progress.sampler)
            assert done in (steps, steps + 1), "committed, and perhaps not yet told"
            assert store.exchanges() == after(done)
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
                assert (store.header, store.progress, store.count) == (HEADER, START, 0)
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
    for method, values in (
        (store.append, {"exchange": LONG, "progress": START}),
        (store.replace, {"exchange": LONG, "progress": START}),
        (store.update, {"header": longer}),
    ):
        fill()
        try:
            lines.append(refusal(method, **values))
            assert store.exchanges() == ODD and store.progress == SessionProgress(4, "04")
            assert store.header == HEADER
            with Store.open(store.path) as again:
                again.verify()
            # What is short still fits, and to take something back still works.
            store.update(progress=SessionProgress(4, "05"))
            store.undo(SessionProgress(3, "03"))
            assert store.exchanges() == ODD[:3]
        finally:
            empty()
        store.append(ODD[3], SessionProgress(4, "04"))
    store.append(LONG, START)
    assert store.exchanges() == [*ODD, LONG]
    store.verify()
    with Store.open(store.path) as again:
        assert again.exchanges() == [*ODD, LONG]
    return lines


def test_a_full_disk(tmp_path: Path) -> None:
    with Store.open(kept(tmp_path / "x.db", ODD)) as store:
        (pages,) = store.connection.execute("PRAGMA page_count").fetchone()

        def most(count: int) -> Callable[[], None]:
            return lambda: store.connection.execute(f"PRAGMA max_page_count = {count}").close()

        lines = unharmed_by(store, most(pages + 1), most(2**30))
    assert lines == ["session 'x': the disk is full: make room, then try again"] * 3


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
        assert "cannot be written: check the permissions" in refusal(store.append, LONG, START)
        assert store.exchanges() == ODD


# --- altered ---


def held(path: Path) -> str:
    """Return why a session is refused; it is, or it holds what was written, and can be used."""
    try:
        with Store.open(path) as store:
            assert store.exchanges() == ODD
            assert (store.header, store.progress) == (HEADER, SessionProgress(4, "04"))
            assert store.exchanges(3) == ODD[2:]
            store.append(LONG, START)
            assert store.exchanges() == [*ODD, LONG]
            store.undo(SessionProgress(4, "04"))
            assert store.exchanges() == ODD
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
        store.append(ODD[3], SessionProgress(4, "04"))
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
                assert store.exchanges() == ODD[: store.count] and store.count in (3, 4)
        except SessionError:
            continue
        finally:
            for file in files(copy):
                file.unlink(missing_ok=True)


FORGED = {
    "text": "UPDATE messages SET text = 'No.' WHERE number = 2",
    "no text": "UPDATE messages SET text = '' WHERE number = 7",
    "ids": "UPDATE messages SET ids = x'00000000' WHERE number = 3",
    "closing": "UPDATE messages SET closing_ids = x'' WHERE number = 5",
    "rest": "UPDATE messages SET rest = 'x' WHERE number = 6",
    "finish": "UPDATE messages SET finish = 'stop' WHERE number = 2",
    "time": "UPDATE messages SET time = '' WHERE number = 2",
    "role": "UPDATE messages SET role = 'assistant' WHERE number = 1",
    "a checksum": "UPDATE messages SET checksum = 'x' WHERE number = 8",
    "the last row": "DELETE FROM messages WHERE number = 8",
    "the last two": "DELETE FROM messages WHERE number > 6",
    "the first": "DELETE FROM messages WHERE number < 3",
    "one between": "DELETE FROM messages WHERE number = 4",
    "all": "DELETE FROM messages",
    "swapped": "UPDATE messages SET number = -number WHERE number IN (1, 3);"
    "UPDATE messages SET number = 4 + number WHERE number < 0",
    "one more": "INSERT INTO messages SELECT 9, role, text, ids, closing_ids, rest, finish, time,"
    " checksum FROM messages WHERE number = 8",
    "one before": "INSERT INTO messages SELECT 0, role, text, ids, closing_ids, rest, finish, time,"
    " checksum FROM messages WHERE number = 8",
    "far before": "INSERT INTO messages SELECT -9223372036854775808, role, text, ids, closing_ids,"
    " rest, finish, time, checksum FROM messages WHERE number = 8",
    "moved": "UPDATE messages SET number = number + 1 WHERE number = 8",
    "header": "UPDATE session SET system = 'Obey.'",
    "no system": "UPDATE session SET system = NULL",
    "window": "UPDATE session SET window = 61",
    "progress": "UPDATE session SET first = 2",
    "turns": "UPDATE session SET turns = 3",
    "turns and rows": "UPDATE session SET turns = 3; DELETE FROM messages WHERE number > 6",
    "no header": "DELETE FROM session",
    "two headers": "PRAGMA ignore_check_constraints = ON; INSERT INTO session SELECT 2, id,"
    " created, model, fingerprint, system, window, sinks, evict, kv_bits, first, sampler, turns,"
    " head, checksum FROM session",
    "view": "CREATE VIEW more AS SELECT * FROM messages",
    "a view instead": "ALTER TABLE messages RENAME TO old;"
    " CREATE VIEW messages AS SELECT * FROM old",
    "trigger": "CREATE TRIGGER more AFTER INSERT ON messages BEGIN DELETE FROM messages; END",
    "table": "CREATE TABLE more (x)",
    "index": "CREATE INDEX more ON messages (text)",
    "column": "ALTER TABLE messages ADD COLUMN more TEXT",
    "no table": "DROP TABLE messages",
    "statistics": "ANALYZE",
    "endless": "PRAGMA writable_schema = ON; INSERT INTO sqlite_master"
    " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
    " SELECT 'view', 'v' || i, 'v' || i, 0, 'CREATE VIEW v' || i || ' AS SELECT 1' FROM n",
    "not ours": "PRAGMA application_id = 0",
    "version 0": "PRAGMA user_version = 0",
    "version -1": "PRAGMA user_version = -1",
    "version 2": "PRAGMA user_version = 2",
    "no UTF-8": "UPDATE messages SET text = CAST(x'ff1b5b' AS TEXT) WHERE number = 2",
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
    for rows in ("number IN (7, 8)", "number = 8", "number > 0"):
        path = kept(tmp_path / "x.db", ODD)
        connection = sqlite3.connect(path)
        connection.executescript(
            f"ATTACH '{other}' AS other; DELETE FROM messages WHERE {rows};"
            f"INSERT INTO messages SELECT * FROM other.messages WHERE {rows}"
        )
        connection.close()
        assert "damaged" in held(path)
        path.unlink()


def test_what_was_altered_while_it_is_open(tmp_path: Path) -> None:
    path = kept(tmp_path / "x.db", ODD)
    with Store.open(path) as store:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute(FORGED["text"])
        assert "exchange 1 was altered" in refusal(store.exchanges)
        assert "exchange 1 was altered" in refusal(store.verify)
        assert store.exchanges(2) == ODD[1:]
        connection.execute(FORGED["trigger"])
        assert "its tables are not" in refusal(store.verify)
        connection.close()


@pytest.mark.parametrize(
    "values",
    [
        {"role": "system"},
        {"finish": "never"},
        {"ids": b"abc"},
        {"closing_ids": b""},
        {"rest": None},
    ],
    ids=str,
)
def test_rows_that_are_no_exchange_though_their_checksums_agree(
    tmp_path: Path, values: dict
) -> None:
    path = kept(tmp_path / "x.db", ODD)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.row_factory = sqlite3.Row
    (link,) = connection.execute("SELECT checksum FROM messages WHERE number = 7").fetchone()
    row = dict(connection.execute("SELECT * FROM messages WHERE number = 8").fetchone()) | values
    row["checksum"] = digest(link, *list(row.values())[:-1])
    connection.execute("REPLACE INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [*row.values()])
    now = dict(connection.execute("SELECT * FROM session").fetchone()) | {"head": row["checksum"]}
    checksum = digest("session", *list(now.values())[1:-1])
    connection.execute("UPDATE session SET head = ?, checksum = ?", (now["head"], checksum))
    connection.close()
    with Store.open(path) as store:
        assert "damaged" in refusal(store.exchanges)


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
