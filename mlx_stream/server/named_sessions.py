"""Saved conversations that clients continue by name; independent of HTTP except for errors."""

import asyncio
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.messages import text_of_messages
from mlx_stream.engine.engine import Engine
from mlx_stream.engine.handle import EngineReplyOptions, Session
from mlx_stream.engine.session_worker import ReplyEnd, ReplyPlan, ReplyStart
from mlx_stream.server.api_errors import ApiError
from mlx_stream.server.conversation import Conversation, check_lengths, longest_text
from mlx_stream.text.pieces import Piece

SECONDS_TO_SAVE = 10.0


@dataclass
class OpenSession:
    """A saved conversation that is open.

    Attributes:
        system: the system prompt that it was opened with; None for the saved one.
        lock: held by the request that is using it.
        used: the number of the last request that used it.
        requests: how many are using it or waiting for it.
        fresh: whether it was opened for the request in progress.
    """

    name: str
    system: str | None
    session: Session
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: int = 0
    requests: int = 0
    fresh: bool = True


@dataclass
class BegunSession:
    """The state of a saved conversation when a reply begins; see `BegunReply`."""

    session: str
    cache: str
    reason: str
    attended: int
    read: int
    evicted_turns: int
    evicted_tokens: int
    window: int
    notices: tuple[str, ...] = ()


class NamedSessions:
    """The saved conversations that are open, up to a maximum.

    Args:
        most: the maximum; the least recently used one is closed to open another.
        window, sinks, kv_bits, recall, shared: see `Engine.session`.
    """

    def __init__(
        self,
        engine: Engine,
        most: int,
        window: int | None,
        sinks: int | None,
        kv_bits: int | None,
        recall: int | None,
        shared: bool,
    ):
        self._engine, self._most, self._shared = engine, most, shared
        self._window, self._sinks, self._kv_bits = window, sinks, kv_bits
        self._recall = recall
        self._open: dict[str, OpenSession] = {}
        self._count = 0

    async def pieces(
        self,
        name: str,
        conversation: Conversation,
        limit: int,
        options: EngineReplyOptions,
    ) -> AsyncGenerator[BegunSession | Piece, None]:
        """Yield the state in which a reply begins, then its pieces.

        Raises:
            ApiError: 409, the history that was sent does not match the saved one.
            ValueRefused: a text is too long to be read.
            MlxStreamError: see `Session.reply`, and `mlx_stream.chat` for saved conversations.
        """
        check_lengths(conversation, longest_text(self._window))
        async with self._use(name, conversation.head.system) as opened:
            session, taken, begun = opened.session, [0], None
            again = self._is_asked_again(name, conversation, session.exchanges)
            question = None if again else conversation.question
            reader = session.begin(ReplyPlan(question, given=lambda: taken[0]), limit, **options)
            try:
                while (item := await reader.take_async()) is not None:
                    if isinstance(item, ReplyStart):
                        begun = describe_start(opened, conversation, item, again)
                        yield begun
                    elif isinstance(item, ReplyEnd):
                        if begun:
                            begun.notices += item.notices
                        return
                    else:
                        taken[0] += len(item.text)
                        yield item
            finally:
                reader.cancel()

    @asynccontextmanager
    async def _use(self, name: str, system: str | None) -> AsyncIterator[OpenSession]:
        """Yield a conversation for one request; open it if necessary."""
        opened = await self._get(name, system)
        opened.requests += 1
        try:
            async with opened.lock:
                self._count += 1
                opened.used = self._count
                try:
                    await asyncio.to_thread(opened.session.wait)
                except Exception:  # the next request retries; if a client left, opening continues
                    self._open.pop(name, None)
                    opened.session.close()
                    raise
                yield opened
                opened.fresh = False
        finally:
            opened.requests -= 1

    async def _get(self, name: str, system: str | None) -> OpenSession:
        opened = self._open.get(name)
        if opened and system in (None, opened.system):
            return opened
        if opened and opened.requests:
            message = f"session {name!r} is in use with a different system prompt"
            raise ApiError(409, message, "session")
        if opened is None and len(self._open) >= self._most:
            idle = [one for one in self._open.values() if not one.requests]
            if not idle:
                raise ApiError(503, "all saved conversations in memory are in use", "queue_full")
            opened = min(idle, key=lambda one: one.used)
        if opened:
            del self._open[opened.name]
            await asyncio.to_thread(opened.session.close, SECONDS_TO_SAVE)
        if name in self._open:  # another request has opened it in the meantime
            return await self._get(name, system)
        session = self._engine.session(
            system,
            self._window,
            self._sinks,
            kv_bits=self._kv_bits,
            name=name,
            shared=self._shared,
            recall=self._recall,
        )
        self._open[name] = opened = OpenSession(name, system, session)
        return opened

    @staticmethod
    def _is_asked_again(name: str, conversation: Conversation, exchanges: list[Exchange]) -> bool:
        """Return whether a history that was sent whole asks the last question again.

        Raises:
            ApiError: 409, the history does not match the saved one.
        """
        sent = conversation.turns
        if not sent or (exchanges and is_same(sent[-1][-1].text, exchanges[-1].reply)):
            return False
        if len(exchanges) > 1 and is_same(sent[-1][-1].text, exchanges[-2].reply):
            asked = text_of_messages(conversation.question)
            if exchanges[-1].question == asked and not conversation.begins_reply:
                return True
        raise ApiError(
            409,
            f"the messages do not match the saved session {name!r}: send only the new turn, or "
            "use another name",
            "session",
        )


def is_same(sent: str, reply: str) -> bool:
    """Return whether a sent reply is the saved one, normalized in the same way as for digests."""
    one, other = (unicodedata.normalize("NFC", text).strip() for text in (sent, reply))
    return one == other


def describe_start(
    opened: OpenSession, conversation: Conversation, start: ReplyStart, again: bool
) -> BegunSession:
    cache, reason = "extended", "the session is open"
    if again:
        cache, reason = "retried", "the question has been answered before"
    elif opened.fresh and start.turns:
        cache, reason = "restored", "the session was saved before"
    elif not start.turns:
        cache, reason = "new", "no earlier turn of the session is attended"
    return BegunSession(
        opened.name,
        cache,
        reason,
        start.attended,
        start.read,
        max(0, len(conversation.turns) - start.turns),
        start.evicted,
        start.window,
        start.notices,
    )
