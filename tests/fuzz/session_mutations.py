"""Alters the files of a saved session at random: single bytes, or values with new checksums.

The mutations in `BELIEVED` recompute the checksums, so their values may be accepted if they are
consistent. Every change by the others must be detected.
"""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream.chat.schema import SessionHeader, digest, pack_ids, turn_checksum, unpack_ids
from mlx_stream.generate import snapshot
from mlx_stream.program.sqlite import files
from tests.fuzz.files import BYTES, DEPTH, INSTEAD, Change, change_json, dumps, forge_tensors

NUMBERS = ("length", "floor", "clock", "sinks_at")


# --- another session's file ---


def another(path: Path, luck: Random) -> None:
    """Replace a file with one of another session or model, or an older one of this session."""
    beside = sorted(path.parent.parent.parent.glob(f"others/*{path.suffix}"))
    shutil.copy(luck.choice(beside), path)


# --- a snapshot whose checksum matches ---


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, mx.array]], Any]) -> None:
    """Change a snapshot's header and arrays, and recompute its checksum."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays, metadata = loaded
    header = json.loads(metadata["header"])
    text = change(header, arrays)
    text = text if isinstance(text, str) else json.dumps(header)
    mx.eval(arrays)
    new = path.with_name("new.safetensors")
    sums = {"header": text, "checksum": snapshot.checksum(text, arrays)}
    mx.save_safetensors(str(new), arrays, sums)
    new.rename(path)


def forge_arrays(path: Path, luck: Random) -> None:
    def change(header: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        name = luck.choice(list(arrays))
        array = arrays[name]
        flat = array.reshape(-1)
        what = luck.randrange(9)
        if what == 0 and name != "ids":
            flat[luck.randrange(flat.size)] = luck.choice((np.nan, np.inf, -np.inf, 3e38, 1e30))
            arrays[name] = flat.reshape(array.shape)
        elif what == 1:
            shapes = ([flat.size], [1, *array.shape], [*array.shape, 1], array.shape[::-1])
            arrays[name] = flat.reshape(luck.choice(shapes))
        elif what == 2:
            arrays[name] = array[..., : luck.randrange(1, array.shape[-1] + 1)]
        elif what == 3:
            arrays[name] = mx.concatenate([array, array], axis=luck.randrange(array.ndim))
        elif what == 4:
            kinds = (mx.float16, mx.bfloat16, mx.uint32, mx.uint8, mx.float32)
            arrays[name] = array.astype(luck.choice(kinds))
        elif what == 5:
            del arrays[name]
        elif what == 6:
            arrays[luck.choice(("more", "length", "keys.99"))] = array
        elif what == 7:
            arrays[name] = mx.full(array.shape, luck.choice((3e38, 1e30, 1, 0)), mx.float32).astype(
                array.dtype
            )
        else:
            ids: list[int] = arrays["ids"].tolist()  # type: ignore[assignment]
            at = luck.randrange(len(ids))
            ids[at] = luck.choice((0, 1, 2, 5, 299, 300, 2**31, 2**32 - 1))
            ids = luck.choice((ids, ids, ids[:at], ids * 50, [7] * len(ids), ids[1:] + ids[:1]))
            arrays["ids"] = mx.array(ids, mx.uint32)
        if not arrays.get(name, array).size:
            del arrays[name]

    rewrite(path, change)


def forge_header(path: Path, luck: Random) -> None:
    """Change what a snapshot's header says about the stream, the turns or empty arrays."""

    def change(header: dict[str, Any], arrays: dict[str, mx.array]) -> str:
        if luck.random() < 0.1:
            return luck.choice(("[" * DEPTH, '{"a":' * DEPTH, "[" + "[]," * 300_000))
        if luck.random() < 0.1:
            header["version"] = 1
        if luck.random() < 0.2:  # the same value everywhere, so that the places agree
            by = luck.choice((-20, -1, 1, 20, 150, 2**40, 2**62))
            for name in NUMBERS[: luck.randint(1, len(NUMBERS))]:
                header["numbers"][name] += by
        else:
            parts = (header, header["numbers"], header["about"], header["about"]["places"])
            for _ in range(luck.randint(1, 2)):
                change_json(luck.choice(parts), luck)
        if luck.random() < 0.2:
            name = luck.choice((*arrays, "more"))
            shape = luck.choice(([0], [2**31 - 1] * 3, [10**9], list(arrays["ids"].shape)))
            header["empty"] = {name: [shape, luck.choice(("float32", "uint32", "random"))]}
        return dumps(header)

    rewrite(path, change)


# --- a database ---


def forge_log(path: Path, luck: Random) -> None:
    for file in files(path)[1:]:
        if luck.random() < 0.7:
            file.write_bytes(luck.choice((b"", luck.randbytes(5000), path.read_bytes())))


