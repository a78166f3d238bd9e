"""Saves a conversation: which files it has, what is written to them, and when.

The transcript is authoritative: a question is written to it before the model is asked, and an
exchange before the next question. The stream's state can be recomputed, so it is written only when
the chat ends, when it is idle, and every few minutes.
"""

import time
import weakref
from pathlib import Path
from typing import Self

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.schema import ANSWERED, SessionHeader, StoredTurn, now
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import SessionPaths, session_paths
from mlx_stream.chat.snapshot_metadata import SnapshotMetadata
from mlx_stream.chat.store import Store
from mlx_stream.chat.transcript_recall import TranscriptRecall
from mlx_stream.errors import SessionError, SnapshotError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.program.lock import Lock
from mlx_stream.program.paths import private
from mlx_stream.program.sqlite import files

SECONDS_BETWEEN_SNAPSHOTS = 300


class SavedSession:
    """The recorder of `chat`, which saves it to files.

    Args:
        lock, store: closed with the session, as is the chat's `recall` if it reads a transcript.
        written_head: the head of the transcript to which the snapshot on disk belongs.
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
        # Queued changes, oldest first. They stay here if they cannot be written, for example when
        # the disk is full.
        self._unwritten: list[Change] = []
        self._snapshot_at, self._written_head = time.monotonic(), written_head
        # The version of the stream in the snapshot, held weakly so that its buffers can be freed.
        self._written_version = weakref.ref(chat.cache.version)
        chat.recorder = self
        self._attach_recall()

    @classmethod
    def create(cls, chat: ChatSession, name: str) -> Self:
        """Save a conversation under a new name, starting with its attended turns.

        Raises:
            SessionError: the name is taken, or the conversation cannot be written.
        """
        paths = session_paths(name)
        lock, store = Lock.acquire(paths.lock), None
        try:
            chat.renumber()
            store = Store.create(paths.database, new_header(chat), chat.sampler.state())
            saved = cls(chat, name, paths, lock, store)
            chat.record_turns()
            return saved
        except BaseException:
            chat.recorder = None
            if store:
                store.close()
                for path in files(paths.database):
                    path.unlink(missing_ok=True)
            lock.close()
            raise

    def start_recall(self) -> None:
        """Recall exchanges that leave the window from now on, unless recall was disabled."""
        self.chat.start_recall(lambda notify: TranscriptRecall(self.paths.index, notify))
        self._attach_recall()

    def _attach_recall(self) -> None:
        recall = self.chat.recall
        self.recall = recall if isinstance(recall, TranscriptRecall) else None
        if self.recall:
            self.recall.attach(self.store, self.chat.conversation_state().first)

    def record(self, change: Change) -> None:
        self._unwritten.append(change)

    def flush(self) -> None:
        while self._unwritten:
            change = self._unwritten[0]
            self.store.write(change)
            self._unwritten.pop(0)
            undone = [change.number] if change.kind is ChangeKind.UNDO else []
            if self.recall and (changed := [*change.exchanges, *undone]):
                self.recall.forget(min(changed))

    def checkpoint(self) -> None:
        if time.monotonic() - self._snapshot_at > SECONDS_BETWEEN_SNAPSHOTS:
            self.write_snapshot()

    def write_snapshot(self) -> None:
        """Write the stream's state if it has changed; this ends a reply in progress.

        After a failed step nothing is written, and the next chat reads the attended turns again.

        Raises:
            SessionError, SnapshotError: the state cannot be written.
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
            if state.turns:
                private(path.parent)
                model = self.chat.model.fingerprint()
                snapshot.save_snapshot(path, self.chat.tokens, model, about.plain())
            else:  # there are no turns, or all have been undone
                path.unlink(missing_ok=True)
        except (SnapshotError, SessionError, OSError) as error:
            raise SnapshotError(
                "the conversation is saved, but the stream's state is not, so the next chat will "
                f"read the attended turns again: free some space, or set MLX_STREAM_HOME ({error})"
            ) from error
        self._snapshot_at, self._written_head = time.monotonic(), head
        self._written_version = weakref.ref(self.chat.cache.version)

    def forget(self, number: int) -> Exchange:
        """Remove the texts of a turn that has left the window, and return them.

        Raises:
            ValueRefused: the turn is attended, or no turn has that number.
            SessionError: the change cannot be written.
        """
        state = self.chat.conversation_state()
        self.flush()
        if not 1 <= number < state.first:
            attended = state.first <= number <= self.chat.number
            reason = "is still attended to: /undo removes it" if attended else "does not exist"
            raise ValueRefused(f"exchange {number:,} {reason}")
        (turn,) = self.store.turns(number, 1)
        self.store.forget(number)
        self.chat.forget_recalled()
        if self.recall:
            self.recall.forget(number)
        return turn.exchange

    def close(self) -> None:
        """Write everything and release the session; may be called more than once.

        Raises:
            SessionError, SnapshotError: something could not be written.
        """
        if self.chat.recorder is not self:
            return
        try:
            _ = self.chat.exchanges  # ends a reply in progress
            self.flush()
            self.write_snapshot()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self.chat.recorder = None
        if self.recall:
            self.recall.close()
        self.store.close()
        self.lock.close()


def saved_as(chat: ChatSession) -> SavedSession | None:
    """Return a conversation's recorder, or None if the conversation is not saved to files."""
    return chat.recorder if isinstance(chat.recorder, SavedSession) else None


def saved_turns(chat: ChatSession) -> tuple[SessionHeader, list[StoredTurn]]:
    """Return a conversation's header and saved turns, or attended turns if it is not saved.

    Raises:
        SessionError: the transcript is damaged.
    """
    exchanges = enumerate(chat.exchanges, 1)  # ends a reply in progress
    if saved := saved_as(chat):
        return saved.store.state.header, saved.store.turns()
    turns = [StoredTurn(number, ANSWERED, exchange, now()) for number, exchange in exchanges]
    return new_header(chat), turns


def new_header(chat: ChatSession) -> SessionHeader:
    """Return a header with a new id for a conversation; a model's path is made absolute."""
    path = Path(chat.model.name).expanduser()
    return SessionHeader.new(
        model=str(path.absolute()) if path.exists() else chat.model.name,
        fingerprint=chat.model.fingerprint(),
        system=chat.system,
        window=chat.stats.window,
        sinks=chat.sinks,
        evict=chat.evict,
        kv_bits=chat.kv_bits,
    )
