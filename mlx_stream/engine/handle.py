"""Handles to the streams on the engine's thread, for use on any other thread."""

import asyncio
import copy
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from numbers import Integral
from typing import Any, Self, Unpack, get_type_hints

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.messages import Question, turn_of_messages
from mlx_stream.chat.resume import SessionOptions
from mlx_stream.chat.session import ChatSession, Progress
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.reply_reader import ReplyReader
from mlx_stream.engine.session_worker import IdleWork, ReadProgress, ReplyPlan, SessionWorker
from mlx_stream.engine.task import AHEAD, SHARED_AHEAD, Task, Work
from mlx_stream.engine.text_worker import TextOptions, TextWorker
from mlx_stream.engine.worker import StreamOwner, Worker
from mlx_stream.errors import TextError, TypeRefused, ValueRefused
from mlx_stream.errors.argument_types import refuse_wrong_types
from mlx_stream.generate.stats import Stats
from mlx_stream.sampling import ReplyOptions
from mlx_stream.text.pieces import Piece
from mlx_stream.text.valid_text import check_text

OnEvict = Callable[[int, int], None]
OnToken = Callable[[Piece], None]
Submit = Callable[[], Task]


class Handle:
    """The base class of sessions and listeners, with a queue on the engine's thread.

    Args:
        engine: kept alive by its handles.
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

    def __repr__(self) -> str:
        state = "closed: " if self._queue.closing or self._worker.closing else ""
        return f"{type(self).__name__}({state}{self.stats})"

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the model is loaded and the stream is open, whether restored or read again.

        Raises:
            TimeoutError: opening takes longer than `timeout` seconds.
            MemoryRefused: the stream does not fit the engine's budget.
            TemplateError: the model's template does not allow a listener's open turn.
            MlxStreamError: see `load`, `ChatSession` and, for a saved session,
                `mlx_stream.sessions`.
        """
        self._worker.outcome(self._opening, timeout)
        self._deliver()

    @property
    def stats(self) -> Stats:
        """A copy of the statistics after the last step."""
        return copy.copy(self._queue.published)

    def close(self, timeout: float = 0.0) -> None:
        """Stop the work in progress, save a named session, and free the ring. Returns immediately.

        Listeners are not saved. Threads that wait for a reply or another result get EngineClosed.

        Args:
            timeout: seconds to wait for all of this to finish.

        Raises:
            SessionError, SnapshotError: the session could not be saved; raised only with a timeout.
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
        """Submit a task, and cancel the reply in progress."""
        if ahead is not None and self._queue.owner.shared:
            ahead = SHARED_AHEAD
        with self._worker.lock:
            task = self._worker.submit(self._queue, begin, ahead)
            before, self._reply = self._reply, task if reply else None
            if before:
                before.supersede()
        return task

    def _pieces(self, submit: Submit) -> Generator[Piece, None, None]:
        """Submit a task and yield its pieces; closing the generator cancels the task."""
        task, finish = submit(), None
        try:
            while (item := self._worker.take(task)) is not None:
                if (piece := self._deliver(item)) is not None:
                    finish = piece.finish
                    yield piece
            if last := self._last(task, finish):
                yield last
        finally:
            task.cancel()

    async def _pieces_async(self, submit: Submit) -> AsyncGenerator[Piece, None]:
        """Like `_pieces`, but without blocking the event loop."""
        self._worker.check_elsewhere()
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(arrived.set)

        task, finish = submit(), None
        task.tell = tell
        try:
            while True:
                arrived.clear()
                done = task.done  # read this first, or a piece that arrives now would be missed
                item = self._worker.take_now(task)
                if item is not None:
                    if (piece := self._deliver(item)) is not None:
                        finish = piece.finish
                        yield piece
                elif done:
                    break
                else:
                    await arrived.wait()
            if last := self._last(task, finish):
                yield last
        finally:
            task.cancel()

    def _last(self, task: Task, finish: str | None) -> Piece | None:
        """Return the last piece of a reply that another request ended early; otherwise None."""
        last = Piece("", "superseded") if task.superseded and not finish else None
        self._deliver(last)
        return last

    def _deliver(self, item: Piece | ReadProgress | None = None) -> Piece | None:
        """Run pending callbacks on the caller's thread; return a piece unchanged."""
        with self._worker.lock:
            evicted, self._queue.owner.evicted = self._queue.owner.evicted, (0, 0)
        if self._on_evict and any(evicted):
            self._on_evict(*evicted)
        if isinstance(item, ReadProgress):
            item.report(item.done, item.total)
            return None
        if self._on_token and item:
            self._on_token(item)
        return item


