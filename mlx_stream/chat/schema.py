"""A conversation's rows and their checksums: values to and from columns; knows no database."""

import hashlib
import re
import sqlite3
import struct
import uuid
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from typing import Any, Self

from mlx_stream.chat.exchange import FINISHES, Exchange
from mlx_stream.program.sqlite import pragma, reporting_damage

EVICTS = ("turn", "token")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+]00:00)", re.ASCII)
ID = re.compile(r"[0-9a-f]{32}", re.ASCII)

Value = str | int | bytes | None


@dataclass(frozen=True)
class SessionHeader:
    """What a session is: written once, but for what `Store.update` changes.

    Attributes:
        id: 32 hexadecimal digits, drawn when it was created.
        created: ISO 8601, UTC, seconds.
        model: as the user named it.
        fingerprint: of the model.
        evict: `turn` or `token`.
        kv_bits: of the ring's keys and values; None if they are not quantized.
    """

    id: str
    created: str
    model: str
    fingerprint: str
    system: str | None
    window: int
    sinks: int
    evict: str
    kv_bits: int | None = None

    @classmethod
    def new(cls, **fields: Any) -> Self:
        """Return the header of a new session: with an id of its own, created now."""
        return cls(id=uuid.uuid4().hex, created=now(), **fields)

    def check(self) -> None:
        check_types(str, self.id, self.created, self.model, self.fingerprint, self.system or "")
        check_types(int, self.window, self.sinks, self.kv_bits or 0)
        if not ID.fullmatch(self.id) or not is_time(self.created):
            raise ValueError(f"id {self.id[:40]!r}, created {self.created[:40]!r}")
        if self.window < 1 or self.sinks < 0 or self.evict not in EVICTS:
            raise ValueError(f"window {self.window}, sinks {self.sinks}, evict {self.evict!r:.40}")


@dataclass(frozen=True)
class SessionProgress:
    """Where the conversation stands after its last exchange.

    Attributes:
        first: number of the oldest exchange that is attended, from 1; one more than there are
            where none is.
        sampler: the state of the random numbers, hexadecimal.
    """

    first: int
    sampler: str

    def check(self, turns: int) -> None:
        check_types(int, self.first, turns)
        check_types(str, self.sampler)
        if not 1 <= self.first <= turns + 1:
            raise ValueError(f"{self.first} cannot be the first attended of {turns} exchanges")


@dataclass(frozen=True)
class TranscriptState:
    """The row of `session`.

    Attributes:
        turns: how many exchanges there are.
        head: checksum of the last message; of nothing but the origin where there is none.
    """

    header: SessionHeader
    progress: SessionProgress
    turns: int
    head: str

    def check(self) -> None:
        self.header.check()
        self.progress.check(self.turns)
        check_types(str, self.head)

    def row(self) -> tuple[Value, ...]:
        values = (*astuple(self.header), *astuple(self.progress), self.turns, self.head)
        return (*values, digest("session", *values))


def state_of(row: tuple[Any, ...]) -> TranscriptState:
    """Return the state a row holds.

    Raises:
        ValueError, TypeError: it was altered.
    """
    *values, turns, head, checksum = row
    if checksum != digest("session", *values, turns, head):
        raise ValueError("what it says of itself was altered")
    count = len(fields(SessionHeader))
    state = TranscriptState(
        SessionHeader(*values[:count]), SessionProgress(*values[count:]), turns, head
    )
    state.check()
    return state


def rows_of(number: int, exchange: Exchange) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """Return an exchange's two messages, without their checksums."""
    if exchange.finish not in FINISHES:
        raise ValueError(f"finish {exchange.finish!r:.40} is none of {', '.join(FINISHES)}")
    check_types(str, exchange.question, exchange.reply, exchange.rest)
    question, closing = pack_ids(exchange.question_ids), pack_ids(exchange.closing_ids)
    reply, time = pack_ids(exchange.reply_ids), now()
    return (
        (2 * number - 1, "user", exchange.question, question, closing, None, None, time),
        (
            2 * number,
            "assistant",
            exchange.reply,
            reply,
            None,
            exchange.rest,
            exchange.finish,
            time,
        ),
    )


