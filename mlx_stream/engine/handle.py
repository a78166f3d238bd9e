"""A conversation on an engine: its handle, for any thread, and what the engine's thread holds."""

import copy
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from mlx_stream.chat.exchange import Exchange
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.replies import iterate, iterate_async
from mlx_stream.engine.task import Task, Work, as_engine_error, reraise
from mlx_stream.engine.worker import SessionQueue, Worker
from mlx_stream.errors import EngineClosed, MlxStreamError, TextError, ValueRefused
from mlx_stream.generate.stats import Stats
from mlx_stream.text.pieces import Piece
from mlx_stream.text.tokenizer import check_text

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mlx_stream.chat.conversation import Conversation

    Pieces = Generator[Piece, None, None]
    Begin = Callable[[Conversation], Pieces]

OnEvict = Callable[[int, int], None]
OnToken = Callable[[Piece], None]


@dataclass(frozen=True)
class SessionView:
    """What there is to see of a conversation; exchanged whole, so any thread may look."""

    stats: Stats
    exchanges: tuple[Exchange, ...] = ()


class SessionWorker:
    """A conversation as the engine's thread holds it.

    Args:
        options: of `sessions.resume.Options`.
        name: of a saved conversation, or None.
    """

    def __init__(self, core: ModelHost, options: dict[str, Any], name: str | None):
        self.host, self.options, self.name = core, options, name
        self.key = core.new_key()
        self.conversation: Conversation | None = None
        self.error: MlxStreamError | None = None
        self.notices: list[str] = []
        self.evicted: list[tuple[int, int]] = []
        self.listened = False  # whether anybody wants to know what left
        self.view = SessionView(Stats())

    def open(self) -> Work:
        """Begin, or go on with what is saved; yields between the steps of that."""
        try:
            yield from self._open()
        except Exception as error:
            self.error = as_engine_error(error)
            self.host.budget.set_stream(self.key, 0)
            raise

    def _open(self) -> Work:
        from mlx_stream.chat import resume

        check_limit(self.options["max_tokens"])
        model, options = self.host.model_for(self.key), resume.SessionOptions(**self.options)
        if self.name is None:
            found = resume.begin(model, options, self.notify)
        else:
            found = yield from resume.open_steps(self.name, model, options, self.notify)
        found.chat.steps, found.chat.on_evict = True, self._evict
        found.chat.stats.notices = []
        found.chat.stats.add_notices(*self.notices)
        self.conversation = found

    def reply_steps(self, begin: "Begin") -> Work:
        """Yield a reply's pieces, and None after steps without text."""
        pieces = begin(self.check_open())
        try:
            for piece in pieces:
                yield piece if piece.text or piece.finish else None
        finally:
            pieces.close()

    def perform(self, what: "Callable[[Conversation], Any]") -> Work:
        """Do one thing, and return what it gives."""
        yield from ()
        return what(self.check_open())

    def check_open(self) -> "Conversation":
        if self.error:
            raise reraise(self.error)
        if self.conversation is None:
            raise EngineClosed("this session is closed: begin another one")
        return self.conversation

    def notify(self, line: str) -> None:
        """Keep what is told while it is opened; later its statistics have it anyway."""
        if self.conversation is None:
            self.notices.append(line)

    def after(self, job: Task | None) -> None:
        """Publish how things are."""
        if self.conversation is None:
            return
        chat = self.conversation.chat
        if job and job.cancelled and job.error:  # nobody else hears of it
            chat.stats.add_notices(str(job.error))
        exchanges = self.view.exchanges
        if job:
            exchanges = tuple(held.exchange for held in chat.evictor.state.turns)
            self.host.budget.set_stream(self.key, chat.cache.nbytes)
        self.view = SessionView(replace(chat.stats, notices=[*chat.stats.notices]), exchanges)

    def close(self) -> None:
        """Write what is not written, and let go of the ring."""
        found, self.conversation = self.conversation, None
        try:
            if found:
                found.close()
        finally:
            self.host.budget.set_stream(self.key, 0)

    def _evict(self, exchanges: int, tokens: int) -> None:
        if self.listened:
            self.evicted.append((exchanges, tokens))


