"""A conversation on the engine's thread."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from mlx_stream.chat import resume
from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.session import ChatSession, Progress
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.task import Work
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import EngineClosed
from mlx_stream.generate.stats import MOST_NOTICES, Stats


class ReadProgress(NamedTuple):
    """How many tokens of a prompt have been read, how many there are, and whom to notify."""

    report: Progress
    done: int
    total: int


Begin = Callable[[ChatSession, Progress | None], Work]


class SessionWorker:
    """One conversation; see `StreamOwner`.

    Args:
        name: the name of a saved conversation, or None.
        shared: see `StreamOwner`.

    Attributes:
        exchanges: the attended exchanges as of the last task; replaced, never modified in place.
        copied: the conversation to start with, if this is a copy of another session.
    """

    def __init__(
        self,
        worker: Worker,
        host: ModelHost,
        options: resume.SessionOptions,
        name: str | None,
        shared: bool,
    ):
        self.worker, self.host, self.options, self.name = worker, host, options, name
        self.shared, self.closed = shared, False
        self.copied: Future[ChatSession] | None = None
        self.key = object()
        self.chat: ChatSession | None = None
        self.saved: SavedSession | None = None
        self.evicted: tuple[int, int] = (0, 0)
        self.exchanges: tuple[Exchange, ...] = ()

    @property
    def usable(self) -> bool:
        return self.chat is not None

    def open(self) -> Work:
        """Start a conversation, or resume a saved one; a coroutine."""
        model = self.host.model_for(self.key)
        options = replace(self.options, prefixes=self.host.prefixes[self.shared])
        notices: deque[str] = deque(maxlen=MOST_NOTICES)
        if self.copied:
            chat, self.copied = self.copied.result(), None
        elif self.name is None:
            chat = resume.new_chat(model, options, notices.append)
        else:
            steps = resume.open_steps(self.name, model, options, notices.append)
            self.saved = yield from steps
            chat = self.saved.chat
        chat.on_evict, chat.stats.notices = self._evict, [*notices]
        self.chat = chat

    def reply(self, begin: Begin, progress: Progress | None) -> Work:
        """Return the coroutine of a reply.

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

    def copy_of(self, source: ChatSession, back: int) -> ChatSession:
        """Return a copy of another session's conversation, for this session to start with."""
        if self.closed:
            raise EngineClosed("this session was closed before the copy was made")
        return source.fork(back, self.host.model_for(self.key))

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
        return False

    def step(self) -> None:
        """Do nothing: a conversation has no background work."""

    def close(self) -> None:
        """Save any unsaved changes, and release the ring."""
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
