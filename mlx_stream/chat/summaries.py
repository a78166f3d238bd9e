"""Summarizes all saved conversations, even thousands of them; loads no model.

Opening a database costs more than reading its first rows, so the files are attached to one
connection, one after another, and read without locks. A transcript is opened as usual if it has a
log (because a process has it open or was killed) or if its contents are not as expected.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Self

from mlx_stream.chat.migrations import VERSION, schema
from mlx_stream.chat.schema import SessionHeader, is_time, state_of
from mlx_stream.chat.session_files import DATABASE, session_names, session_paths
from mlx_stream.chat.store import Store, first_question
from mlx_stream.errors import SessionError
from mlx_stream.program import sqlite
from mlx_stream.program.paths import cache_folder, data_folder

TABLES = "SELECT type, name, tbl_name, sql FROM x.sqlite_master LIMIT 9"
# When the session was last written to.
USED = "coalesce((SELECT time FROM x.turns ORDER BY number DESC LIMIT 1), created)"
LONGEST_TITLE = 200
SUMMARY = f"""SELECT number, turns.checksum, {USED},
    (SELECT count(*) FROM x.turns WHERE number >= first AND state = 'answered'),
    (SELECT substr(text, 1, {LONGEST_TITLE}) FROM x.messages WHERE role = 'user'
     ORDER BY turn, place LIMIT 1), session.*
    FROM x.session LEFT JOIN x.turns ON number = (SELECT max(number) FROM x.turns) LIMIT 2"""


@dataclass(frozen=True)
class SessionSummary:
    """A saved conversation in a list.

    Attributes:
        exchanges: the number of turns, including an unanswered question.
        attended: how many of them the stream attends to.
        used: when its last turn (or, if it is damaged, its file) was written; ISO 8601, UTC.
        header: None if the conversation cannot be opened; `damage` then says why.
        title: the start of the first question; empty if there is no question.
    """

    name: str
    exchanges: int
    attended: int
    bytes: int
    used: str
    header: SessionHeader | None
    damage: str = ""
    title: str = ""


def session_summaries() -> list[SessionSummary]:
    """Return the saved conversations, most recently used first.

    Raises:
        SessionError: their folder cannot be read.
    """
    with SummaryReader.open(data_folder(), cache_folder()) as reader:
        found = [reader.summary(name) for name in session_names()]
        return sorted(found, key=lambda one: reader.order(one.name, one.used), reverse=True)


def latest_session() -> str | None:
    """Return the name of the most recently used session, or None.

    Sessions that are too damaged to show when they were used are skipped.

    Raises:
        SessionError: the folder of sessions cannot be read.
    """
    times = {}
    with SummaryReader.open(data_folder()) as reader:
        for name in session_names():
            with suppress(SessionError):
                times[name] = reader.order(name, reader.last_used(name))
    return max(times, key=lambda name: times[name], default=None)


@dataclass(frozen=True)
class SummaryReader:
    """Reads one transcript after another.

    Attributes:
        folder: the URI of the transcript folder.
        files: the status of each session file in the given folders, by name.
        connection: each transcript is attached to it as `x`.
    """

    folder: str
    files: dict[str, os.stat_result]
    connection: sqlite3.Connection

    @classmethod
    @contextmanager
    def open(cls, *folders: Path) -> Iterator[Self]:
        files = dict(chain(*(files_in(folder) for folder in folders)))
        # A cached statement would accumulate its steps across all transcripts.
        memory = sqlite3.connect(":memory:", uri=True, isolation_level=None, cached_statements=0)
        with closing(memory) as connection:
            connection.set_progress_handler(lambda: 1, sqlite.OPENING_STEPS)
            for setting in sqlite.PRAGMAS[:2]:
                connection.execute(f"PRAGMA {setting}").close()
            yield cls(data_folder().as_uri(), files, connection)

    def summary(self, name: str) -> SessionSummary:
        size = sum(self.files[one].st_size for one in file_names(name) if one in self.files)
        with suppress(ValueError, TypeError):
            ((number, checksum, used, attended, title, *row),) = self._rows(name, SUMMARY)
            state = state_of(row)
            if (number or 0, checksum or "") == (state.count, state.last) and is_time(used):
                found = name, state.count, attended, size, used, state.header, "", title or ""
                return SessionSummary(*found)
        try:
            with Store.open(session_paths(name).database) as store:
                state, attended, used = (
                    store.state,
                    len(store.exchanges(store.state.first)),
                    last_time(store),
                )
                title = first_question(store)[:LONGEST_TITLE]
                found = name, state.count, attended, size, used, state.header, "", title
                return SessionSummary(*found)
        except SessionError as error:
            written = datetime.fromtimestamp(self.order(name, "")[1] / 1e9, UTC)
            used = written.strftime("%Y-%m-%dT%H:%M:%SZ")
            return SessionSummary(name, 0, 0, size, used, None, str(error))

    def last_used(self, name: str) -> str:
        """Return when a session was last written to.

        Raises:
            SessionError: the session is damaged.
        """
        with suppress(ValueError):
            ((used,),) = self._rows(name, f"SELECT {USED} FROM x.session LIMIT 2")
            if is_time(used):
                return used
        with Store.open(session_paths(name).database) as store:
            return last_time(store)

    def order(self, name: str, used: str) -> tuple[str, int]:
        """Return the key that sessions are sorted by.

        File dates, which change when files are copied, only break ties within the same second.
        """
        files = (self.files.get(f"{name}{DATABASE}{end}") for end in ("", "-wal"))
        return used, max((one.st_mtime_ns for one in files if one), default=0)

    def _rows(self, name: str, query: str) -> list[Any]:
        """Return the rows of a query; none if `Store` must open the transcript."""
        database = f"{name}{DATABASE}"
        log, status = self.files.get(f"{database}-wal"), self.files.get(database)
        if status is None or (log and log.st_size):
            return []
        sqlite.limit_length(self.connection, status.st_size)
        with suppress(sqlite3.Error):
            self.connection.execute("ATTACH ? AS x", (f"{self.folder}/{database}?immutable=1",))
            try:
                if frozenset(self.connection.execute(TABLES)) == schema(VERSION):
                    return self.connection.execute(query).fetchall()
            finally:
                self.connection.execute("DETACH x")
        return []


def last_time(store: Store) -> str:
    """Return when the last turn was written, or else when the session was created."""
    state = store.state
    return store.turns(state.count)[-1].time if state.count else state.header.created


def files_in(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the name and the status of each file except the locks, which are empty."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(".lock"):
                with suppress(OSError):
                    yield entry.name, entry.stat(follow_symlinks=False)


def file_names(name: str) -> list[str]:
    """Return the names of all files that hold a conversation's data."""
    bases = f"{name}{DATABASE}", f".{name}{DATABASE}.new"
    bases = (*bases, f"{name}.recall")
    return [f"{name}.safetensors", *(base + end for base in bases for end in ("", *sqlite.BESIDE))]
