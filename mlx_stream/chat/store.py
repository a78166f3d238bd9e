"""The transcript of a conversation in one SQLite file; independent of models and streams.

A turn is one row of `turns` and one row of `messages` for each of its texts, written in one
transaction together with the row of `session`. Turn numbers never change. `schema` describes what
is checked when turns are read.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import astuple, replace
from itertools import islice
from pathlib import Path
from typing import Self

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.migrations import (
    check_schema,
    insert_row,
    make_tables,
    prepare_database,
)
from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.schema import (
    ANSWERED,
    ASKED,
    FORGOTTEN,
    SessionHeader,
    StoredTurn,
    TranscriptState,
    digest,
    now,
    state_of,
    turn_checksum,
    turn_of,
)
from mlx_stream.errors import SessionError
from mlx_stream.program.atomic_replace import flush
from mlx_stream.program.paths import is_file, private
from mlx_stream.program.sqlite import (
    LONGEST_ROW,
    bytes_on_disk,
    connect,
    files,
    limit_length,
    partial_path,
    reporting_damage,
    reporting_errors,
)

SMALLEST = -(2**63)  # the smallest row number


class Store(AbstractContextManager["Store"]):
    """The open transcript of a conversation.

    A method that raises an error changes nothing, and the store can still be used afterwards. Hold
    the session's lock when writing.

    Attributes:
        connection: the SQLite connection, for tests.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path, self.connection = path, connection

    @classmethod
    def create(cls, path: Path, header: SessionHeader, sampler: str) -> Self:
        """Atomically create a conversation without turns, and open it.

        Raises:
            SessionError: the conversation already exists, or cannot be written.
        """
        if os.path.lexists(path):
            raise SessionError(f"session {path.stem!r} already exists; open it or use another name")
        private(path.parent)
        partial = partial_path(path)
        with reporting_errors(path):
            state = TranscriptState(header, 1, sampler)
            state.check()
            # Remove files of killed processes: SQLite would replay an old log into the new
            # database.
            for old in (*files(partial), *files(path)[1:]):
                old.unlink(missing_ok=True)
            try:
                os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                with closing(connect(partial, LONGEST_ROW)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    make_tables(connection)
                    insert_row(connection, "session", state.row())
                    connection.execute("COMMIT")
                partial.rename(path)
                flush(path.parent)
            finally:
                partial.unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, locked: bool = False) -> Self:
        """Open a conversation, and convert it if an earlier version wrote it.

        Args:
            locked: whether the caller holds the session's lock, which a conversion requires.

        Raises:
            SessionError: the file is missing, damaged or written by a newer version, cannot be
                opened, or must be converted while another process has the session open.
        """
        if not os.path.lexists(path):
            raise SessionError(f"session {path.stem!r} does not exist: check the name")
        if not is_file(path):
            raise SessionError(f"session {path.stem!r}: {path} is not a regular file; rename it")
        with reporting_errors(path):
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            connection = connect(path, bytes_on_disk(path))
            try:
                prepare_database(connection, None if locked else path.with_suffix(".lock"))
                store = cls(path, connection)
                _ = store.state
            except BaseException:
                connection.close()
                raise
        return store

    @property
    def state(self) -> TranscriptState:
        """The session's header and counts."""
        with self._transaction("BEGIN"):
            return self._state()

    def head(self, first: int, last: int) -> str:
        """Return a checksum of the header and the turns `first` to `last`, in hexadecimal.

        It is computed from the turns' stored checksums, not from their texts.
        """
        with self._transaction("BEGIN"):
            state, query = self._state(), "SELECT checksum FROM turns WHERE number BETWEEN ? AND ?"
            found = self.connection.execute(f"{query} ORDER BY number", (first, last)).fetchall()
            links = [link for (link,) in found]
            if first < 1 or last > state.count or len(links) != last - first + 1:
                raise ValueError(f"turns {first} to {last} do not exist: there are {state.count}")
            return digest("head", *astuple(state.header), first, *links)

    def checksums(self, first: int, last: int) -> list[str]:
        """Return the stored checksums of the turns `first` to `last`.

        Recall reads one for each turn that leaves the window, so this is a single statement.
        """
        query = "SELECT checksum FROM turns WHERE number BETWEEN ? AND ? ORDER BY number"
        with reporting_errors(self.path):
            self.connection.rollback()
            limit_length(self.connection, 0)  # checksums are short
            return [link for (link,) in self.connection.execute(query, (first, last))]

    def turns(self, first: int = 1, count: int | None = None) -> list[StoredTurn]:
        """Return the turns from number `first` on, or only the first `count` of them.

        Raises:
            SessionError: one of them is damaged.
        """
        with self._transaction("BEGIN"):
            return list(islice(self._turns(self._state(), first), count))

    def exchanges(self, first: int = 1) -> dict[int, Exchange]:
        """Return the answered turns from number `first` on, by number; see `turns`."""
        return {t.number: t.exchange for t in self.turns(first) if t.state == ANSWERED}

    def whole(self) -> tuple[list[StoredTurn], str]:
        """Return the turns before the first damaged one, and a line about any damage, or ""."""
        found: list[StoredTurn] = []
        try:
            with self._transaction("BEGIN"):
                for turn in self._turns(self._state(), 1):
                    found.append(turn)
        except SessionError as error:
            return found, str(error)
        return found, ""

    def write(self, change: Change) -> None:
        """Write a change; it is on disk when this returns. Any later turns are removed."""
        with self._transaction("BEGIN IMMEDIATE"):
            state, kind = self._state(), change.kind
            kept = change.number - (kind is not ChangeKind.STAND)
            count = change.number - (kind is ChangeKind.UNDO)
            new = range(min(kept, state.count) + 1, count + 1)
            known = all(0 < number <= count for number in change.exchanges)
            if not known or not all(number in change.exchanges for number in new):
                raise ValueError(f"turn {change.number} cannot follow turn {state.count}")
            for table, column in (("turns", "number"), ("messages", "turn")):
                self.connection.execute(f"DELETE FROM {table} WHERE {column} > ?", (kept,))
            header = replace(state.header, system=change.system, window=change.window)
            for number, exchange in change.exchanges.items():
                time = self._column("time", number) or now()
                turn_state = ASKED if kind is ChangeKind.ASK else ANSWERED
                turn, messages = StoredTurn(number, turn_state, exchange, time).rows()
                checksum = turn_checksum(header.id, turn, messages)
                insert_row(self.connection, "turns", (*turn, checksum))
                for message in messages:
                    insert_row(self.connection, "messages", message)
            last = self._column("checksum", count)
            first, recall_from = min(change.first, count + 1), min(change.recall_from, count + 1)
            self._write(TranscriptState(header, first, change.sampler, recall_from, count, last))
        if kept < state.count:
            clear_log(self.connection)

    def forget(self, number: int) -> None:
        """Remove the texts of a turn that is not attended to; the turn keeps its number.

        Raises:
            SessionError: the turn does not exist or is attended to, or the file cannot be written.
        """
        with self._transaction("BEGIN IMMEDIATE"):
            state = self._state()
            if not 1 <= number < state.first:
                raise ValueError(f"turn {number} is still attended to, or does not exist")
            turn = next(self._turns(state, number))
            blank = Exchange("", "", (), (), (), finish="interrupted")
            row, _ = StoredTurn(number, FORGOTTEN, blank, turn.time).rows()
            checksum = turn_checksum(state.header.id, row, ())
            insert_row(self.connection, "turns", (*row, checksum))
            self.connection.execute("DELETE FROM messages WHERE turn = ?", (number,))
            if number == state.count:
                self._write(replace(state, last=checksum))
        clear_log(self.connection)

    def update(self, header: SessionHeader) -> None:
        """Replace the header, except for the id and the creation time.

        Raises:
            SessionError: the header cannot be written, or belongs to another session.
        """
        with self._transaction("BEGIN IMMEDIATE"):
            state = self._state()
            if (header.id, header.created) != (state.header.id, state.header.created):
                raise ValueError("a session's id and time of creation cannot change")
            self._write(replace(state, header=header))

    def verify(self) -> None:
        """Read the whole file and compare it with its checksums.

        Raises:
            SessionError: the file is damaged.
        """
        with self._transaction("BEGIN"), reporting_damage():
            check_schema(self.connection)
            ((answer,),) = self.connection.execute("PRAGMA integrity_check(1)").fetchall()
            if answer != "ok":
                raise ValueError(answer)
            for _ in self._turns(self._state(), 1):
                pass
            stray = "SELECT count(*) FROM messages WHERE turn NOT IN (SELECT number FROM turns)"
            if self.connection.execute(stray).fetchone() != (0,):
                raise ValueError("some messages do not belong to any turn")

    def close(self) -> None:
        """Close the file, and empty its log if no other process has it open."""
        clear_log(self.connection)
        self.connection.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        with reporting_errors(self.path):
            try:
                # An interrupt may have left a transaction open.
                self.connection.rollback()
                # No value that is read can be longer than the file.
                longest = bytes_on_disk(self.path) if begin == "BEGIN" else LONGEST_ROW
                limit_length(self.connection, longest)
                self.connection.execute(begin)
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                self.connection.rollback()
                raise

    def _state(self) -> TranscriptState:
        """Return the row of `session` after checking that it names the last turn."""
        with reporting_damage():
            rows = self.connection.execute("SELECT * FROM session LIMIT 2").fetchall()
            if len(rows) != 1 or rows[0][0] != 1:
                raise ValueError("it must have exactly one row that describes it")
            state = state_of(rows[0])
            last = "SELECT number, checksum FROM turns ORDER BY number DESC LIMIT 1"
            found = self.connection.execute(last).fetchone() or (0, "")
            if found != (state.count, state.last):
                raise ValueError("its last turn was removed or replaced")
            return state

    def _turns(self, state: TranscriptState, first: int) -> Iterator[StoredTurn]:
        with reporting_damage():
            number = first - 1
            # Start at the smallest number, to find rows that do not belong there.
            start = first if number else SMALLEST
            query = "SELECT * FROM turns WHERE number >= ? ORDER BY number"
            messages_query = "SELECT * FROM messages WHERE turn = ? ORDER BY place"
            for *turn, checksum in self.connection.execute(query, (start,)):
                number += 1
                messages = self.connection.execute(messages_query, (number,)).fetchall()
                row = tuple(turn)
                if turn[0] != number:
                    raise ValueError(f"turn {number} is missing")
                if checksum != turn_checksum(state.header.id, row, messages):
                    raise ValueError(f"turn {number} was altered")
                yield turn_of(row, messages)
            if number != state.count:
                raise ValueError("it has too few or too many turns")

    def _column(self, name: str, number: int) -> str:
        """Return one column of a turn's row, or "" if there is no such turn."""
        query = f"SELECT {name} FROM turns WHERE number = ?"
        return (self.connection.execute(query, (number,)).fetchone() or ("",))[0]

    def _write(self, state: TranscriptState) -> None:
        state.check()
        insert_row(self.connection, "session", state.row())


def clear_log(connection: sqlite3.Connection) -> None:
    """Move the log into the database, so that neither contains removed text."""
    # The change is already committed. If this fails, closing the file tries again.
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def first_question(store: Store) -> str:
    """Return the first question that has not been forgotten, or "" if there is none.

    Raises:
        SessionError: the transcript is damaged.
    """
    with store._transaction("BEGIN"):
        query = "SELECT text FROM messages WHERE role = 'user' ORDER BY turn, place LIMIT 1"
        return "".join(text for (text,) in store.connection.execute(query).fetchall())
