"""One conversation <-> one SQLite file, which is the truth about it; knows no model and no stream.

An exchange is two rows of `messages`, written in one transaction with the row of `session` that
says where the conversation stands. Each message's checksum covers its own columns and the checksum
before it, and `session` holds the last one:

    origin     = SHA-256 of the session's id and when it was created
    checksum 1 = SHA-256 of origin,     1, "user",      "Hi",     ids, ...
    checksum 2 = SHA-256 of checksum 1, 2, "assistant", "Hello.", ids, ...

So what was altered, removed, swapped, added or taken from another session is found when it is read;
not so what someone forged who computed all checksums anew. Nor can a few forged pages be read as
endless messages: each ends with a checksum of its own, so no two share their last page.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Self

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.schema import (
    SessionHeader,
    SessionProgress,
    TranscriptState,
    check_schema,
    check_types,
    digest,
    exchange_of,
    migrate,
    origin,
    prepare_database,
    rows_of,
    state_of,
)
from mlx_stream.errors import SessionError
from mlx_stream.program.paths import is_file, private
from mlx_stream.program.sqlite import (
    LONGEST_ROW,
    bytes_on_disk,
    connect,
    files,
    flush_folder,
    limit_length,
    partial_path,
    reporting_damage,
    reporting_errors,
)

# The smallest number of a row.
SMALLEST = -(2**63)


class Store:
    """A conversation's file, open.

    A method that raises has changed nothing, and the store can be used on. Whoever writes holds
    the session's lock.

    Attributes:
        connection: SQLite's, for tests.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path, self.connection = path, connection

    @classmethod
    def create(cls, path: Path, header: SessionHeader, progress: SessionProgress) -> Self:
        """Make a conversation without exchanges, and open it; it is whole or not there.

        Raises:
            SessionError: there is one, or it cannot be written.
        """
        if os.path.lexists(path):
            raise SessionError(f"session {path.stem!r} exists; open it, or use another name")
        private(path.parent)
        partial = partial_path(path)
        with reporting_errors(path):
            state = TranscriptState(header, progress, 0, origin(header))
            state.check()
            # Left by processes that were killed. A log would be played into the new database.
            for old in (*files(partial), *files(path)[1:]):
                old.unlink(missing_ok=True)
            try:
                os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                with closing(connect(partial, LONGEST_ROW)) as connection:
                    migrate(connection, 0)
                    write_state(connection, state)
                partial.rename(path)
                flush_folder(path.parent)
            finally:
                partial.unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a conversation; an older version's is brought to this one's form.

        Raises:
            SessionError: it is not there, damaged, of a newer version, or cannot be opened.
        """
        if not os.path.lexists(path):
            raise SessionError(f"session {path.stem!r}: there is none; see that the name is right")
        if not is_file(path):
            raise SessionError(f"session {path.stem!r}: {path} is a link or no file; move it away")
        with reporting_errors(path):
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            connection = connect(path, bytes_on_disk(path))
            try:
                prepare_database(connection)
                store = cls(path, connection)
                _ = store.count
            except BaseException:
                connection.close()
                raise
        return store

    @property
    def header(self) -> SessionHeader:
        return self._now().header

    @property
    def progress(self) -> SessionProgress:
        return self._now().progress

    @property
    def count(self) -> int:
        """How many exchanges there are."""
        return self._now().turns

    def head(self, number: int) -> str:
        """Return a checksum of the header and of all exchanges up to `number`, hexadecimal.

        It changes with any of them. It is taken from what is stored, not computed from the texts.
        """
        with self._transaction("BEGIN"):
            state = self._state()
            return digest("head", *astuple(state.header), self._link(state, number))

    def exchanges(self, first: int = 1) -> list[Exchange]:
        """Return the exchanges from number `first` on.

        Raises:
            SessionError: one of them is not what was written.
        """
        with self._transaction("BEGIN"):
            return list(self._exchanges(self._state(), first))

    def whole(self) -> tuple[list[Exchange], str]:
        """Return the exchanges up to the first that is damaged, and a line about that, or ""."""
        found: list[Exchange] = []
        try:
            with self._transaction("BEGIN"):
                for exchange in self._exchanges(self._state(), 1):
                    found.append(exchange)
        except SessionError as error:
            return found, str(error)
        return found, ""

    def append(self, exchange: Exchange, progress: SessionProgress) -> None:
        """Store an exchange after the last one; when this returns it is on disk."""
        with self._transaction("BEGIN IMMEDIATE"):
            self._write(self._with(self._state(), exchange), progress)

    def undo(self, progress: SessionProgress) -> None:
        """Remove the last exchange, also from the disk's blocks."""
        with self._transaction("BEGIN IMMEDIATE"):
            self._write(self._without_last(), progress)
        self._clear_log()

    def replace(self, exchange: Exchange, progress: SessionProgress) -> None:
        """Put an exchange in the last one's place."""
        with self._transaction("BEGIN IMMEDIATE"):
            self._write(self._with(self._without_last(), exchange), progress)
        self._clear_log()

    def update(
        self, *, header: SessionHeader | None = None, progress: SessionProgress | None = None
    ) -> None:
        """Change what the session is, but for its id and when it was created, or where it stands.

        Raises:
            SessionError: it cannot be stored, or the header is another session's.
        """
        with self._transaction("BEGIN IMMEDIATE"):
            state = self._state()
            header = header or state.header
            if origin(header) != origin(state.header):
                raise ValueError("a session's id and time of creation do not change")
            self._write(replace(state, header=header), progress or state.progress)

    def verify(self) -> None:
        """Read all of the file, and compare it with its checksums.

        Raises:
            SessionError: it is damaged.
        """
        with self._transaction("BEGIN"), reporting_damage():
            check_schema(self.connection)
            ((answer,),) = self.connection.execute("PRAGMA integrity_check(1)").fetchall()
            if answer != "ok":
                raise ValueError(answer)
            for _ in self._exchanges(self._state(), 1):
                pass

    def close(self) -> None:
        """Close the file, and the log beside it if no one else has it open."""
        self._clear_log()
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        with reporting_errors(self.path):
            try:
                # An interrupt may have left one open; for reading, no value exceeds its file.
                self.connection.rollback()
                longest = bytes_on_disk(self.path) if begin == "BEGIN" else LONGEST_ROW
                limit_length(self.connection, longest)
                self.connection.execute(begin)
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                self.connection.rollback()
                raise

    def _now(self) -> TranscriptState:
        with self._transaction("BEGIN"):
            return self._state()

    def _state(self) -> TranscriptState:
        """Return the row of `session`, and see that the last message is the one it names."""
        with reporting_damage():
            rows = self.connection.execute("SELECT * FROM session LIMIT 2").fetchall()
            if len(rows) != 1 or rows[0][0] != 1:
                raise ValueError("it has no row that says what it is, or several")
            state = state_of(rows[0][1:])
            last = "SELECT number, checksum FROM messages ORDER BY number DESC LIMIT 1"
            found = self.connection.execute(last).fetchone() or (0, origin(state.header))
            if found != (2 * state.turns, state.head):
                raise ValueError("its last exchange is not the one it had")
            return state

    def _link(self, state: TranscriptState, number: int) -> str:
        """Return the checksum after an exchange, as it is stored."""
        if not 0 <= number <= state.turns:
            raise ValueError(f"there is no exchange {number}, of {state.turns}")
        if number == 0:
            return origin(state.header)
        with reporting_damage():
            query = "SELECT checksum FROM messages WHERE number = ?"
            ((link,),) = self.connection.execute(query, (2 * number,)).fetchall()
            check_types(str, link)
            return link

    def _exchanges(self, state: TranscriptState, first: int) -> Iterator[Exchange]:
        link = self._link(state, first - 1)
        with reporting_damage():
            number = 2 * first - 2
            # A row before the first is one too many.
            start = number + 1 if number else SMALLEST
            query = "SELECT * FROM messages WHERE number >= ? ORDER BY number"
            question: tuple[Any, ...] = ()
            for *fields, checksum in self.connection.execute(query, (start,)):
                number += 1
                link = digest(link, *fields)
                if fields[0] != number or checksum != link:
                    raise ValueError(f"exchange {(number + 1) // 2} was altered")
                if number % 2:
                    question = tuple(fields)
                else:
                    yield exchange_of(question, tuple(fields))
            if (number, link) != (2 * state.turns, state.head):
                raise ValueError("exchanges are missing, or are too many")

    def _with(self, state: TranscriptState, exchange: Exchange) -> TranscriptState:
        """Insert an exchange, and return the state after it."""
        turns, head = state.turns + 1, state.head
        for row in rows_of(turns, exchange):
            head = digest(head, *row)
            insert = "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            self.connection.execute(insert, (*row, head))
        return replace(state, turns=turns, head=head)

    def _without_last(self) -> TranscriptState:
        """Delete the last exchange, and return the state after it."""
        state = self._state()
        if state.turns == 0:
            raise ValueError("there is no exchange to take back")
        turns = state.turns - 1
        head = self._link(state, turns)
        self.connection.execute("DELETE FROM messages WHERE number > ?", (2 * turns,))
        return replace(state, turns=turns, head=head)

    def _write(self, state: TranscriptState, progress: SessionProgress) -> None:
        state = replace(state, progress=progress)
        state.check()
        write_state(self.connection, state)

    def _clear_log(self) -> None:
        """Write the log into the database and empty it, so that what was removed is in neither."""
        # It was committed. What cannot be done now is done when it is next closed.
        with suppress(sqlite3.Error):
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def write_state(connection: sqlite3.Connection, state: TranscriptState) -> None:
    row = (1, *state.row())
    connection.execute(f"REPLACE INTO session VALUES ({', '.join('?' * len(row))})", row)