class Session:
    """A conversation on an engine, from `Engine.session`; every method may be called anywhere.

    Replies begin when their first piece is asked for, and are in order; asking for the next thing
    ends a reply that is going on. Nothing here waits but the pieces themselves, `wait`, and
    `close` with a timeout.
    """

    def __init__(
        self,
        owner: Worker,
        core: ModelHost,
        options: dict[str, Any],
        name: str | None,
        on_evict: OnEvict | None,
        on_token: OnToken | None,
        engine: Any,
    ):
        self.name = name
        self._engine = engine  # lives as long as a session that is in use
        self._worker, self._on_evict, self._on_token = owner, on_evict, on_token
        self._session_worker = talk = SessionWorker(core, options, name)
        talk.listened = on_evict is not None
        self._queue = owner.add(SessionQueue(owner, talk.after, talk.close))
        self._reply: Task | None = None
        try:
            self._opening = owner.submit(self._queue, talk.open, None)
        except BaseException:
            self._queue.close()
            raise
        weakref.finalize(self, self._queue.close).atexit = False

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the session is open: the model loaded, what is missing of it read again.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds.
            MemoryRefused: it does not fit the engine's budget.
            MlxStreamError: as `load`, `ChatSession`, and for a name as `mlx_stream.sessions`.
        """
        self._opening.outcome(timeout)
        self._deliver()

    @property
    def stats(self) -> Stats:
        """How it stands after the last step: a copy."""
        return copy.copy(self._session_worker.view.stats)

    @property
    def exchanges(self) -> list[Exchange]:
        """The exchanges attended after the last thing asked was done, oldest first: a copy."""
        return [*self._session_worker.view.exchanges]

    def reply(self, question: str, max_tokens: int | None = None) -> Generator[Piece, None, None]:
        """Yield a reply's pieces as they come; closing the generator stops it within a token.

        Raises:
            TextError: the question is empty.
            ValueRefused: `max_tokens` below 1.
            QueueFull: the engine has too much to do.
            MlxStreamError: whatever went wrong; the engine and other sessions go on.
        """
        return self._consumed(reply_command(question, max_tokens))

    def areply(self, question: str, max_tokens: int | None = None) -> AsyncGenerator[Piece, None]:
        """As `reply`, for asyncio; cancelling who waits for it stops it within a token."""
        return self._consumed_async(reply_command(question, max_tokens))

    def retry(self, max_tokens: int | None = None) -> Generator[Piece, None, None]:
        """Answer the last question once more, in place of the last reply; as `reply`."""
        check_limit(max_tokens)
        return self._consumed(lambda talk: talk.retry(max_tokens=max_tokens))

    def aretry(self, max_tokens: int | None = None) -> AsyncGenerator[Piece, None]:
        check_limit(max_tokens)
        return self._consumed_async(lambda talk: talk.retry(max_tokens=max_tokens))

    def edit(self, question: str, max_tokens: int | None = None) -> Generator[Piece, None, None]:
        """Put another question in place of the last one, and answer it; as `reply`."""
        return self._consumed(edit_command(question, max_tokens))

    def aedit(self, question: str, max_tokens: int | None = None) -> AsyncGenerator[Piece, None]:
        return self._consumed_async(edit_command(question, max_tokens))

    def undo(self) -> "Future[Exchange]":
        """Take the last exchange back; `.result()` of what is returned waits for it.

        Its result, or error, is as of `ChatSession.undo`. In asyncio:
        `await asyncio.wrap_future(chat.undo())`. What is added by `add_done_callback` runs on the
        engine's thread: waiting there for the engine, as for a reply, raises ValueRefused.
        """
        return self._future(lambda talk: talk.undo())

    def clear(self) -> "Future[None]":
        """Let every exchange leave attention; as `undo`."""
        return self._future(lambda talk: talk.clear())

    def close(self, timeout: float = 0.0) -> None:
        """End what is going on, save what is saved, let go of the ring; returns at once.

        Whoever still reads a reply, or waits for what was asked and is not done, gets EngineClosed.

        Args:
            timeout: seconds to wait for that.

        Raises:
            SessionError, SnapshotError: what was waited for could not be written.
        """
        self._queue.close()
        if timeout > 0:
            self._queue.wait_closed(timeout)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- between the threads ---

    def _ask(self, work: Callable[[], Work], reply: bool = True) -> Task:
        """Ask for something, and end the reply that is going on."""
        with self._worker.lock:
            job = self._worker.submit(self._queue, work)
            before, self._reply = self._reply, job if reply else None
            if before:
                before.cancel()
        return job

    def _consumed(self, begin: "Begin") -> Generator[Piece, None, None]:
        talk = self._session_worker  # what is asked for does not keep the session
        return iterate(lambda: self._ask(lambda: talk.reply_steps(begin)), self._deliver)

    def _consumed_async(self, begin: "Begin") -> AsyncGenerator[Piece, None]:
        talk = self._session_worker
        return iterate_async(lambda: self._ask(lambda: talk.reply_steps(begin)), self._deliver)

    def _future(self, what: "Callable[[Conversation], Any]") -> "Future[Any]":
        from concurrent.futures import Future

        future: Future[Any] = Future()
        talk = self._session_worker
        self._ask(lambda: talk.perform(what), reply=False).promise(future)
        return future

    def _deliver(self, piece: Piece | None = None) -> None:
        """Call back what there is to tell, on the thread of whoever reads the reply."""
        told, self._session_worker.evicted = self._session_worker.evicted, []
        if self._on_evict and told:
            self._on_evict(sum(e for e, _ in told), sum(t for _, t in told))
        if self._on_token and piece:
            self._on_token(piece)


def reply_command(question: str, max_tokens: int | None) -> "Begin":
    check_question(question)
    check_limit(max_tokens)
    return lambda talk: talk.reply(question, max_tokens=max_tokens)


def edit_command(question: str, max_tokens: int | None) -> "Begin":
    check_question(question)
    check_limit(max_tokens)
    return lambda talk: talk.edit(question, max_tokens=max_tokens)


def check_question(question: str) -> None:
    check_text(question)
    if not question:
        raise TextError("the question is empty")


def check_limit(max_tokens: int | None) -> None:
    if max_tokens is not None and not (isinstance(max_tokens, Integral) and max_tokens >= 1):
        raise ValueRefused(f"max_tokens must be a whole number, at least 1, not {max_tokens!r}")
