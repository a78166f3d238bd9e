"""A handle to a listener on the engine's thread, for use on any other thread."""

from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from mlx_stream.engine.handle import Handle, OnEvict, Submit, check_limit, check_question
from mlx_stream.engine.listener_snapshot import check_note
from mlx_stream.engine.listener_stream import Backlog, ListenerOptions
from mlx_stream.engine.listener_worker import ListenerWorker
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.task import Task, Work, reraise
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import MlxStreamError, QueueFull, ValueRefused
from mlx_stream.text.pieces import Piece
from mlx_stream.text.valid_text import check_text


class Listener(Handle):
    """A stream that reads text in the background and answers questions about it.

    The text forms one open user turn; its latest part is attended to. Any thread may call the
    methods. Only `feed` with a timeout, `flush`, `save`, `wait` and iterating over an answer block
    the caller.
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
        self._backlog = Backlog(worker.lock, capacity)
        self._listener_worker = ListenerWorker(worker, host, options, self._backlog)
        super().__init__(worker, self._listener_worker, engine, on_evict)

    @property
    def restored(self) -> dict[str, str | int] | None:
        """The note in the restored snapshot; None before `wait`, or if the stream started empty."""
        note = self._listener_worker.restored
        return None if note is None else dict(note)

    @property
    def error(self) -> MlxStreamError | None:
        """Why the listener is not usable: it could not be opened, or one of its steps failed."""
        return self._queue.failure or self._worker.error

    @property
    def backlog(self) -> int:
        """Characters fed but not yet read, except those of the last word, which may still grow."""
        return self._backlog.size

    def feed(self, text: str, timeout: float = 0.0) -> None:
        """Add text to the open turn; it is read in the background.

        Args:
            timeout: seconds to wait for room in the backlog.

        Raises:
            QueueFull: there was no room within that time.
            ValueRefused: the text is longer than the capacity of the backlog.
            TextError: the text is not valid Unicode.
            EngineClosed: the listener is closed.
            MlxStreamError: the listener could not be opened, or reading failed.
        """
        check_text(text)
        backlog, worker = self._backlog, self._worker
        if len(text) > backlog.capacity:
            raise ValueRefused(
                f"{len(text):,} characters exceed the whole backlog of {backlog.capacity:,}: feed "
                "them in parts"
            )
        self._deliver()

        def has_room() -> bool:
            return backlog.size + len(text) <= backlog.capacity

        with worker.lock:
            worker.wait_for(
                lambda: has_room() or self._queue.closing or worker.closing or self.error, timeout
            )
            worker.check(self._queue)
            if self.error:
                raise reraise(self.error)
            if not has_room():
                raise QueueFull(
                    f"the backlog has no room ({backlog.size:,} of {backlog.capacity:,} "
                    f"characters): feed these {len(text):,} characters later, or pass a timeout"
                )
            backlog.add(text)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything fed so far has been read, including the last word.

        Raises:
            TimeoutError: reading takes longer than `timeout` seconds; it continues anyway.
            MlxStreamError: reading failed.
        """
        fed, worker = self._backlog.fed, self._listener_worker
        self._wait_for(lambda: worker.current().flush(fed), timeout)

    def ask(
        self,
        question: str,
        remember: bool = True,
        max_tokens: int | None = None,
        now: bool = False,
    ) -> Generator[Piece, None, None]:
        """Yield the pieces of an answer from the attended text, then keep listening.

        The question ends the open turn, and a new turn opens after the answer. Closing the
        generator stops the answer within one token. Asking again ends an answer in progress.

        Args:
            remember: if False, a copy of the stream is asked, and the stream itself is left
                unchanged. The copy counts towards the engine's budget while it exists.
            now: answer without waiting for text that has not been read yet.

        Raises:
            TextError: the question is empty.
            MemoryRefused: the copy does not fit the budget.
            QueueFull: too many commands are waiting.
        """
        return self._pieces(self._ask_command(question, remember, max_tokens, now))

    def aask(
        self,
        question: str,
        remember: bool = True,
        max_tokens: int | None = None,
        now: bool = False,
    ) -> AsyncGenerator[Piece, None]:
        """Like `ask`, but for asyncio; cancelling the task that reads it stops the answer."""
        return self._pieces_async(self._ask_command(question, remember, max_tokens, now))

    def save(
        self, path: str | Path, note: Mapping[str, str | int], timeout: float | None = None
    ) -> None:
        """Write a snapshot, from which `Engine.listen(restore=path)` continues bit for bit.

        The file is written completely or not at all. It contains everything fed so far; text that
        has not been read yet is read after restoring. An answer in progress is finished first.

        Args:
            note: a small dict, returned by `restored`.

        Raises:
            ValueRefused: the note contains values of other types, or is too long.
            SnapshotError: the file could not be written; any earlier file is kept.
            TimeoutError: saving takes longer than `timeout` seconds; the file will still be
                written.
        """
        path, copy, worker = Path(path).absolute(), check_note(note), self._listener_worker
        self._wait_for(lambda: worker.current().save(path, copy), timeout)

    # --- between the threads ---

    def _ask_command(
        self, question: str, remember: bool, max_tokens: int | None, now: bool
    ) -> Submit:
        check_question(question)
        check_limit(max_tokens)
        worker = self._listener_worker

        def submit() -> Task:
            fed = None if now else self._backlog.fed
            # The answer does not pause for its reader, because text fed in the meantime waits for
            # the answer.
            return self._ask(
                lambda: worker.current().ask(question, max_tokens, fed, remember), None
            )

        return submit

    def _wait_for(self, begin: Callable[[], Work], timeout: float | None) -> None:
        """Submit a task to run after any answer in progress, and wait for it to finish."""
        self._worker.outcome(self._worker.submit(self._queue, begin, None), timeout)
        self._deliver()
