"""Handles of what runs on the engine's thread, for any other thread to hold."""

import copy
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any, Self

from mlx_stream.chat.exchange import Exchange
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.replies import check_limit, check_question, iterate, iterate_async
from mlx_stream.engine.session_worker import SessionWorker
from mlx_stream.engine.task import AHEAD, Task, Work
from mlx_stream.engine.worker import StreamOwner, Worker
from mlx_stream.generate.stats import Stats
from mlx_stream.text.pieces import Piece

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mlx_stream.chat.session import ChatSession

OnEvict = Callable[[int, int], None]
OnToken = Callable[[Piece], None]
Begin = Callable[["ChatSession"], Work]


class Handle:
    """What sessions and listeners have in common: a queue on the engine's thread.

    Args:
        engine: lives as long as a handle that is in use.
    """

    def __init__(
        self,
        worker: Worker,
        owner: StreamOwner,
        engine: Any,
        on_evict: OnEvict | None,
        on_token: OnToken | None = None,
    ):
        self._worker, self._engine = worker, engine
        self._on_evict, self._on_token = on_evict, on_token
        self._queue, self._opening = worker.open(owner)
        self._reply: Task | None = None
        weakref.finalize(self, self._queue.close).atexit = False

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is open: the model loaded, what it continues restored or read again.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds.
            MemoryRefused: it does not fit the engine's budget.
            TemplateError: a listener's template does not allow a turn to be kept open.
            MlxStreamError: as `load`, `ChatSession`, and for a name as `mlx_stream.sessions`.
        """
        self._opening.outcome(timeout)
        self._deliver()

    @property
    def stats(self) -> Stats:
        """How it stands after the last step: a copy."""
        return copy.copy(self._queue.owner.published)

    def close(self, timeout: float = 0.0) -> None:
        """End what is going on, save a session that has a name, free the ring; returns at once.

        A listener is not saved.

        Whoever still reads a reply, or waits for what was asked and is not done, gets EngineClosed.

        Args:
            timeout: seconds to wait for that.

        Raises:
            SessionError, SnapshotError: what was waited for could not be written.
        """
        self._queue.close()
        if timeout > 0:
            self._queue.wait_closed(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- between the threads ---

    def _ask(
        self, begin: Callable[[], Work], ahead: int | None = AHEAD, reply: bool = True
    ) -> Task:
        """Ask for something, and end the reply that is going on."""
        with self._worker.lock:
            task = self._worker.submit(self._queue, begin, ahead)
            before, self._reply = self._reply, task if reply else None
            if before:
                before.cancel()
        return task

    def _deliver(self, piece: Piece | None = None) -> None:
        """Call back what there is to tell, on the thread of whoever uses it."""
        with self._worker.lock:
            evicted, self._queue.owner.evicted = self._queue.owner.evicted, (0, 0)
        if self._on_evict and any(evicted):
            self._on_evict(*evicted)
        if self._on_token and piece:
            self._on_token(piece)


class Session(Handle):
    """A conversation on an engine, from `Engine.session`; every method may be called anywhere.

    Replies begin when their first piece is asked for, and are in order; asking for the next thing
    ends a reply that is going on. Nothing here waits but the pieces themselves, `wait`, and
    `close` with a timeout.
    """

    def __init__(
        self,
        worker: Worker,
        host: ModelHost,
        options: dict[str, Any],
        name: str | None,
        on_evict: OnEvict | None,
        on_token: OnToken | None,
        engine: Any,
    ):
        self.name = name
        self._session_worker = SessionWorker(worker, host, options, name)
        super().__init__(worker, self._session_worker, engine, on_evict, on_token)

    @property
    def exchanges(self) -> list[Exchange]:
        """The exchanges attended after the last thing asked was done, oldest first: a copy."""
        return [*self._session_worker.exchanges]

    def reply(self, question: str, max_tokens: int | None = None) -> Generator[Piece, None, None]:
        """Yield a reply's pieces as they come; closing the generator stops it within a token.

        Raises:
            TextError: the question is empty.
            ValueRefused: `max_tokens` below 1.
            QueueFull: the engine has too much to do.
            MlxStreamError: whatever went wrong; the engine and other sessions go on.
        """
        return iterate(self._reply_command(question, max_tokens), self._deliver)

    def areply(self, question: str, max_tokens: int | None = None) -> AsyncGenerator[Piece, None]:
        """As `reply`, for asyncio; cancelling who waits for it stops it within a token."""
        return iterate_async(self._reply_command(question, max_tokens), self._deliver)

    def retry(self, max_tokens: int | None = None) -> Generator[Piece, None, None]:
        """Answer the last question once more, in place of the last reply; as `reply`."""
        return iterate(self._retry_command(max_tokens), self._deliver)

    def aretry(self, max_tokens: int | None = None) -> AsyncGenerator[Piece, None]:
        return iterate_async(self._retry_command(max_tokens), self._deliver)

    def edit(self, question: str, max_tokens: int | None = None) -> Generator[Piece, None, None]:
        """Put another question in place of the last one, and answer it; as `reply`."""
        return iterate(self._edit_command(question, max_tokens), self._deliver)

    def aedit(self, question: str, max_tokens: int | None = None) -> AsyncGenerator[Piece, None]:
        return iterate_async(self._edit_command(question, max_tokens), self._deliver)

    def undo(self) -> "Future[Exchange]":
        """Take the last exchange back; `.result()` of what is returned waits for it.

        Its result, or error, is as of `ChatSession.undo`. In asyncio:
        `await asyncio.wrap_future(chat.undo())`. What is added by `add_done_callback` runs on the
        engine's thread: waiting there for the engine, as for a reply, raises ValueRefused.
        """
        return self._future(lambda chat: chat.undo())

    def clear(self) -> "Future[None]":
        """Let every exchange leave attention; as `undo`."""
        return self._future(lambda chat: chat.clear())

    def _reply_command(self, question: str, max_tokens: int | None) -> Callable[[], Task]:
        check_question(question)
        check_limit(max_tokens)
        return self._command(lambda chat: chat.reply_steps(question, max_tokens))

    def _retry_command(self, max_tokens: int | None) -> Callable[[], Task]:
        check_limit(max_tokens)
        return self._command(lambda chat: chat.retry_steps(max_tokens))

    def _edit_command(self, question: str, max_tokens: int | None) -> Callable[[], Task]:
        check_question(question)
        check_limit(max_tokens)
        return self._command(lambda chat: chat.edit_steps(question, max_tokens))

    def _command(self, begin: Begin) -> Callable[[], Task]:
        worker = self._session_worker  # what is asked for does not keep the session
        return lambda: self._ask(lambda: worker.reply(begin))

    def _future(self, action: "Callable[[ChatSession], Any]") -> "Future[Any]":
        from concurrent.futures import Future

        future: Future[Any] = Future()
        worker = self._session_worker
        self._ask(lambda: worker.perform(action), reply=False).promise(future)
        return future
