"""A conversation on the engine's thread."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from mlx_stream.chat import resume
from mlx_stream.chat.eviction import ActiveTurn
from mlx_stream.chat.exchange import Exchange, unread_ids
from mlx_stream.chat.messages import Message, Question, as_messages, text_of_messages
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.session import ChatSession, Progress
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.task import Work
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import EngineClosed, MlxStreamError
from mlx_stream.generate.stats import MOST_NOTICES, Stats
from mlx_stream.text.pieces import Piece


class ReadProgress(NamedTuple):
    """How many tokens of a prompt have been read, how many there are, and whom to notify."""

    report: Progress
    done: int
    total: int


Begin = Callable[[ChatSession, Progress | None], Work]
IdleWork = Callable[[ChatSession], Generator[None, None, None]]


@dataclass(frozen=True)
class ReplyStart:
    """A conversation just before the prompt of a reply is read.

    Attributes:
        attended: the number of tokens attended when the reply begins.
        read: how many of them are read for this reply.
        turns: how many earlier turns are attended.
        evicted: how many of the tokens read have been evicted since the conversation began.
        window, sinks, cache_bytes: the sizes of the stream's window, sinks and cache.
        restarted: whether earlier turns were evicted because `ReplyPlan.history` fills the window.
    """

    attended: int
    read: int
    turns: int
    evicted: int
    window: int
    sinks: int
    cache_bytes: int
    restarted: bool
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplyEnd:
    """A conversation after a reply, before anything is read to settle it.

    Attributes:
        exchange: the turn; None if it did not begin, or the template refused it.
        replaced: whether the last turn was rolled back to be answered again.
        sizes: the number of tokens in each attended turn, oldest first.
        failed: whether the stream was lost in a failed step.
        notices: notices for the user since the reply began.
    """

    exchange: Exchange | None
    replaced: bool
    sizes: tuple[int, ...]
    failed: bool
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplyPlan:
    """A reply to write, and the changes to make to the conversation first.

    Attributes:
        question: None to answer the last question again.
        back: how many of the latest turns are rolled back first.
        keep: how many of the latest remaining turns may stay attended. Default: all.
        history: turns to read as text after the attended ones; see `ChatSession.follow`.
        unread: how many turns before the history are not read.
        given: returns how many characters of the answer the reader has taken. If the reply is
            cancelled, the rest is rolled back.
        on_end: called on the engine's thread with the reply's end, or with None if an option was
            refused before anything changed. It must return immediately.
    """

    question: Question | None
    back: int = 0
    keep: int | None = None
    history: Sequence[Message] = ()
    unread: int = 0
    given: Callable[[], int] = int
    on_end: Callable[[ReplyEnd | None], None] = lambda end: None


class SessionWorker:
    """One conversation; see `StreamOwner`.

    Args:
        name: the name of a saved conversation, or None.
        shared: see `StreamOwner`.
        restore: see `Engine.session`.

    Attributes:
        exchanges: the attended exchanges as of the last reply or task; replaced, never modified in
            place.
        copied: the conversation to start with, if this is a copy of another session.
        idle_work: see `Session.when_idle`; None once it has begun.
    """

    def __init__(
        self,
        worker: Worker,
        host: ModelHost,
        options: resume.SessionOptions,
        name: str | None,
        shared: bool,
        restore: Callable[[ChatSession], None] | None = None,
    ):
        self.worker, self.host, self.options, self.name = worker, host, options, name
        self.shared, self.closed, self._restore = shared, False, restore
        self.idle_work: IdleWork | None = None
        self._idle_steps: Generator[None, None, None] | None = None
        self.copied: Future[ChatSession] | None = None
        self.key = object()
        self.chat: ChatSession | None = None
        self.saved: SavedSession | None = None
        self.evicted: tuple[int, int] = (0, 0)
        self.exchanges: tuple[Exchange, ...] = ()
        self.notices: deque[str] = deque(maxlen=MOST_NOTICES)

    @property
    def usable(self) -> bool:
        return self.chat is not None

    def open(self) -> Work:
        """Start a conversation, or resume a saved one; a coroutine."""
        model = self.host.model_for(self.key)
        options = replace(self.options, prefixes=self.host.prefixes[self.shared])
        if self.copied:
            chat, self.copied = self.copied.result(), None
        elif self.name is None:
            chat = resume.new_chat(model, options, self.notices.append)
            if self._restore:
                self._restore(chat)
        else:
            steps = resume.open_steps(self.name, model, options, self.notices.append)
            self.saved = yield from steps
            chat = self.saved.chat
        chat.on_evict, chat.stats.notices = self._evict, [*self.notices]
        self.chat = chat

    def reply(self, begin: Begin, progress: Progress | None) -> Work:
        """Return the coroutine that writes a reply.

        Args:
            progress: called on the thread that iterates over the reply, after each step that reads
                tokens.
        """
        assert self.chat
        if progress is None:
            return (yield from begin(self.chat, None))
        waiting = deque[ReadProgress]()
        tell = partial(ReadProgress, progress)
        steps, result = begin(self.chat, lambda *counts: waiting.append(tell(*counts))), None
        try:
            while True:
                item = steps.send(result)
                while waiting:
                    yield waiting.popleft()
                result = yield item
        except StopIteration:
            return
        finally:
            steps.close()

    def carry_out(
        self, plan: ReplyPlan, max_tokens: int | None, progress: Progress | None, options: Any
    ) -> Work:
        """Return the coroutine that writes a planned reply.

        It yields a `ReplyStart`, then progress and pieces, and a `ReplyEnd` after the last piece.
        """
        chat, waiting, given = self.chat, deque[ReadProgress](), {**options}
        assert chat
        if progress:
            tell = partial(ReadProgress, progress)
            given["progress"] = lambda *counts: waiting.append(tell(*counts))
        try:
            if plan.question is None:
                steps = chat.retry_steps(max_tokens, **given)
            else:
                steps = chat.reply_steps(plan.question, max_tokens, **given)
        except MlxStreamError:
            plan.on_end(None)
            raise
        self.drop_idle_work()
        settled, start, end, begun = chat.stats.settled, None, None, 0
        restarted = prepare(chat, plan, max_tokens)
        turns, result, finished, reported = number_of_turns(chat), None, False, False
        try:
            while True:
                item = steps.send(result)
                state = chat.evictor.state
                if start is None and isinstance(state, ActiveTurn):
                    begun = state.reply.final - state.reply.answer_at
                    start = self._start_of(state, chat.stats.settled - settled, restarted)
                    yield start
                if finished and end is None:
                    end = self._end_of(plan, turns, start is not None)
                    yield end
                    reported = True
                while waiting:
                    yield waiting.popleft()
                finished = finished or (isinstance(item, Piece) and item.finish is not None)
                result = yield item
        except StopIteration:
            pass
        finally:
            state = chat.evictor.state
            if isinstance(state, ActiveTurn) and not state.reply.calls:
                state.reply.cut(begun + plan.given())
            steps.close()
            end = end or self._end_of(plan, turns, start is not None)
        if not reported:
            yield end

    def _start_of(self, state: ActiveTurn, settled: int, restarted: bool) -> ReplyStart:
        chat = self.chat
        assert chat
        geometry, turns = chat.cache.geometry, (*state.turns, state.turn)
        unread = len(unread_ids(chat.prompts.pinned, turns, chat.tokens.length)) + state.reply.count
        return ReplyStart(
            min(geometry.sinks + geometry.window, chat.cache.attended + unread),
            settled + unread,
            len(state.turns),
            chat.cache.evicted,
            geometry.window,
            geometry.sinks,
            chat.cache.nbytes,
            restarted,
            self._take_notices(),
        )

    def _end_of(self, plan: ReplyPlan, turns: int, started: bool) -> ReplyEnd:
        """Report the end of a planned reply, and return it.

        Args:
            turns: the number of turns before it.
        """
        chat = self.chat
        assert chat
        attended = [] if chat.tokens.failed else chat.evictor.state.turns
        replaced = started and plan.question is None
        added = started and number_of_turns(chat) == turns + (not replaced)
        exchange = attended[-1].exchange if attended and added else None
        sizes = tuple(len(t.exchange.closing_ids) + len(t.exchange.ids) for t in attended)
        # The recipient of `end` may read the exchanges before the turn has been settled.
        self.exchanges = tuple(turn.exchange for turn in chat.evictor.state.turns)
        end = ReplyEnd(exchange, replaced, sizes, chat.tokens.failed, self._take_notices())
        plan.on_end(end)
        return end

    def _take_notices(self) -> tuple[str, ...]:
        found = tuple(self.notices)
        self.notices.clear()
        return found

    def copy_of(self, source: ChatSession, back: int) -> ChatSession:
        """Return a copy of another session's conversation, for this session to start with."""
        if self.closed:
            raise EngineClosed("this session was closed before the copy was made")
        return source.fork(back, self.host.model_for(self.key), self.notices.append)

    def perform(self, action: Callable[[ChatSession], Any]) -> Work:
        """Run an action that reads no tokens, and return its result; a coroutine."""
        yield from ()
        assert self.chat
        return action(self.chat)

    def update(self, task_ended: bool) -> Stats | None:
        if self.chat is None:
            return None
        if task_ended:
            self.exchanges = tuple(turn.exchange for turn in self.chat.evictor.state.turns)
            self.host.budget.set_stream(self.key, self.chat.cache.nbytes)
        return self.chat.stats

    def waiting(self) -> bool:
        return self.chat is not None and bool(self.idle_work or self._idle_steps)

    def step(self) -> None:
        """Do one step of the idle work."""
        if self._idle_steps is None and self.idle_work and self.chat:
            work, self.idle_work = self.idle_work, None
            self._idle_steps = work(self.chat)
        if self._idle_steps and next(self._idle_steps, self) is self:
            self._idle_steps = None

    def drop_idle_work(self) -> None:
        """Stop the idle work, even if it is unfinished."""
        steps, self.idle_work, self._idle_steps = self._idle_steps, None, None
        if steps:
            steps.close()

    def close(self) -> None:
        """Finish the idle work, save any unsaved changes, and release the ring."""
        try:
            while self.waiting():
                self.step()
        finally:
            self._release()

    def _release(self) -> None:
        self.drop_idle_work()
        saved, self.chat, self.saved = self.saved, None, None
        self.copied, self.closed = None, True
        try:
            if saved:
                saved.close()
        finally:
            self.host.budget.set_stream(self.key, 0)

    def _evict(self, exchanges: int, tokens: int) -> None:
        with self.worker.lock:
            self.evicted = self.evicted[0] + exchanges, self.evicted[1] + tokens


