"""A conversation that is saved: its files, and what is written to them when.

The transcript is the truth: a question is in it before the model is asked, an exchange before the
next question. The stream's state is a cache of it, written on leaving, when nothing happens, and
now and then.
"""

import os
import time
import weakref
from pathlib import Path
from typing import Self

from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.schema import ANSWERED, SessionHeader, StoredTurn, now
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import SessionPaths, session_paths
from mlx_stream.chat.snapshot_metadata import SnapshotMetadata
from mlx_stream.chat.store import Store
from mlx_stream.errors import SnapshotError
from mlx_stream.generate import snapshot
from mlx_stream.program.lock import Lock
from mlx_stream.program.paths import private
from mlx_stream.program.sqlite import files

SECONDS_BETWEEN_SNAPSHOTS = 300


class SavedSession:
    """Writes down what is said in `chat`, whose recorder it is.

    Args:
        lock, store: of its files; it closes both.
        written_head: of the transcript that the snapshot on disk belongs to.
    """

    def __init__(
        self,
        chat: ChatSession,
        name: str,
        paths: SessionPaths,
        lock: Lock,
        store: Store,
        written_head: str = "",
    ):
        self.chat, self.name, self.paths, self.lock, self.store = chat, name, paths, lock, store
        # What could not be written, on a full disk say, oldest first: the next turn tries again.
        self._unwritten: list[Change] = []
        self._snapshot_at, self._written_head = time.monotonic(), written_head
        # Of the stream in the snapshot; a reference would keep its buffers.
        self._written_version = weakref.ref(chat.cache.version)
        chat.recorder = self

    @classmethod
    def create(cls, chat: ChatSession, name: str) -> Self:
        """Save a conversation under a new name: what is attended now, and all that follows.

        Raises:
            SessionError: there is one of that name, or it cannot be written.
        """
        paths = session_paths(name)
        lock = Lock.acquire(paths.lock)
        try:
            chat.renumber()
            store = Store.create(paths.database, new_header(chat), chat.sampler.state())
            saved = cls(chat, name, paths, lock, store)
        except BaseException:
            lock.close()
            raise
        try:
            chat.record_turns()
        except BaseException:
            saved._let_go()
            for path in files(paths.database):
                path.unlink(missing_ok=True)
            raise
        return saved

    def record(self, change: Change) -> None:
        self._unwritten.append(change)

    def flush(self) -> None:
        kind = None
        while self._unwritten:
            kind = self._unwritten[0].kind
            self.store.write(self._unwritten[0])
            self._unwritten.pop(0)
        if kind not in (None, ChangeKind.ASK) and self._is_due():
            self.write_snapshot()

    def write_snapshot(self) -> None:
        """Write the stream's state, if it is not what is on disk; ends a reply that is going on.

        Not after a step that failed: the next chat reads what is attended again.

        Raises:
            SessionError, SnapshotError: it cannot be written.
        """
        state = self.chat.conversation_state()
        if self._unwritten or self.chat.tokens.failed:
            return
        head = self.store.head(state.first, state.turns)
        if head == self._written_head and self._written_version() is self.chat.cache.version:
            return
        path = self.paths.snapshot
        about = SnapshotMetadata(self.store.state.header.id, head, state)
        try:
            remove_file(self.paths.quarantine)
            if state.turns:
                private(path.parent)
                model = self.chat.model.fingerprint()
                snapshot.save_snapshot(path, self.chat.tokens, model, about.plain())
            else:  # all was taken back, or nothing was said yet
                remove_file(path)
        except SnapshotError as error:
            raise SnapshotError(
                "all that was said is saved, but not the stream's state, so that the next chat "
                f"reads what is attended again: make room, or set MLX_STREAM_HOME ({error})"
            ) from error
        self._snapshot_at, self._written_head = time.monotonic(), head
        self._written_version = weakref.ref(self.chat.cache.version)

    def close(self) -> None:
        """Write what is not written, and let others have the session; may be called twice.

        Raises:
            SessionError, SnapshotError: something could not be written.
        """
        if self.chat.recorder is not self:
            return
        try:
            _ = self.chat.exchanges  # ends a reply that is going on
            self.flush()
            self.write_snapshot()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self.chat.recorder = None
        self.store.close()
        self.lock.close()

    def _is_due(self) -> bool:
        return time.monotonic() - self._snapshot_at > SECONDS_BETWEEN_SNAPSHOTS


def saved_as(chat: ChatSession) -> SavedSession | None:
    """Return how a conversation is saved, if it is."""
    return chat.recorder if isinstance(chat.recorder, SavedSession) else None


def saved_turns(chat: ChatSession) -> tuple[SessionHeader, list[StoredTurn]]:
    """Return what a conversation is, and all that is saved of it, else what is attended.

    Raises:
        SessionError: what is saved is damaged.
    """
    exchanges = enumerate(chat.exchanges, 1)
    if saved := saved_as(chat):
        return saved.store.state.header, saved.store.turns()
    turns = [StoredTurn(number, ANSWERED, exchange, now()) for number, exchange in exchanges]
    return new_header(chat), turns


def new_header(chat: ChatSession) -> SessionHeader:
    """Return what describes a conversation, under a new id."""
    return SessionHeader.new(
        model=absolute_source(chat.model.name),
        fingerprint=chat.model.fingerprint(),
        system=chat.system,
        window=chat.stats.window,
        sinks=chat.sinks,
        evict=chat.evict,
        kv_bits=chat.kv_bits,
    )


def absolute_source(source: str) -> str:
    """Return a model's source so that it means the same in any folder."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def remove_file(path: Path) -> None:
    """Remove a file that may hold what was taken back.

    Raises:
        SnapshotError: it cannot be removed.
    """
    try:
        if os.path.lexists(path) and not path.is_dir():
            path.unlink()
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be removed: {error.strerror}") from error
