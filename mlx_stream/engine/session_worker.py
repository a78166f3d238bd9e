"""A conversation as the engine's thread holds it."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_stream.chat.exchange import Exchange
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.replies import check_limit
from mlx_stream.engine.task import Task, Work
from mlx_stream.engine.worker import Worker
from mlx_stream.generate.stats import Stats

if TYPE_CHECKING:
    from mlx_stream.chat.saving import SavedSession
    from mlx_stream.chat.session import ChatSession


class SessionWorker:
    """One conversation; see `StreamOwner`.

    Args:
        options: of `chat.resume.SessionOptions`.
        name: of a saved conversation, or None.

    Attributes:
        exchanges: those attended after the last thing asked; exchanged whole, as `published` is.
    """

    def __init__(self, worker: Worker, host: ModelHost, options: dict[str, Any], name: str | None):
        self.worker, self.host, self.options, self.name = worker, host, options, name
        self.key = host.new_key()
        self.chat: ChatSession | None = None
        self.saved: SavedSession | None = None
        self.notices: list[str] = []
        self.published, self.evicted = Stats(), (0, 0)
        self.exchanges: tuple[Exchange, ...] = ()

    @property
    def usable(self) -> bool:
        return self.chat is not None

    def open(self) -> Work:
        """Begin, or continue what is saved; a coroutine."""
        from mlx_stream.chat import resume

        check_limit(self.options["max_tokens"])
        model, options = self.host.model_for(self.key), resume.SessionOptions(**self.options)
        if self.name is None:
            chat = resume.new_chat(model, options, self._notify)
        else:
            self.saved = yield from resume.open_steps(self.name, model, options, self._notify)
            chat = self.saved.chat
        chat.on_evict, chat.stats.notices = self._evict, []
        chat.stats.add_notices(*self.notices)
        self.chat = chat

    def reply(self, begin: "Callable[[ChatSession], Work]") -> Work:
        """Return the coroutine of a reply."""
        assert self.chat
        return begin(self.chat)

    def perform(self, action: "Callable[[ChatSession], Any]") -> Work:
        """Do one thing that reads nothing, and return its result; a coroutine."""
        yield from ()
        assert self.chat
        return action(self.chat)

    def after(self, task: Task | None) -> None:
        if self.chat is None:
            return
        if task and task.cancelled and task.error:  # no other place will show it
            self.chat.stats.add_notices(str(task.error))
        if task:
            self.exchanges = tuple(turn.exchange for turn in self.chat.evictor.state.turns)
            self.host.budget.set_stream(self.key, self.chat.cache.nbytes)
        stats = self.chat.stats
        self.published = replace(stats, notices=[*stats.notices])

    def waiting(self) -> bool:
        return False

    def step(self) -> None:
        """Do nothing: a conversation has no work in the background."""

    def close(self) -> None:
        """Write what is not written, and let go of the ring."""
        saved, self.chat, self.saved = self.saved, None, None
        try:
            if saved:
                saved.close()
        finally:
            self.host.budget.set_stream(self.key, 0)

    def _notify(self, line: str) -> None:
        """Keep a notice of the opening; later ones are in the statistics anyway."""
        if self.chat is None:
            self.notices.append(line)

    def _evict(self, exchanges: int, tokens: int) -> None:
        with self.worker.lock:
            self.evicted = self.evicted[0] + exchanges, self.evicted[1] + tokens