class EngineReplyOptions(ReplyOptions, total=False):
    """Options for one reply.

    Attributes:
        stop: strings that end the reply, instead of the session's.
        progress: called on the thread that iterates over the reply, while earlier turns and then
            the question are being read, with the number of tokens read and the total.
    """

    stop: Sequence[str] | None
    progress: Progress | None


class Session(Handle):
    """A conversation on an engine, created by `Engine.session`; any thread may call its methods.

    A reply starts when its first piece is requested. Any other request ends a reply in progress.
    Only iterating over pieces, `wait`, and `close` with a timeout block the caller.
    """

    def __init__(
        self,
        worker: Worker,
        host: ModelHost,
        options: SessionOptions,
        name: str | None,
        on_evict: OnEvict | None,
        on_token: OnToken | None,
        engine: Any,
        shared: bool,
        restore: Callable[[ChatSession], None] | None = None,
    ):
        check_limit(options.max_tokens)
        self.name, self._host, self._options = name, host, options
        self._session_worker = SessionWorker(worker, host, options, name, shared, restore)
        super().__init__(worker, self._session_worker, engine, on_evict, on_token)

    @property
    def exchanges(self) -> list[Exchange]:
        """A copy of the attended exchanges as of the last task, oldest first."""
        return [*self._session_worker.exchanges]

    def reply(
        self,
        question: Question,
        max_tokens: int | None = None,
        **options: Unpack[EngineReplyOptions],
    ) -> Generator[Piece, None, None]:
        """Yield the pieces of a reply; closing the generator stops it within a few tokens.

        Args:
            options: see `ReplyOptions`, and `stop` of `ChatSession.reply`.

        Raises:
            TextError: the question is empty.
            ValueRefused: `max_tokens` is below 1, or an option is out of range.
            QueueFull: the engine's queue is full.
            MlxStreamError: the reply failed; the engine and its other sessions keep running.
        """
        return self._pieces(self._reply_to(question, max_tokens, options))

    def areply(
        self,
        question: Question,
        max_tokens: int | None = None,
        **options: Unpack[EngineReplyOptions],
    ) -> AsyncGenerator[Piece, None]:
        """Like `reply`, but for asyncio; cancelling the task that reads it stops the reply."""
        return self._pieces_async(self._reply_to(question, max_tokens, options))

    def retry(
        self, max_tokens: int | None = None, **options: Unpack[EngineReplyOptions]
    ) -> Generator[Piece, None, None]:
        """Answer the last question again, in place of the last reply; see `reply`."""
        return self._pieces(self._retry(max_tokens, options))

    def aretry(
        self, max_tokens: int | None = None, **options: Unpack[EngineReplyOptions]
    ) -> AsyncGenerator[Piece, None]:
        return self._pieces_async(self._retry(max_tokens, options))

    def edit(
        self,
        question: Question,
        max_tokens: int | None = None,
        **options: Unpack[EngineReplyOptions],
    ) -> Generator[Piece, None, None]:
        """Replace the last question and answer the new one; see `reply`."""
        return self._pieces(self._reply_to(question, max_tokens, options, edit=True))

    def aedit(
        self,
        question: Question,
        max_tokens: int | None = None,
        **options: Unpack[EngineReplyOptions],
    ) -> AsyncGenerator[Piece, None]:
        return self._pieces_async(self._reply_to(question, max_tokens, options, edit=True))

    def begin(
        self,
        plan: ReplyPlan,
        max_tokens: int | None = None,
        **options: Unpack[EngineReplyOptions],
    ) -> ReplyReader:
        """Change the conversation as planned, then start a reply immediately; return its reader.

        Raises:
            ValueRefused, TextError, QueueFull: as in `reply`.
        """
        if plan.question is not None:
            turn_of_messages(plan.question)
        check_reply_options(max_tokens, options)
        worker, given = self._session_worker, {**options}
        report: Any = given.pop("progress", None)
        task = self._ask(lambda: worker.carry_out(plan, max_tokens, report, given))
        return ReplyReader(self._worker, task, self)

    def when_idle(self, work: IdleWork | None) -> None:
        """Set the work to do while this session is idle; returns immediately.

        Args:
            work: called on the engine's thread; returns a generator, which is run one step at a
                time and must not raise. The next reply ends it; before the session closes, it is
                run to completion. None for no work.
        """
        with self._worker.lock:
            self._session_worker.idle_work = work
            self._worker.lock.notify_all()

    def undo(self) -> Future[Exchange]:
        """Undo the last exchange; return a future for the result of `ChatSession.undo`.

        Cancelling the future before the engine gets to it leaves the exchange in place. With
        asyncio, use `await asyncio.wrap_future(chat.undo())`. The future's callbacks run on the
        engine's thread, where waiting for the engine (for example, for a reply) raises
        ValueRefused.
        """
        return self._future(lambda chat: chat.undo())

    def clear(self) -> Future[None]:
        """Evict every exchange; return a future, as `undo` does."""
        return self._future(lambda chat: chat.clear())

    def fork(
        self, back: int = 0, on_evict: OnEvict | None = None, on_token: OnToken | None = None
    ) -> "Session":
        """Start a session that continues from a copy of this one's state. Returns immediately.

        The new session has its own ring, charged to the engine's budget, and is not saved. Commands
        already given to this session run first, and a reply in progress ends.

        Args:
            back: how many of the last exchanges to undo in the new session.
            on_evict, on_token: see `Engine.session`.

        Raises:
            QueueFull, EngineClosed: see `Engine.session`. The new session's methods raise
                ValueRefused if fewer than `back` exchanges are attended to, or MemoryRefused if the
                copy does not fit the budget.
        """
        with self._worker.lock:  # so that the copy is made before the session opens
            found = Session(
                self._worker,
                self._host,
                self._options,
                None,
                on_evict,
                on_token,
                self._engine,
                self._session_worker.shared,
            )
            copy = found._session_worker.copy_of
            try:
                copied = self._future(lambda chat: copy(chat, back))
            except BaseException:
                found.close()
                raise
            found._wait_for(copied)
        return found

    def _wait_for(self, copied: "Future[ChatSession]") -> None:
        """Open this session once the other session has been copied."""
        opening, worker = self._opening, self._worker
        self._session_worker.copied, opening.ahead = copied, 0

        def resume(_: object) -> None:
            with worker.lock:
                opening.ahead = None
                worker.lock.notify_all()

        copied.add_done_callback(resume)

    def _reply_to(
        self,
        question: Question,
        max_tokens: int | None,
        options: EngineReplyOptions,
        edit: bool = False,
    ) -> Submit:
        turn_of_messages(question)
        check_reply_options(max_tokens, options)
        steps = ChatSession.edit_steps if edit else ChatSession.reply_steps
        return self._submit(partial(steps, question=question, max_tokens=max_tokens), options)

    def _retry(self, max_tokens: int | None, options: EngineReplyOptions) -> Submit:
        check_reply_options(max_tokens, options)
        return self._submit(partial(ChatSession.retry_steps, max_tokens=max_tokens), options)

    def _submit(self, steps: Callable[..., Work], options: EngineReplyOptions) -> Submit:
        worker = self._session_worker  # the task must not keep the session alive
        report = options.get("progress")

        def begin(chat: ChatSession, progress: Progress | None) -> Work:
            return steps(chat, **{**options, "progress": progress})

        return lambda: self._ask(lambda: worker.reply(begin, report))

    def _future(self, action: Callable[[ChatSession], Any]) -> Future[Any]:
        worker = self._session_worker
        return self._ask(lambda: worker.perform(action), reply=False).future


