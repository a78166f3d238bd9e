"""What is done to saved conversations from outside: list, verify, remove; loads no model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mlx_stream.chat.exchange import plural
from mlx_stream.chat.schema import SessionHeader
from mlx_stream.chat.session_files import SessionPaths, last_written, session_names, session_paths
from mlx_stream.chat.snapshot_metadata import parse_metadata
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError, SnapshotError
from mlx_stream.program.lock import Lock
from mlx_stream.program.sqlite import files, partial_path


@dataclass(frozen=True)
class SessionSummary:
    """A saved conversation in a list; one that cannot be opened has a reason and no header."""

    name: str
    exchanges: int
    attended: int
    bytes: int
    used: str
    header: SessionHeader | None
    damage: str = ""


def session_summaries() -> list[SessionSummary]:
    """Return the saved conversations, the one used last first."""
    return [
        summarize_session(name) for name in sorted(session_names(), key=last_used, reverse=True)
    ]


def last_used(name: str) -> int:
    return last_written(session_paths(name).database)


def summarize_session(name: str) -> SessionSummary:
    where = session_paths(name)
    size = sum(path.stat().st_size for path in files_of(where) if path.exists())
    when = datetime.fromtimestamp(last_used(name) / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        with Store.open(where.database) as store:
            state = store.state
            attended = state.count - state.first + 1
            return SessionSummary(name, state.count, attended, size, when, state.header)
    except SessionError as error:
        return SessionSummary(name, 0, 0, size, when, None, str(error))


@contextmanager
def open_transcript(name: str) -> Iterator[Store]:
    """Open a conversation's transcript to read it; another process may be talking in it.

    Raises:
        SessionError: there is none, or it is damaged.
    """
    with Store.open(session_paths(name).database) as store:
        yield store


def remove_session(name: str) -> None:
    """Remove a conversation: what was said, and the stream's state.

    Raises:
        SessionError: there is none, or a process has it open.
    """
    from mlx_stream.generate import snapshot

    where = session_paths(name)
    if not any(os.path.lexists(path) for path in files_of(where)):
        raise SessionError(f"session {name!r}: there is none; see that the name is right")
    with Lock.acquire(where.lock):
        snapshot.sweep_partial(where.snapshot)
        for path in files_of(where):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise SessionError(f"{path}: cannot be removed: {error.strerror}") from error
        with suppress(OSError):
            where.lock.unlink()


def files_of(where: SessionPaths) -> list[Path]:
    """Return every file that holds something of a conversation; the transcript is the last."""
    database, snapshot = where.database, where.snapshot
    return [
        snapshot,
        where.quarantine,
        *files(partial_path(database)),
        *reversed(files(database)),
    ]


def verify_session(name: str) -> str:
    """Read all of a conversation; return a line that says what holds.

    Raises:
        SessionError: its transcript, or its snapshot, is damaged.
    """
    from mlx_stream.generate import snapshot

    where = session_paths(name)
    with Store.open(where.database) as store:
        store.verify()
        state = store.state
        said = plural(state.count)
        if not where.snapshot.exists():
            return f"{said}; no snapshot"
        try:
            found = snapshot.load_snapshot(where.snapshot)
            about = parse_metadata(found)
        except SnapshotError as error:
            raise SessionError(
                f"session {name!r}: its transcript is whole, its snapshot is not ({error}): the "
                "next chat reads what is attended again"
            ) from error
        model = state.header.fingerprint
        # A snapshot from before an update has the same model's fingerprint of then.
        known = found.model == model or (found.version == 1 and model.startswith("2:"))
        if about.session != state.header.id or not known:
            return f"{said}; the snapshot is another model's or conversation's, and is not used"
        if not about.is_of(store, found):
            return f"{said}; the snapshot is of what was taken back, and is not used"
        return f"{said}; snapshot after exchange {about.state.turns:,}"
