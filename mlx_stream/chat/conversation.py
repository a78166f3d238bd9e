"""A conversation and where it is kept: what `chat` talks to, whether it is saved or not.

The transcript is the truth: an exchange is in it before the next question can be asked. The
stream's state is a cache of it, written on leaving, when nothing happens, and now and then.
"""

import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mlx_stream.chat.exchange import Exchange, plural
from mlx_stream.chat.export import export_json, export_markdown
from mlx_stream.chat.schema import SessionHeader, SessionProgress
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import SessionPaths, session_paths
from mlx_stream.chat.snapshot_metadata import SnapshotMetadata
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError, SnapshotError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.generate.stats import Stats
from mlx_stream.program.lock import Lock
from mlx_stream.program.paths import private
from mlx_stream.text.pieces import Piece

SECONDS_BETWEEN_SNAPSHOTS = 300
Progress = Callable[[int, int], None]
Pieces = Generator[Piece, None, None]


@dataclass(frozen=True)
class Change:
    """What a turn changed in the transcript.

    Attributes:
        how: append, replace, undo, or stand: only where the conversation stands has changed.
        held: exchanges that are attended after it.
        sampler: the random state after it.
        header: what the session is after it, if that has changed.
    """

    how: str
    exchange: Exchange
    held: int
    sampler: str
    header: SessionHeader | None = None

    def write(self, store: Store) -> None:
        count = store.count + {"append": 1, "undo": -1}.get(self.how, 0)
        progress = SessionProgress(max(1, count - self.held + 1), self.sampler)
        if self.how == "append":
            store.append(self.exchange, progress)
        elif self.how == "replace":
            store.replace(self.exchange, progress)
        elif self.how == "undo":
            store.undo(progress)
        else:
            store.update(header=self.header, progress=progress)


@dataclass
class SavedSession:
    """The files of a saved conversation, open."""

    name: str
    where: SessionPaths
    lock: Lock
    store: Store

    @classmethod
    def create(cls, name: str, header: SessionHeader, sampler: str) -> "SavedSession":
        where = session_paths(name)
        lock = Lock.acquire(where.lock)
        try:
            store = Store.create(where.database, header, SessionProgress(1, sampler))
        except BaseException:
            lock.close()
            raise
        return cls(name, where, lock, store)

    def close(self) -> None:
        self.store.close()
        self.lock.close()


