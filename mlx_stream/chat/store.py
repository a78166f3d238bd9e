"""One conversation <-> one SQLite file, which is the truth about it; knows no model and no stream.

A turn is a row of `turns` and one of `messages` for each thing said in it, written in one
transaction with the row of `session` that says where the conversation stands. Numbers of turns
never change. See `schema` for what is checked when they are read.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Self

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.migrations import (
    check_schema,
    head_of_version_1,
    insert_row,
    insert_turn,
    make_tables,
    prepare_database,
)
from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.schema import (
    ANSWERED,
    ASKED,
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

SMALLEST = -(2**63)  # number of a row


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
    def create(cls, path: Path, header: SessionHeader, sampler: str) -> Self:
        """Make a conversation without turns, and open it; it is whole or not there.

        Raises:
            SessionError: there is one, or it cannot be written.
        """
        if os.path.lexists(path):
            raise SessionError(f"session {path.stem!r} exists; open it, or use another name")
        private(path.parent)
        partial = partial_path(path)
        with reporting_errors(path):
            state = TranscriptState(header, 1, sampler)
            state.check()
            # Left by processes that were killed. A log would be played into the new database.
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
                _ = store.state
            except BaseException:
                connection.close()
                raise
        return store

    @property
    def state(self) -> TranscriptState:
        """What the session is, and where it stands."""
        with self._transaction("BEGIN"):
            return self._state()

    def head(self, first: int, last: int) -> str:
        """Return a checksum of the header and of some turns, hexadecimal.

        It changes with any of them. It is taken from what is stored, not computed from the texts.
        """
        with self._transaction("BEGIN"):
            state, query = self._state(), "SELECT checksum FROM turns WHERE number BETWEEN ? AND ?"
            found = self.connection.execute(f"{query} ORDER BY number", (first, last)).fetchall()
            links = [link for (link,) in found]
            if first < 1 or last > state.count or len(links) != last - first + 1:
                raise ValueError(f"there are no turns {first} to {last}, of {state.count}")
            return digest("head", *astuple(state.header), first, *links)

    def head_of_version_1(self, count: int, fingerprint: str) -> str:
        """Return what version 1 called the head after so many turns of a model.

        Where one of them is damaged, it is another.
        """
        turns, _ = self.whole()
        header = replace(self.state.header, fingerprint=fingerprint)
        return head_of_version_1(header, turns[:count])

    def turns(self, first: int = 1) -> list[StoredTurn]:
        """Return the turns from number `first` on.

        Raises:
            SessionError: one of them is not what was written.
        """
        with self._transaction("BEGIN"):
            return list(self._turns(self._state(), first))

    def exchanges(self, first: int = 1) -> dict[int, Exchange]:
        """Return the turns that were answered, by number, from number `first` on; see `turns`."""
        return {t.number: t.exchange for t in self.turns(first) if t.state == ANSWERED}

    def whole(self) -> tuple[list[StoredTurn], str]:
        """Return the turns up to the first that is damaged, and a line about that, or ""."""
        found: list[StoredTurn] = []
        try:
            with self._transaction("BEGIN"):
                for turn in self._turns(self._state(), 1):
                    found.append(turn)
        except SessionError as error:
            return found, str(error)
        return found, ""

    def write(self, change: Change) -> None:
        """Write what has happened; when this returns it is on disk.

        There is no turn after the one that something has happened to.
        """
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
                insert_turn(self.connection, turn, messages, checksum)
            last = self._column("checksum", count)
            first, recall_from = min(change.first, count + 1), min(state.recall_from, count + 1)
            self._write(TranscriptState(header, first, change.sampler, recall_from, count, last))
        if kept < state.count:
            self._clear_log()

    def update(self, header: SessionHeader) -> None:
        """Change what the session is, but for its id and when it was created.

        Raises:
            SessionError: it cannot be stored, or the header is another session's.
        """
        with self._transaction("BEGIN IMMEDIATE"):
            state = self._state()
            if (header.id, header.created) != (state.header.id, state.header.created):
                raise ValueError("a session's id and time of creation do not change")
            self._write(replace(state, header=header))

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
            for _ in self._turns(self._state(), 1):
                pass
            stray = "SELECT count(*) FROM messages WHERE turn NOT IN (SELECT number FROM turns)"
            if self.connection.execute(stray).fetchone() != (0,):
                raise ValueError("there are messages of no turn")

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

    def _state(self) -> TranscriptState:
        """Return the row of `session`, and see that the last turn is the one it names."""
        with reporting_damage():
            rows = self.connection.execute("SELECT * FROM session LIMIT 2").fetchall()
            if len(rows) != 1 or rows[0][0] != 1:
                raise ValueError("it has no row that says what it is, or several")
            state = state_of(rows[0])
            last = "SELECT number, checksum FROM turns ORDER BY number DESC LIMIT 1"
            found = self.connection.execute(last).fetchone() or (0, "")
            if found != (state.count, state.last):
                raise ValueError("its last turn is not the one it had")
            return state

    def _turns(self, state: TranscriptState, first: int) -> Iterator[StoredTurn]:
        with reporting_damage():
            number = first - 1
            # A row before the first is one too many.
            start = first if number else SMALLEST
            query = "SELECT * FROM turns WHERE number >= ? ORDER BY number"
            said = "SELECT * FROM messages WHERE turn = ? ORDER BY place"
            for *turn, checksum in self.connection.execute(query, (start,)):
                number += 1
                messages = self.connection.execute(said, (number,)).fetchmany(3)
                row = tuple(turn)
                if turn[0] != number:
                    raise ValueError(f"turn {number} is missing")
                if checksum != turn_checksum(state.header.id, row, messages):
                    raise ValueError(f"turn {number} was altered")
                yield turn_of(row, messages)
            if number != state.count:
                raise ValueError("turns are missing, or are too many")

    def _column(self, name: str, number: int) -> str:
        """Return a value of a turn's row, "" if there is no such turn."""
        query = f"SELECT {name} FROM turns WHERE number = ?"
        return (self.connection.execute(query, (number,)).fetchone() or ("",))[0]

    def _write(self, state: TranscriptState) -> None:
        state.check()
        insert_row(self.connection, "session", state.row())

    def _clear_log(self) -> None:
        """Write the log into the database and empty it, so that what was removed is in neither."""
        # It was committed. What cannot be done now is done when it is next closed.
        with suppress(sqlite3.Error):
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
