"""Opens, verifies, renames and removes saved conversations; loads no model."""

import os
from contextlib import suppress
from pathlib import Path

from mlx_stream.chat.exchange import plural
from mlx_stream.chat.session_files import SessionPaths, session_paths
from mlx_stream.chat.snapshot_metadata import parse_metadata
from mlx_stream.chat.store import Store
from mlx_stream.chat.transcript_recall import compare_index
from mlx_stream.errors import SessionError, SnapshotError
from mlx_stream.program.lock import Lock
from mlx_stream.program.sqlite import files, partial_path


def open_transcript(name: str) -> Store:
    """Open a conversation's transcript for reading; another process may have the session open.

    Raises:
        SessionError: the conversation does not exist or is damaged.
    """
    return Store.open(session_paths(name).database)


def remove_session(name: str) -> None:
    """Remove a conversation: its transcript and the stream's state.

    Raises:
        SessionError: the conversation does not exist, or a process has it open.
    """
    from mlx_stream.generate import snapshot

    where = existing_paths(name)
    with Lock.acquire(where.lock):
        snapshot.sweep_partial(where.snapshot)
        for path in files_of(where):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise SessionError(f"{path}: cannot be removed: {error.strerror}") from error
        with suppress(OSError):
            where.lock.unlink()


def existing_paths(name: str) -> SessionPaths:
    """Return the paths of a conversation's files, at least one of which exists.

    Raises:
        SessionError: the conversation does not exist.
    """
    where = session_paths(name)
    if not any(os.path.lexists(path) for path in files_of(where)):
        raise SessionError(f"session {name!r} does not exist: check the name")
    return where


def questions_of(name: str) -> list[str]:
    """Return a conversation's questions, or as many of them as can be read."""
    with suppress(SessionError), open_transcript(name) as store:
        return [turn.exchange.question for turn in store.whole()[0]]
    return []


def rename_session(name: str, new: str) -> None:
    """Rename a conversation.

    Raises:
        SessionError: the conversation does not exist, the new name is taken or invalid, or a
            process has either of them open.
    """
    where, target = session_paths(name), session_paths(new)
    if any(os.path.lexists(path) for path in files_of(target)):
        raise SessionError(f"session {new!r} already exists: choose another name")
    with Lock.acquire(where.lock), Lock.acquire(target.lock):
        Store.open(where.database, locked=True).close()  # merges the log of a killed process
        try:
            for old, path in zip(files_of(where), files_of(target), strict=True):
                if os.path.lexists(old):
                    old.rename(path)
        except OSError as error:
            raise SessionError(f"{name}: cannot be renamed: {error.strerror}") from error
        with suppress(OSError):
            where.lock.unlink()


def files_of(where: SessionPaths) -> list[Path]:
    """Return all files that hold a conversation's data, with the transcript last."""
    database = where.database
    return [
        where.snapshot,
        *files(where.index),
        *files(partial_path(database)),
        *reversed(files(database)),
    ]


def verify_session(name: str) -> str:
    """Read all of a conversation's files and return a line that describes them.

    Raises:
        SessionError: the transcript or the snapshot is damaged.
    """
    from mlx_stream.generate import snapshot

    where = session_paths(name)
    with open_transcript(name) as store:
        store.verify()
        state = store.state
        found = plural(state.count)
        if where.index.exists() and (differs := compare_index(where.index, store)):
            found += f"; {differs}"
        if not where.snapshot.exists():
            return f"{found}; no snapshot"
        try:
            saved = snapshot.load_snapshot(where.snapshot)
            about = parse_metadata(saved)
        except SnapshotError as error:
            raise SessionError(
                f"session {name!r}: its transcript is intact, but its snapshot is not ({error}): "
                "the next chat will read the attended turns again"
            ) from error
        model = state.header.fingerprint
        # The transcript may have the model's new fingerprint while an old snapshot has the old one.
        known = saved.model == model or (saved.version == 1 and model.startswith("2:"))
        if about.session != state.header.id or not known:
            return f"{found}; the snapshot belongs to another model or conversation and is not used"
        if not about.is_of(store, saved):
            return f"{found}; the snapshot contains turns that were undone and is not used"
        return f"{found}; snapshot after exchange {about.state.turns:,}"