class Conversation:
    """A `ChatSession`, and the files it is saved in, if it is.

    Args:
        chat: the session; what is said in it directly is not saved.
    """

    def __init__(self, chat: ChatSession, saved: SavedSession | None = None):
        self.chat, self.saved = chat, saved
        self._running: Pieces | None = None
        # What could not be written, on a full disk say, oldest first: the next turn tries again.
        self._waiting: list[Change] = []
        self._snapshot_at = time.monotonic()
        self._snapshot_of = ""

    @cached_property
    def model(self) -> str:
        """The model's fingerprint; nobody waits for it who saves nothing."""
        return snapshot.fingerprint(self.chat.model)

    @property
    def name(self) -> str | None:
        return self.saved.name if self.saved else None

    @property
    def system(self) -> str | None:
        return self.chat.system

    @property
    def stats(self) -> Stats:
        return self.chat.stats

    @property
    def last(self) -> Exchange | None:
        """The last exchange that is attended."""
        return next(reversed(self.chat.exchanges), None)

    def reply(
        self, question: str, *, max_tokens: int | None = None, progress: Progress | None = None
    ) -> Pieces:
        """As `ChatSession.reply`; when the generator has ended, the exchange is on disk.

        Raises:
            SessionError: it could not be written; that is tried again with the next one.
        """
        self._end()
        return self._recorded(self.chat.reply(question, max_tokens, progress=progress), "append")

    def retry(self, *, max_tokens: int | None = None, progress: Progress | None = None) -> Pieces:
        self._end()
        return self._recorded(self.chat.retry(max_tokens, progress=progress), "replace")

    def edit(
        self, question: str, *, max_tokens: int | None = None, progress: Progress | None = None
    ) -> Pieces:
        self._end()
        last, pieces = self.last, self.chat.edit(question, max_tokens, progress=progress)
        assert last is not None
        self._write("undo", last)
        return self._recorded(pieces, "append")

    def undo(self) -> Exchange:
        self._end()
        taken = self.chat.undo()
        self._write("undo", taken)
        return taken

    def clear(self) -> None:
        self._end()
        self.chat.clear()
        self._write("stand")

    def set_system(self, text: str | None) -> None:
        self._restart(text or None, self.stats.window)

    def resize(self, window: int) -> None:
        self._restart(self.system, window)

    def save(self, name: str | None) -> str:
        """Write the stream's state now; with a name, save what is attended, and from now on.

        Raises:
            ValueRefused: it has no name, or another one.
            SessionError, SnapshotError: it cannot be written.
        """
        self._end()
        if self.saved is None:
            if name is None:
                raise ValueRefused("this conversation has no name yet: give one, /save NAME")
            saved = SavedSession.create(name, self.header(), self.chat.sampler.state())
            try:
                exchanges = self.chat.exchanges
                for held, exchange in enumerate(exchanges, 1):
                    Change("append", exchange, held, self.chat.sampler.state()).write(saved.store)
            except BaseException:
                saved.close()
                raise
            self.saved = saved
        elif name not in (None, self.name):
            raise ValueRefused(f"it is saved as {self.name!r}; /export writes a copy")
        self._flush()
        self.write_snapshot()
        return f"saved as {self.name}; go on with: mlx_stream chat --session {self.name}"

    def export(self, path: Path) -> str:
        """Write all that is saved, or what is attended if nothing is, to a new file.

        Raises:
            SessionError: the file exists or cannot be written.
        """
        self._end()
        store = self.saved.store if self.saved else None
        exchanges = store.exchanges() if store else self.chat.exchanges
        write_export(path, store.header if store else self.header(), exchanges)
        return f"{plural(len(exchanges))} written to {path}"

    def header(self) -> SessionHeader:
        """Return what describes this conversation, under a new id."""
        return SessionHeader.new(
            model=absolute_source(self.chat.model.name),
            fingerprint=self.model,
            system=self.system,
            window=self.stats.window,
            sinks=self.chat.sinks,
            evict=self.chat.evict,
            kv_bits=self.chat.kv_bits,
        )

    def write_snapshot(self) -> None:
        """Write the stream's state, if it is not what is on disk; not while a reply is going on.

        Nor after a step that failed: the next chat reads what is attended again.

        Raises:
            SnapshotError: it cannot be written.
        """
        if self.saved is None or self._waiting or self.chat.failed:
            return
        store, path = self.saved.store, self.saved.where.snapshot
        count = store.count
        head = store.head(count)
        if head == self._snapshot_of:
            return
        if count == 0:  # all was taken back, or nothing was said yet
            remove_file(path)
            self._snapshot_of = head
            return
        about = SnapshotMetadata(store.header.id, count, head, self.chat.conversation_state())
        private(path.parent)
        try:
            remove_file(self.saved.where.quarantine)
            snapshot.save_snapshot(path, self.chat.tokens, self.model, about.plain())
        except SnapshotError as error:
            raise SnapshotError(
                "all that was said is saved, but not the stream's state, so that the next chat "
                f"reads what is attended again: make room, or set MLX_STREAM_HOME ({error})"
            ) from error
        self._snapshot_at, self._snapshot_of = time.monotonic(), head

    def set_snapshot_head(self, head: str) -> None:
        """Note which transcript the snapshot on disk belongs to."""
        self._snapshot_of = head

    def close(self) -> None:
        """Write what is not written, and let others have the session; may be called twice.

        Raises:
            SessionError, SnapshotError: something could not be written.
        """
        self._end()
        try:
            self._flush()
            self.write_snapshot()
        finally:
            if self.saved:
                self.saved.close()
            self.saved = None

    # --- what is written ---

    def _recorded(self, pieces: Pieces, how: str) -> Pieces:
        def run() -> Pieces:
            settled = self.chat.evictor.ended
            try:
                yield from pieces
            finally:
                pieces.close()
                if self.chat.evictor.ended > settled:
                    self._write(how, self.last)
                    if time.monotonic() - self._snapshot_at > SECONDS_BETWEEN_SNAPSHOTS:
                        self.write_snapshot()

        self._running = run()
        return self._running

    def _end(self) -> None:
        """End a reply that is going on, so that it is written before what comes next."""
        if self._running:
            self._running.close()
            self._running = None

    def _write(
        self, how: str, exchange: Exchange | None = None, header: SessionHeader | None = None
    ) -> None:
        """Bring the transcript up to date, after what is waiting."""
        if self.saved is None:
            return
        blank = Exchange("", "", (), (), ())
        held, sampler = len(self.chat.exchanges), self.chat.sampler.state()
        self._waiting.append(Change(how, exchange or blank, held, sampler, header))
        self._flush()

    def _flush(self) -> None:
        while self.saved and self._waiting:
            self._waiting[0].write(self.saved.store)
            self._waiting.pop(0)

    def _restart(self, system: str | None, window: int) -> None:
        self._end()
        self.chat.restart(system, window)
        if self.saved:
            header = self.saved.store.header
            header = replace(header, system=system, window=self.stats.window)
            self._write("stand", header=header)


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


def absolute_source(source: str) -> str:
    """Return a model's source so that it means the same in any folder."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def write_export(path: Path, header: SessionHeader, exchanges: Sequence[Exchange]) -> None:
    """Write a conversation to a new file that only this user may read: .md or .json.

    Raises:
        SessionError: the file exists, has another suffix, or cannot be written.
    """
    if path.suffix == ".json":
        text = json.dumps(export_json(header, exchanges), indent=2, ensure_ascii=False) + "\n"
    elif path.suffix == ".md":
        text = export_markdown(header, exchanges)
    else:
        raise SessionError(f"{path}: give a file that ends in .md or .json")
    try:
        file = os.open(path.expanduser(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            reason = "there is a file of that name: give another"
        raise SessionError(f"{path}: cannot be written: {reason}") from error
