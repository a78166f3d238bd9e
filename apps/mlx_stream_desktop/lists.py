"""The saved conversations and cached models to choose from; independent of which one is open."""

from collections.abc import Awaitable, Callable
from typing import Any

from mlx_stream.chat import SessionSummary, session_summaries
from mlx_stream.errors import MlxStreamError
from mlx_stream.hub import STARTER, cached_models
from mlx_stream_desktop import history


class Lists:
    """The lists shown in the window, read from disk when `refresh` or `search` is awaited.

    Args:
        aside: runs a function on another thread.
        alarm: shows why something could not be read.
        changed: called after something has been read.

    Attributes:
        conversations: the saved conversations, or only those that contain the words searched for.
        models: the starter and the cached models.
    """

    def __init__(
        self,
        model: str,
        aside: Callable[..., Awaitable[Any]],
        alarm: Callable[[Exception], None],
        changed: Callable[[], None],
    ):
        self._aside, self._alarm, self._changed = aside, alarm, changed
        self.models: list[str] = [model]
        self.conversations: list[SessionSummary] = []
        self._found: set[str] | None = None

    def summary(self, name: str | None) -> SessionSummary | None:
        return next((one for one in self.conversations if one.name == name), None)

    async def refresh(self) -> None:
        try:
            saved, names = await self._aside(session_summaries), self._found
            self.conversations = [one for one in saved if names is None or one.name in names]
            cached = await self._aside(cached_models)
            self.models = sorted({STARTER, *(one.name for one in cached)})
            self._changed()
        except MlxStreamError as error:
            self._alarm(error)

    async def search(self, words: str) -> None:
        """List only the conversations that contain one of these words; all if none are given."""
        try:
            text = words.strip()
            self._found = await self._aside(history.names_with, text) if text else None
        except MlxStreamError as error:
            self._alarm(error)
        await self.refresh()