def forge_tables(path: Path, luck: Random) -> None:
    from tests.chat.test_store_hostile import FORGED as SCRIPTS

    with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.Error):
        connection.executescript(SCRIPTS[luck.choice(list(SCRIPTS))])


def forge_rows(path: Path, luck: Random) -> None:
    """Change values, and recompute every checksum."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        state = list(connection.execute("SELECT * FROM session").fetchone())
        turns = [list(r) for r in connection.execute("SELECT * FROM turns ORDER BY number")]
        rows = [list(r) for r in connection.execute("SELECT * FROM messages ORDER BY turn, place")]
        what = luck.random()
        if what < 0.4:
            forge_state(state, luck)
        elif what < 0.8:
            forge_message(luck.choice(rows[-8:]), luck)
        else:
            forge_turn(luck.choice(turns[-4:]), rows, luck)
        for turn in turns:
            said = [tuple(row) for row in rows if row[0] == turn[0]]
            turn[-1] = turn_checksum(state[1], tuple(turn[:-1]), said)
        state[-2] = turns[-1][-1]
        state[-1] = digest("session", *state[:-1])
        for table, values in (("session", [state]), ("turns", turns), ("messages", rows)):
            connection.execute(f"DELETE FROM {table}")
            for row in values:
                marks = ", ".join("?" * len(row))
                connection.execute(f"REPLACE INTO {table} VALUES ({marks})", row)


def forge_state(state: list[Any], luck: Random) -> None:
    names = [field.name for field in fields(SessionHeader)]
    count = state[-3]
    whats = {
        "created": ("9999-99-99T99:99:99Z", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        "model": ("another", "", "x" * 100_000),
        "fingerprint": ("0" * 16, "", f"2:{'0' * 16}", ":"),
        "system": ("Obey.", "", "x" * 2000, "x" * 50_000, None, "<|im_start|>"),
        "window": (1, 20, 149, 151, 400, 600, 2**31, 2**40, 2**62),
        "sinks": (0, 1, 60, 300, 511, 512, 2**31, 2**62),
        "evict": ("token",),
        "kv_bits": (3, 4, 8, -1, 2**40),
        "first": (1, 2, count - 1, count, count + 1),
        "sampler": ("", "zz", "00", "00" * 8, "00" * 9, "00" * 100_000, "é"),
        "recall_from": (0, 1, 3, count + 1, count + 2),
    }
    columns = ["row", *names, "first", "sampler", "recall_from"]
    for name in luck.sample(list(whats), luck.randint(1, 2)):
        state[columns.index(name)] = luck.choice(whats[name])


def forge_message(row: list[Any], luck: Random) -> None:
    asks = row[1] == 0
    ids = list(unpack_ids(row[6]))
    at = luck.randrange(len(ids) + 1)
    odd = luck.choice((0, 1, 2, 299, 300, 2**31, 2**32 - 1))
    what = luck.randrange(5)
    if what == 0:
        row[3] = luck.choice(("", "Obey.", "\ufdd0", "\0", "x" * 20_000))
    elif what == 1:
        row[6] = pack_ids((*ids[:at], odd, *ids[at:]))
    elif what == 2:
        row[6] = pack_ids(luck.choice((tuple(ids[:at]), (), tuple(ids) * 40, (odd,) * 500)))
    elif asks:
        row[luck.choice((4, 5))] = luck.choice(("x", "[]"))
    else:
        row[7] = luck.choice(("x", "<|im_start|>system\n", "x" * 20_000, "\ud7ff"))


def forge_turn(turn: list[Any], rows: list[list[Any]], luck: Random) -> None:
    """Change a turn's row, and what was said in it to fit the new state."""
    odd = luck.choice((0, 1, 2, 299, 300, 2**31, 2**32 - 1))
    ids = luck.choice(((), (odd,), (1, 5, 6), (7,) * 2000))
    what = luck.randrange(4)
    if what == 0:
        turn[4] = pack_ids(ids)
    elif what == 1:
        turn[5] = luck.choice((pack_ids(ids), None))
    else:
        turn[1], turn[2] = luck.choice(("asked", "forgotten")), None
        most = 1 if turn[1] == "asked" else 0
        rows[:] = [row for row in rows if row[0] != turn[0] or row[1] < most]


SNAPSHOTS: tuple[Change, ...] = (
    *(*BYTES, *INSTEAD, another, forge_tensors, forge_tensors),
    *(forge_arrays,) * 6,
    *(forge_header,) * 12,
)
DATABASES: tuple[Change, ...] = (
    *(*BYTES, *INSTEAD, another, forge_log, forge_tables),
    *(forge_rows,) * 4,
)
# An intact file from another session is as consistent as a forged one.
BELIEVED = {forge_arrays, forge_header, forge_rows, another}
