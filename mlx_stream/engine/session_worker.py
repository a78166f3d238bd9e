"""A conversation on the engine's thread."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_stream.chat import resume
from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.session import ChatSession
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.task import Work
from mlx_stream.engine.worker import Worker
from mlx_stream.generate.stats import MOST_NOTICES, Stats


class SessionWorker:
    """One conversation; see `StreamOwner`.

    Args:
        name: the name of a saved conversation, or None.
        shared: see `StreamOwner`.

    Attributes:
        exchanges: the ones attended after the last task; replaced, never changed.
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
        self.shared = shared
        self.key = object()
        self.chat: ChatSession | None = None
        self.saved: SavedSession | None = None
        self.evicted: tuple[int, int] = (0, 0)
        self.exchanges: tuple[Exchange, ...] = ()

    @property
    def usable(self) -> bool:
        return self.chat is not None

    def open(self) -> Work:
        """Begin a conversation, or resume a saved one; a coroutine."""
        model = self.host.model_for(self.key)
        options = replace(self.options, prefixes=self.host.prefixes)
        notices: deque[str] = deque(maxlen=MOST_NOTICES)
        if self.name is None:
            chat = resume.new_chat(model, options, notices.append)
        else:
            steps = resume.open_steps(self.name, model, options, notices.append)
            self.saved = yield from steps
            chat = self.saved.chat
        chat.on_evict, chat.stats.notices = self._evict, [*notices]
        self.chat = chat

    def reply(self, begin: Callable[[ChatSession], Work]) -> Work:
        """Return the coroutine of a reply."""
        assert self.chat
        return begin(self.chat)

    def perform(self, action: Callable[[ChatSession], Any]) -> Work:
        """Do something that reads no tokens, and return its result; a coroutine."""
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
        """Write what is not saved yet, and release the ring."""
        saved, self.chat, self.saved = self.saved, None, None
        try:
            if saved:
                saved.close()
        finally:
            self.host.budget.set_stream(self.key, 0)

    def _evict(self, exchanges: int, tokens: int) -> None:
        with self.worker.lock:
            self.evicted = self.evicted[0] + exchanges, self.evicted[1] + tokens
