"""A model on an engine, and the conversation that is open on it; independent of the display.

Everything here runs on one event loop; calls that may block run on a thread and are awaited.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from mlx_stream import Engine, Sampling, Session
from mlx_stream.chat import Exchange
from mlx_stream.errors import MlxStreamError, one_line

SECONDS_TO_CLOSE, SECONDS_BETWEEN = 5.0, 0.03
T = TypeVar("T")


@dataclass(frozen=True)
class Gauge:
    """What the stream holds, in tokens and bytes; `capacity` is 0 before there is a stream."""

    attended: int = 0
    pinned: int = 0
    capacity: int = 0
    evicted: int = 0
    bytes: int = 0
    tokens_per_second: float = 0.0

    def __str__(self) -> str:
        if not self.capacity:
            return "nothing is attended yet"
        kept = f" ({self.pinned:,} pinned)" if self.pinned else ""
        speed = f" · {self.tokens_per_second:.1f} tok/s" if self.tokens_per_second else ""
        return (
            f"{self.attended:,} of {self.capacity:,} tokens attended{kept} · "
            f"{self.evicted:,} evicted · {self.bytes / 1e6:,.1f} MB{speed}"
        )


class ModelSession:
    """One model, and at most one conversation on it.

    Attributes:
        engine: None before a model is loaded.
        chat: the open conversation, if there is one.
    """

    def __init__(self, sampling: Sampling, max_tokens: int):
        self._sampling, self._max_tokens = sampling, max_tokens
        self.engine: Engine | None = None
        self.chat: Session | None = None
        self._notice = ""
        self._pool = ThreadPoolExecutor(2)

    @property
    def exchanges(self) -> list[Exchange]:
        """The attended exchanges, oldest first."""
        return self.chat.exchanges if self.chat else []

    @property
    def last(self) -> Exchange | None:
        """The last attended exchange."""
        return next(reversed(self.exchanges), None)

    @property
    def gauge(self) -> Gauge:
        if self.chat is None:
            return Gauge()
        stats = self.chat.stats
        return Gauge(
            stats.attended,
            min(stats.pinned, stats.attended),
            stats.sinks + stats.window,
            stats.evicted,
            stats.cache_bytes,
            stats.tokens_per_second,
        )

    def new_notice(self) -> str | None:
        """Return the conversation's latest notice, or None if it has not changed."""
        before = self._notice
        notices = self.chat.stats.notices if self.chat else []
        self._notice = one_line(next(reversed(notices), ""))
        return self._notice if self._notice != before else None

    async def load(self, model: str, tell: Callable[[str], None]) -> bool:
        """Load a model in place of the current one; return False if closed in the meantime.

        Args:
            tell: called repeatedly with a progress message.

        Raises:
            MlxStreamError: the model cannot be loaded.
        """
        await self.unload()
        try:
            engine = self.engine = Engine(model)
            while engine is self.engine and not (engine.ready or engine.error):
                tell(one_line((engine.notices or [f"loading {model}"])[-1]))
                await asyncio.sleep(SECONDS_BETWEEN)
            if engine.error:
                raise engine.error
        except MlxStreamError:
            await self.unload()
            raise
        return engine is self.engine

    async def unload(self) -> None:
        """Free the model's memory; its conversation must be closed first."""
        engine, self.engine = self.engine, None
        if engine:
            await self.aside(engine.close, SECONDS_TO_CLOSE)

    def open(self, name: str | None, window: int, system: str | None) -> Session:
        """Start opening a conversation."""
        assert self.engine, "a conversation needs a model"
        self._notice = ""
        self.chat = self.engine.session(
            system=system,
            window=window,
            sampling=self._sampling,
            max_tokens=self._max_tokens,
            name=name,
            recall=None if name else 0,
        )
        return self.chat

    def is_open(self) -> bool:
        """Return whether the conversation is open yet.

        Raises:
            MlxStreamError: the conversation cannot be opened.
        """
        try:
            if self.chat:
                self.chat.wait(0)
        except TimeoutError:
            return False
        return True

    async def wait(self) -> None:
        """Wait until the conversation is open.

        Raises:
            MlxStreamError: the conversation cannot be opened.
        """
        while not self.is_open():
            await asyncio.sleep(SECONDS_BETWEEN)

    async def close_chat(self) -> None:
        """Save and close the conversation.

        Raises:
            MlxStreamError, TimeoutError: the conversation could not be saved.
        """
        chat, self.chat = self.chat, None
        if chat:
            await self.aside(chat.close, SECONDS_TO_CLOSE)

    async def aside(self, work: Callable[..., T], *args: Any) -> T:
        """Run a function that may block on a thread other than the window toolkit's."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def close(self) -> None:
        await self.unload()
        self._pool.shutdown()