def exchange_of(user: tuple[Any, ...], assistant: tuple[Any, ...]) -> Exchange:
    """Return the exchange of two messages, given without their checksums.

    Raises:
        ValueError, TypeError: they are no exchange.
    """
    _, asks, question, question_ids, closing_ids, *none, _ = user
    _, answers, reply, reply_ids, nothing, rest, finish, _ = assistant
    if (asks, answers, *none, nothing) != ("user", "assistant", None, None, None):
        raise ValueError("a message is not of its form")
    if finish not in FINISHES:
        raise ValueError(f"a reply ended by {finish!r:.40}")
    check_types(str, question, reply, rest)
    closing, asked, replied = (unpack_ids(ids) for ids in (closing_ids, question_ids, reply_ids))
    return Exchange(question, reply, closing, asked, replied, rest, finish)


def pack_ids(ids: tuple[int, ...]) -> bytes:
    """Return ids as little-endian uint32."""
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as error:
        raise ValueError(f"ids must be whole numbers below 2^32: {error}") from error


def unpack_ids(data: Any) -> tuple[int, ...]:
    check_types(bytes, data)
    if len(data) % 4:
        raise ValueError("ids of no whole number")
    return struct.unpack(f"<{len(data) // 4}I", data)


def origin(header: SessionHeader) -> str:
    """Return the checksum before the first message's: other sessions have another."""
    return digest("origin", header.id, header.created)


def digest(*values: Value) -> str:
    """Return the SHA-256 of some values; others, or the same in other places, have another."""
    whole = hashlib.sha256()
    for value in values:
        kind, data = encode_value(value)
        whole.update(f"{kind}{len(data)}:".encode())
        whole.update(data)
    return whole.hexdigest()


def encode_value(value: Value) -> tuple[str, bytes]:
    if value is None:
        return "n", b""
    if isinstance(value, str):
        return "s", value.encode()
    if isinstance(value, bytes):
        return "b", value
    check_types(int, value)
    return "i", str(value).encode()


def check_types(kind: type, *values: object) -> None:
    for value in values:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")


def is_time(text: str) -> bool:
    """Say whether a text is a time of our form, on a day that every clock can show."""
    try:
        return bool(TIME.fullmatch(text)) and 1 < datetime.fromisoformat(text).year < 9999
    except ValueError:
        return False


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# "mlxs", in the header of the file.
APPLICATION_ID = 0x6D6C7873


# The statements that lead from each version of the schema to the next; the first, from nothing.
MIGRATIONS = (
    (
        """CREATE TABLE session (
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
        ) STRICT""",
        """CREATE TABLE messages (
            number INTEGER PRIMARY KEY,
            role TEXT NOT NULL,
            text TEXT NOT NULL,
            ids BLOB NOT NULL,
            closing_ids BLOB,
            rest TEXT,
            finish TEXT,
            time TEXT NOT NULL,
            checksum TEXT NOT NULL
        ) STRICT""",
    ),
)


def prepare_database(connection: sqlite3.Connection) -> None:
    """See that a file is one of ours, and bring it to the schema and journal of this version."""
    with reporting_damage():
        version = pragma(connection, "user_version")
        if pragma(connection, "application_id") != APPLICATION_ID or version < 1:
            raise ValueError("not a conversation of mlx_stream")
        if version <= len(MIGRATIONS):
            check_schema(connection)
    if version > len(MIGRATIONS):
        raise ValueError("written by a newer mlx_stream: update this one, or use another name")
    if version < len(MIGRATIONS):
        migrate(connection, version)
    if (mode := pragma(connection, "journal_mode = WAL")) != "wal":
        raise ValueError(f"its journal is {mode!r}: move it to a local disk")
    connection.set_progress_handler(None, 0)


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Lead a file from a version of the schema to the newest, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    connection.execute("COMMIT")


def check_schema(connection: sqlite3.Connection) -> None:
    """See that a file has its version's tables and nothing else: no trigger, no view, no index."""
    wanted = schema(pragma(connection, "user_version"))
    query = f"SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT {len(wanted) + 1}"
    found = connection.execute(query).fetchall()
    if len(found) != len(wanted) or set(found) != wanted:
        raise ValueError("its tables are not those of a conversation")


@cache
def schema(version: int) -> frozenset[tuple[str, ...]]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for statements in MIGRATIONS[:version]:
            for statement in statements:
                connection.execute(statement)
        query = "SELECT type, name, tbl_name, sql FROM sqlite_master"
        return frozenset(connection.execute(query).fetchall())
    finally:
        connection.close()
