"""Transcripts as version 1 wrote them, from its description alone; and killed migrations.

A file of version 1 had two messages for a turn, each with a checksum over the one before.
"""

import hashlib
import json
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mlx_stream
from mlx_stream.chat.store import Store

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE session (
            row INTEGER PRIMARY KEY CHECK (row = 1),
            id TEXT NOT NULL,
            created TEXT NOT NULL,
            model TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            system TEXT,
            window INTEGER NOT NULL,
            sinks INTEGER NOT NULL,
            evict TEXT NOT NULL,
            kv_bits INTEGER,
            first INTEGER NOT NULL,
            sampler TEXT NOT NULL,
            turns INTEGER NOT NULL,
            head TEXT NOT NULL,
            checksum TEXT NOT NULL
        ) STRICT;
CREATE TABLE messages (
            number INTEGER PRIMARY KEY,
            role TEXT NOT NULL,
            text TEXT NOT NULL,
            ids BLOB NOT NULL,
            closing_ids BLOB,
            rest TEXT,
            finish TEXT,
            time TEXT NOT NULL,
            checksum TEXT NOT NULL
        ) STRICT;
PRAGMA application_id = 0x6D6C7873;
PRAGMA user_version = 1;
"""


@dataclass(frozen=True)
class OldTurn:
    """A turn of version 1, in the order of its columns."""

    question: str
    reply: str
    closing: tuple[int, ...] = ()
    question_ids: tuple[int, ...] = (1, 2)
    reply_ids: tuple[int, ...] = (3,)
    rest: str = ""
    finish: str = "end"
    time: str = "2026-05-09T17:03:00Z"


@dataclass(frozen=True)
class OldHeader:
    id: str = "0123456789abcdef" * 2
    created: str = "2026-05-09T17:00:00Z"
    model: str = "./a model"
    fingerprint: str = "f" * 16
    system: str | None = "Be é\0."
    window: int = 60
    sinks: int = 4
    evict: str = "turn"
    kv_bits: int | None = None

    def values(self) -> tuple[Any, ...]:
        return (
            *(self.id, self.created, self.model, self.fingerprint, self.system),
            *(self.window, self.sinks, self.evict, self.kv_bits),
        )


def sha256_of(*values: Any) -> str:
    """Return the SHA-256 of "s5:Hello", "i2:17", "b4:....", "n0:" and the like, concatenated."""
    whole = hashlib.sha256()
    for value in values:
        kind, data = {
            str: lambda text: (b"s", text.encode()),
            int: lambda number: (b"i", b"%d" % number),
            bytes: lambda data: (b"b", data),
            type(None): lambda _: (b"n", b""),
        }[type(value)](value)
        whole.update(kind + b"%d:" % len(data) + data)
    return whole.hexdigest()


def packed(ids: Sequence[int]) -> bytes:
    return b"".join(struct.pack("<I", id) for id in ids)


def messages_of(header: OldHeader, turns: Sequence[OldTurn]) -> list[tuple[Any, ...]]:
    """Return the rows of `messages`, each with its checksum."""
    rows: list[tuple[Any, ...]] = []
    link = sha256_of("origin", header.id, header.created)
    for n, turn in enumerate(turns, 1):
        asked = (packed(turn.question_ids), packed(turn.closing), None, None, turn.time)
        said = (packed(turn.reply_ids), None, turn.rest, turn.finish, turn.time)
        for row in (
            (2 * n - 1, "user", turn.question, *asked),
            (2 * n, "assistant", turn.reply, *said),
        ):
            link = sha256_of(link, *row)
            rows.append((*row, link))
    return rows


def head_of(header: OldHeader, turns: Sequence[OldTurn]) -> str:
    """Return what a snapshot after these turns records about them."""
    links = [row[-1] for row in messages_of(header, turns)]
    last = links[-1] if links else sha256_of("origin", header.id, header.created)
    return sha256_of("head", *header.values(), last)


def write_version_1(
    path: Path, header: OldHeader, turns: Sequence[OldTurn], first: int = 1, sampler: str = "00ff"
) -> Path:
    """Write a transcript as version 1 did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(SCHEMA)
    rows = messages_of(header, turns)
    link = rows[-1][-1] if rows else sha256_of("origin", header.id, header.created)
    state = (*header.values(), first, sampler, len(turns), link)
    connection.execute("BEGIN")
    marks = ", ".join("?" * 15)
    connection.execute(
        f"INSERT INTO session VALUES ({marks})", (1, *state, sha256_of("session", *state))
    )
    connection.executemany("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    connection.execute("COMMIT")
    connection.close()
    return path


# --- killed while it is migrated ---

# The package is a stand-in, because importing the real one takes longer than the migration.
MIGRATING = f"""
import json, sys, time, types
from pathlib import Path
package = types.ModuleType("mlx_stream")
package.__path__ = {mlx_stream.__path__!r}
sys.modules["mlx_stream"] = package
from mlx_stream.chat.store import Store
print("ready", flush=True)
started = time.perf_counter()
Store.open(Path(sys.argv[1]))
print(json.dumps(time.perf_counter() - started), flush=True)
time.sleep(60)
"""


def many_turns(count: int) -> list[OldTurn]:
    return [
        OldTurn(
            f"question {n} " * 20, f"reply {n} " * (n * 37 % 400), (n,), (n, 1), (n,) * (n % 90)
        )
        for n in range(1, count + 1)
    ]


def migrate_and_kill(path: Path, seconds: float | None) -> float:
    """Open a file in another process; kill the process after some time, or once the file is open.

    Returns:
        How long opening it took in the latter case; else 0.
    """
    command = [sys.executable, "-c", MIGRATING, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        took = 0.0
        if seconds is None:
            took = json.loads(process.stdout.readline())
        else:
            time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return took


def kill_migrations(folder: Path, kills: int, luck: Random) -> Counter[str]:
    """Kill migrations at random moments; check that each leaves the old file or the new one.

    Returns:
        How many kills left the `old` and the `new` file; `cut` counts the old ones where
        writing had begun.
    """
    header, turns = OldHeader(), many_turns(1500)
    whole = write_version_1(folder / "whole.db", header, turns, 7).read_bytes()
    path = folder / "x.db"
    path.write_bytes(whole)
    took, left = migrate_and_kill(path, None), Counter[str]()
    for _ in range(kills):
        for file in folder.glob("x.db*"):
            file.unlink()
        path.write_bytes(whole)
        migrate_and_kill(path, luck.uniform(0, 1.2 * took))
        log = path.with_name("x.db-wal")
        begun = log.exists() and log.stat().st_size > 0
        connection = sqlite3.connect(path, isolation_level=None)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 1:
            found = connection.execute("SELECT * FROM messages ORDER BY number").fetchall()
            assert found == messages_of(header, turns)
            left["old"] += 1
            left["cut"] += begun
        else:
            assert version == 2
            left["new"] += 1
        connection.close()
        check_migrated(path, header, turns, first=7)
    return left


def check_migrated(
    path: Path, header: OldHeader, turns: Sequence[OldTurn], first: int = 1, sampler: str = "00ff"
) -> None:
    """Check that a file of version 1, or its migrated form, holds what was written."""
    with Store.open(path) as store:
        state, found = store.state, store.turns()
        store.verify()
        tables = store.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        assert {name for (name,) in tables} == {"session", "turns", "messages"}
    assert [(turn.number, turn.state, turn.time) for turn in found] == [
        (number, "answered", turn.time) for number, turn in enumerate(turns, 1)
    ]
    for now, turn in zip(found, turns, strict=True):
        said = now.exchange
        assert (said.question, said.reply, said.rest) == (turn.question, turn.reply, turn.rest)
        assert (said.closing_ids, said.finish) == (turn.closing, turn.finish)
        assert (said.question_ids, said.reply_ids) == (turn.question_ids, turn.reply_ids)
        assert said.settled_ids is None
    values = tuple(getattr(state.header, name) for name in OldHeader.__dataclass_fields__)
    assert values == header.values()
    assert (state.first, state.sampler, state.recall_from) == (first, sampler, 1)
    assert state.count == len(turns)
