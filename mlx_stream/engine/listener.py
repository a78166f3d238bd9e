"""Listening without replying: its handle, for any thread to hold."""

from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from mlx_stream.engine.backlog import Backlog
from mlx_stream.engine.handle import Handle, OnEvict
from mlx_stream.engine.listener_snapshot import check_note
from mlx_stream.engine.listener_stream import ListenerOptions
from mlx_stream.engine.listener_worker import ListenerWorker
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.replies import check_limit, check_question, iterate, iterate_async
from mlx_stream.engine.task import Task, Work, reraise
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import MlxStreamError, QueueFull, ValueRefused
from mlx_stream.text.pieces import Piece
from mlx_stream.text.tokenizer import check_text


class Listener(Handle):
    """A stream that reads what it is fed, in the background, and can be asked about it.

    What was fed is one open turn of the user's, of which the latest is attended. Every method may
    be called on any thread; `feed` with a timeout, `flush`, `save`, `wait` and the pieces of an
    answer wait, nothing else does.
    """

    def __init__(
        self,
        worker: Worker,
        host: ModelHost,
        options: ListenerOptions,
        capacity: int,
        on_evict: OnEvict | None,
        engine: Any,
    ):
        if capacity < 1:
            raise ValueRefused(f"backlog must be at least 1 character, not {capacity}")
        check_limit(options.max_tokens)
        self._backlog = Backlog(capacity)
        self._listener_worker = ListenerWorker(worker, host, options, self._backlog)
        super().__init__(worker, self._listener_worker, engine, on_evict)

    @property
    def restored(self) -> dict[str, str | int] | None:
        """The note of the snapshot it goes on with; None before `wait`, or if it began anew."""
        note = self._listener_worker.restored
        return None if note is None else dict(note)

    @property
    def error(self) -> MlxStreamError | None:
        """Why it cannot be used any more: it was not opened, or a step of its own failed."""
        return self._queue.failure or self._worker.error

    @property
    def backlog(self) -> int:
        """Characters fed that are not read; the last word is not among them, it may grow yet."""
        with self._worker.lock:
            return self._backlog.size

    def feed(self, text: str, timeout: float = 0.0) -> None:
        """Add text to the open turn; it is read in the background.

        Args:
            timeout: seconds to wait for room.

        Raises:
            QueueFull: there is no room for it after that.
            ValueRefused: there never can be.
            TextError: it is not valid Unicode.
            EngineClosed: the listener is closed.
            MlxStreamError: it could not be opened, or what was fed not be read.
        """
        check_text(text)
        backlog, worker = self._backlog, self._worker
        if len(text) > backlog.capacity:
            raise ValueRefused(
                f"{len(text):,} characters are more than the backlog ever holds, "
                f"{backlog.capacity:,}: feed them in parts"
            )
        self._deliver()
        with worker.lock:
            worker.wait_for(
                worker.changed,
                lambda: (
                    self._has_room(len(text)) or self._queue.closing or worker.closing or self.error
                ),
                timeout,
            )
            worker.check(self._queue)
            if self.error:
                raise reraise(self.error)
            if not self._has_room(len(text)):
                raise QueueFull(
                    f"{backlog.size:,} characters are waiting to be read, and of at most "
                    f"{backlog.capacity:,}: feed these {len(text):,} later"
                )
            backlog.add(text)
            worker.wake.notify()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all that was fed is read, the last word too.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds; it goes on.
            MlxStreamError: it could not be read.
        """
        fed, worker = self._fed(), self._listener_worker
        self._wait_for(lambda: worker.current().flush(fed), timeout)

    def ask(
        self,
        question: str,
        remember: bool = True,
        max_tokens: int | None = None,
        now: bool = False,
    ) -> Generator[Piece, None, None]:
        """Yield the pieces of an answer from what is attended; then listening goes on.

        The question ends the open turn, and a new one is opened behind the answer. Closing the
        generator stops the answer within a token. Asking again ends an answer that is going on.

        Args:
            remember: False asks a copy of the stream, which stays as it is, to the bit. The copy is
                counted in the engine's budget while it is there.
            now: without waiting for what was fed and is not read.

        Raises:
            TextError: the question is empty.
            MemoryRefused: the copy does not fit the budget.
            QueueFull: the engine has too much to do.
        """
        return iterate(self._ask_command(question, remember, max_tokens, now), self._deliver)

    def aask(
        self,
        question: str,
        remember: bool = True,
        max_tokens: int | None = None,
        now: bool = False,
    ) -> AsyncGenerator[Piece, None]:
        """As `ask`, for asyncio; cancelling who waits for it stops it within a token."""
        return iterate_async(self._ask_command(question, remember, max_tokens, now), self._deliver)

    def save(
        self, path: str | Path, note: Mapping[str, str | int], timeout: float | None = None
    ) -> None:
        """Write a snapshot, from which `Engine.listen(restore=path)` goes on, to the bit.

        It is whole or not there, and holds all that was fed so far: what is not read yet is read
        by whoever goes on. An answer that is going on is waited for.

        Args:
            note: small; given back in `restored`.

        Raises:
            ValueRefused: the note holds something else, or is too long.
            SnapshotError: it could not be written; what was there before still is.
            TimeoutError: it takes longer than `timeout` seconds; it is still going to be written.
        """
        path, copy, worker = Path(path).absolute(), check_note(note), self._listener_worker
        self._wait_for(lambda: worker.current().save(path, copy), timeout)

    # --- between the threads ---

    def _ask_command(
        self, question: str, remember: bool, max_tokens: int | None, now: bool
    ) -> Callable[[], Task]:
        check_question(question)
        check_limit(max_tokens)
        worker = self._listener_worker

        def ask() -> Task:
            with self._worker.lock:
                fed = None if now else self._fed()
                # It does not wait for whoever reads it: what is fed meanwhile waits for its end.
                return self._ask(
                    lambda: worker.current().ask(question, max_tokens, fed, remember), None
                )

        return ask

    def _wait_for(self, begin: Callable[[], Work], timeout: float | None) -> None:
        """Ask for something and wait for its end; an answer that is going on comes first."""
        self._worker.submit(self._queue, begin, None).outcome(timeout)
        self._deliver()

    def _fed(self) -> int:
        with self._worker.lock:
            return self._backlog.fed

    def _has_room(self, count: int) -> bool:
        return self._backlog.size + count <= self._backlog.capacity
