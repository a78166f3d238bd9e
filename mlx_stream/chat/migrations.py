"""The tables of a transcript, and the conversion of files written by an earlier version.

Version 1 had two rows of `messages` per exchange, each with a checksum that covers the previous
one:

    origin     = SHA-256 of the session's id and creation time
    checksum 1 = SHA-256 of origin,     1, "user",      "Hi",     ids, ...
    checksum 2 = SHA-256 of checksum 1, 2, "assistant", "Hello.", ids, ...
"""

import sqlite3
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import astuple
from functools import cache
from pathlib import Path

from mlx_stream.chat.schema import (
    Row,
    SessionHeader,
    StoredTurn,
    digest,
    pack_ids,
    turn_checksum,
)
from mlx_stream.program.lock import Lock
from mlx_stream.program.sqlite import LONGEST_ROW, limit_length, pragma, reporting_damage

# "mlxs" in the file header.
APPLICATION_ID = 0x6D6C7873
VERSION = 2

# The statements that create each version's tables.
TABLES = {
    1: (
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
    2: (
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
            recall_from INTEGER NOT NULL,
            count INTEGER NOT NULL,
            last TEXT NOT NULL,
            checksum TEXT NOT NULL
        ) STRICT""",
        """CREATE TABLE turns (
            number INTEGER PRIMARY KEY,
            state TEXT NOT NULL,
            finish TEXT,
            time TEXT NOT NULL,
            closing_ids BLOB NOT NULL,
            settled_ids BLOB,
            checksum TEXT NOT NULL
        ) STRICT""",
        """CREATE TABLE messages (
            turn INTEGER NOT NULL,
            place INTEGER NOT NULL,
            role TEXT NOT NULL,
            text TEXT NOT NULL,
            thinking TEXT,
            calls TEXT,
            ids BLOB NOT NULL,
            rest TEXT,
            PRIMARY KEY (turn, place)
        ) STRICT, WITHOUT ROWID""",
    ),
}


def prepare_database(connection: sqlite3.Connection, lock: Path | None) -> None:
    """Check that a file is a transcript, and convert it to this version's tables and journal mode.

    Args:
        lock: see `migrate`.
    """
    with reporting_damage():
        version = pragma(connection, "user_version")
        if pragma(connection, "application_id") != APPLICATION_ID or version < 1:
            raise ValueError("it is not an mlx_stream conversation")
        if version <= VERSION:
            check_schema(connection)
    if version > VERSION:
        raise ValueError("written by a newer mlx_stream: update mlx_stream, or use another name")
    connection.set_progress_handler(None, 0)
    if version < VERSION:
        with reporting_damage():
            migrate(connection, lock)
    if (mode := pragma(connection, "journal_mode = WAL")) != "wal":
        raise ValueError(f"its journal mode is {mode!r}, not 'wal': move it to a local disk")


def make_tables(connection: sqlite3.Connection, version: int = VERSION) -> None:
    """Create a version's tables and mark the file with that version."""
    for statement in TABLES[version]:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {version}")


def check_schema(connection: sqlite3.Connection) -> None:
    """Check that a file has its version's tables and no triggers, views or indexes."""
    wanted = schema(pragma(connection, "user_version"))
    query = f"SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT {len(wanted) + 1}"
    found = connection.execute(query).fetchall()
    if len(found) != len(wanted) or set(found) != wanted:
        raise ValueError("it does not have a conversation's tables")


@cache
def schema(version: int) -> frozenset[tuple[str, ...]]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        make_tables(connection, version)
        query = "SELECT type, name, tbl_name, sql FROM sqlite_master"
        return frozenset(connection.execute(query).fetchall())
    finally:
        connection.close()


def migrate(connection: sqlite3.Connection, lock: Path | None = None) -> None:
    """Convert a version 1 file to version 2 in one transaction.

    Everything is copied. A damaged turn is still detected as damaged in the new file.

    Args:
        lock: the session's lock, held while the file is converted; None if the caller holds it.
    """
    limit_length(connection, LONGEST_ROW)
    connection.execute("BEGIN IMMEDIATE")
    try:
        if pragma(connection, "user_version") == 1:  # another process may have converted it already
            with Lock.acquire(lock) if lock else nullcontext():
                for table in ("session", "messages"):
                    connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
                make_tables(connection)
                copy_version_1(connection)
                for table in ("session", "messages"):
                    connection.execute(f"DROP TABLE old_{table}")
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


# Rows 2n - 1 and 2n of version 1 are the question and the reply of turn n.
COPY_MESSAGES = """INSERT INTO messages
    SELECT (number + 1) >> 1, (number + 1) & 1, role, text, NULL, NULL, ids, rest
    FROM old_messages ORDER BY number"""
COPY_TURNS = """INSERT INTO turns
    SELECT reply.number / 2, 'answered', reply.finish, reply.time,
        coalesce(question.closing_ids, x''), NULL, ''
    FROM old_messages AS reply
    LEFT JOIN old_messages AS question ON question.number = reply.number - 1
    WHERE reply.number % 2 = 0"""


def copy_version_1(connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT * FROM old_session LIMIT 2").fetchall()
    if len(rows) != 1:
        raise ValueError("it must have exactly one row that describes it")
    _, *values, checksum = rows[0]
    *header, first, sampler, count, head = values
    link = digest("origin", header[0], header[1])
    newest = "SELECT number, checksum FROM old_messages ORDER BY number DESC LIMIT 1"
    found = connection.execute(newest).fetchone() or (0, link)
    if checksum != digest("session", *values) or found != (2 * count, head):
        raise ValueError("its last exchange was removed or replaced")
    try:
        connection.execute(COPY_MESSAGES)
        connection.execute(COPY_TURNS)
    except sqlite3.IntegrityError as error:
        raise ValueError(str(error)) from error
    last = seal_whole_turns(connection, header[0], link)
    state = (1, *header, first, sampler, 1, count, last)
    insert_row(connection, "session", (*state, digest("session", *state)))


def seal_whole_turns(connection: sqlite3.Connection, session: str, link: str) -> str:
    """Write the checksums of the undamaged turns and return the last turn's checksum.

    Args:
        link: the checksum before the first message.
    """
    asked, last = None, ""
    # Invalid UTF-8 is copied unchanged; the text read here then does not match the checksum.
    connection.text_factory = lambda data: data.decode(errors="replace")
    for *fields, checksum in connection.execute("SELECT * FROM old_messages ORDER BY number"):
        number, replies = (fields[0] + 1) >> 1, fields[0] % 2 == 0
        whole = checksum == digest(link, *fields) and (asked == number or not replies)
        link, asked, last = checksum, number if whole else None, ""
        if whole and replies:
            query = "SELECT * FROM turns WHERE number = ?"
            turn = connection.execute(query, (number,)).fetchone()
            query = "SELECT * FROM messages WHERE turn = ? ORDER BY place"
            messages = connection.execute(query, (number,)).fetchall()
            last = turn_checksum(session, turn[:-1], messages)
            connection.execute("UPDATE turns SET checksum = ? WHERE number = ?", (last, number))
    connection.text_factory = str
    return last


def insert_row(connection: sqlite3.Connection, table: str, row: Row) -> None:
    connection.execute(f"REPLACE INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def head_of_version_1(header: SessionHeader, turns: Iterable[StoredTurn]) -> str:
    """Return the head that version 1 computed after some turns and stored in its snapshots."""
    link = digest("origin", header.id, header.created)
    for turn in turns:
        e, number, time = turn.exchange, 2 * turn.number, turn.time
        question, closing, reply = map(pack_ids, (e.question_ids, e.closing_ids, e.reply_ids))
        link = digest(link, number - 1, "user", e.question, question, closing, None, None, time)
        link = digest(link, number, "assistant", e.reply, reply, None, e.rest, e.finish, time)
    return digest("head", *astuple(header), link)
