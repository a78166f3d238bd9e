"""One reply as the answer to a request, whole or as events, in whatever form an API gives it."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from mlx_stream.engine.session_worker import ReplyEnd, ReplyStart
from mlx_stream.errors import MlxStreamError
from mlx_stream.server.api_errors import as_api_error
from mlx_stream.server.event_stream import Client, EventStream, with_silences
from mlx_stream.server.lines import LineReply
from mlx_stream.server.service import ModelService
from mlx_stream.text.pieces import Piece, TokenLogprob

# Reading this long without an error, an answer begins: what is wrong after that is an event.
SILENCES_BEFORE_HEAD = 1


@dataclass
class ReplyCounts:
    """What a reply is so far.

    Attributes:
        last: its last piece.
        reading: tokens of the prompt that were read, and all that are.
    """

    start: ReplyStart | None = None
    last: Piece | None = None
    end: ReplyEnd | None = None
    text: str = ""
    thinking: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reading: tuple[int, int] | None = None

    def add(self, item: Piece | ReplyStart | ReplyEnd) -> None:
        if isinstance(item, ReplyStart):
            self.start = item
        elif isinstance(item, ReplyEnd):
            self.end = item
        else:
            self.text, self.thinking = self.text + item.text, self.thinking + item.thinking
            self.logprobs += item.logprobs
            self.last = item if item.finish else self.last

    @property
    def prompt(self) -> int:
        return self.start.attended if self.start else 0

    @property
    def read(self) -> int:
        return self.start.read if self.start else 0

    @property
    def cached(self) -> int:
        return max(0, self.prompt - self.read)

    @property
    def written(self) -> int:
        return self.last.written if self.last else 0


class AnswerFormat(Protocol):
    """How an API writes a reply."""

    def first(self) -> list[Mapping[str, Any] | str]:
        """Return the events before the text."""
        ...

    def piece(self, piece: Piece) -> list[Mapping[str, Any] | str]:
        """Return the events of a piece that is not the last."""
        ...

    def last(self, counts: ReplyCounts, about: Mapping[str, Any]) -> list[Mapping[str, Any] | str]:
        """Return the events of the last piece, and of the end."""
        ...

    def whole(self, counts: ReplyCounts, about: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the whole answer."""
        ...


class ReplyAnswer:
    """Writes a reply as an answer.

    Args:
        ignored: names of fields of the request that this server does not know.
    """

    def __init__(
        self,
        service: ModelService,
        reply: LineReply,
        format: AnswerFormat,
        counts: ReplyCounts,
        ignored: list[str],
    ):
        self.service, self.reply, self.format = service, reply, format
        self.counts, self.ignored, self._started = counts, ignored, time.monotonic()

    async def __call__(self, stream: bool, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(receive)
        try:
            await (self._send_events if stream else self._send_whole)(client, scope, receive, send)
        finally:
            self.reply.cancel()
            self._count(scope, client)

    async def _items(self) -> AsyncGenerator[Piece | ReplyStart | ReplyEnd, None]:
        while (item := await self.reply.take_async()) is not None:
            self.counts.add(item)
            yield item
            if isinstance(item, ReplyEnd):
                return

    async def _send_whole(self, client: Client, scope: Scope, receive: Receive, send: Send) -> None:
        async with client.present(), aclosing(self._watched()) as items:
            async for item in items:
                self._note_first(item)
        if not client.left:
            about = self._about()
            answer = JSONResponse(self.format.whole(self.counts, about), headers=self._headers())
            await answer(scope, receive, send)

    async def _send_events(
        self, client: Client, scope: Scope, receive: Receive, send: Send
    ) -> None:
        events, silences = EventStream(send), 0
        async with client.present():
            try:
                async with aclosing(self._watched()) as items:
                    async for item in items:
                        silences += item is None
                        if not events.begun and (isinstance(item, Piece) or silences):
                            await events.begin(self._headers())
                            await events.data(*self.format.first())
                        if item is None:
                            await events.comment(self._progress())
                        elif isinstance(item, Piece):
                            self._note_first(item)
                            if not item.finish:
                                await events.data(*self.format.piece(item))
                about = self._about()
                if evicted := about["evicted_turns"]:
                    tokens = about["evicted_tokens"]
                    await events.comment(f"evicted {evicted} turns, {tokens} tokens")
                await events.data(*self.format.last(self.counts, about))
            except MlxStreamError as raised:
                if not events.begun:
                    raise
                await events.data(as_api_error(raised).content)
        if events.begun and not client.left:
            await events.end()

    def _watched(self) -> AsyncGenerator[Piece | ReplyStart | ReplyEnd | None, None]:
        return with_silences(self._items(), self.service.stopping)

    def _progress(self) -> str:
        if self.counts.start is None:
            return "waiting"
        done, total = self.counts.reading or (0, self.counts.read)
        return f"read {done} of {total} tokens"

    def _note_first(self, item: object) -> None:
        if isinstance(item, Piece) and self._started:
            counters = self.service.counters
            counters.firsts += 1
            counters.first_seconds += time.monotonic() - self._started
            self._started = 0.0