def number_of_turns(chat: ChatSession) -> int:
    """Return how many turns a conversation has had, not counting a question without a reply."""
    return chat.number - bool(chat.pending)


def prepare(chat: ChatSession, plan: ReplyPlan, max_tokens: int | None) -> bool:
    """Prepare a conversation for a planned reply; nothing is read.

    Returns:
        Whether every attended turn was evicted, because the plan's history fills the window.
    """
    for _ in range(plan.back + bool(chat.pending)):
        chat.undo()
    turns, number = chat.evictor.state.turns, chat.number
    if plan.keep is not None and plan.keep < len(turns):
        chat.clear(turns[len(turns) - plan.keep].number if plan.keep else number + 1)
    if plan.history or plan.unread:
        room = room_for(chat, plan.question or "", max_tokens)
        chat.follow(plan.history, plan.unread, room)
    after = chat.evictor.state.turns
    return bool(turns and after) and after[0].number > number


def room_for(chat: ChatSession, question: Question, max_tokens: int | None) -> int:
    """Estimate how many tokens of the window a question and its reply need."""
    window = chat.cache.geometry.window
    plain = Message("user", text_of_messages(as_messages(question)))
    limit = chat.max_tokens if max_tokens is None else max_tokens
    return len(chat.prompts.question([plain], None, first=False)[1]) + min(limit, window // 4)