class TextReply(Handle):
    """A single completion of a text, from `Engine.complete`."""

    def __init__(
        self, worker: Worker, host: ModelHost, options: TextOptions, engine: Any, shared: bool
    ):
        check_limit(options.max_tokens)
        self._text_worker = TextWorker(host, options, shared)
        super().__init__(worker, self._text_worker, engine, None)

    def pieces(self, progress: Progress | None = None) -> Generator[Piece, None, None]:
        """Yield the pieces; closing the generator stops the completion within a few tokens."""
        return self._pieces(self._write(progress))

    def apieces(self, progress: Progress | None = None) -> AsyncGenerator[Piece, None]:
        """Like `pieces`, but for asyncio."""
        return self._pieces_async(self._write(progress))

    def _write(self, progress: Progress | None) -> Submit:
        worker = self._text_worker  # the task must not keep this handle alive
        return lambda: self._ask(lambda: worker.write(progress))


def check_question(question: str) -> None:
    check_text(question)
    if not question:
        raise TextError("the question is empty")


def check_reply_options(max_tokens: int | None, options: EngineReplyOptions) -> None:
    """Refuse options that would otherwise fail on the engine's thread."""
    check_limit(max_tokens)
    hints = get_type_hints(EngineReplyOptions)
    if unknown := sorted(options.keys() - hints.keys()):
        raise TypeRefused(f"`{unknown[0]}` is not a reply option; use {', '.join(hints)}")
    refuse_wrong_types(options, hints)


def check_limit(max_tokens: int | None) -> None:
    if max_tokens is not None and not (isinstance(max_tokens, Integral) and max_tokens >= 1):
        raise ValueRefused(f"`max_tokens` must be a whole number, at least 1, not {max_tokens!r}")
