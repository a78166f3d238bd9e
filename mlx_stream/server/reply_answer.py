"""Sends a reply as the response to a request, whole or as events, in an API's format."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from mlx_stream.errors import MlxStreamError
from mlx_stream.server.api_errors import ApiError, as_api_error
from mlx_stream.server.event_stream import Client, EventStream, with_silences
from mlx_stream.server.service import ModelService
from mlx_stream.text.pieces import Piece, TokenLogprob

# Send the headers after this many idle intervals, even if what will be read is not yet known.
SILENCES_BEFORE_HEAD = 5
COMPLETE = ("end", "stop", "length")
Events = Sequence[Mapping[str, Any] | str]


class BegunReply(Protocol):
    """The state of a stream when a reply begins; see `LineReply`."""

    cache: str
    reason: str
    attended: int
    read: int
    evicted_turns: int
    evicted_tokens: int
    window: int
    notices: tuple[str, ...]


class ReplyCounts:
    """A reply so far.

    Args:
        keep: whether the whole reply is needed when it ends.

    Attributes:
        reply: None until it begins.
        session: the name of the saved conversation that it belongs to.
        last: its last piece.
        progress: how many tokens of the prompt have been read, and how many will be.
    """

    def __init__(self, keep: bool):
        self._keep = keep
        self.reply: BegunReply | None = None
        self.session: str | None = None
        self.last = Piece("")
        self.text, self.thinking = list[str](), list[str]()
        self.logprobs: list[TokenLogprob] = []
        self.progress: tuple[int, int] | None = None

    @property
    def begun(self) -> BegunReply:
        assert self.reply
        return self.reply

    @property
    def cached(self) -> int:
        """How many of the prompt's attended tokens were not read for this reply."""
        return max(0, self.begun.attended - self.begun.read)

    def add(self, piece: Piece) -> None:
        self.last = piece
        if self._keep:
            self.text.append(piece.text)
            self.thinking.append(piece.thinking)
            self.logprobs += piece.logprobs

    def report(self, done: int, total: int) -> None:
        self.progress = done, total

    @property
    def usage(self) -> dict[str, Any]:
        """The API's token counts; prompt tokens are those attended when the reply begins."""
        reply, written = self.begun, self.last.written
        return {
            "prompt_tokens": reply.attended,
            "completion_tokens": written,
            "total_tokens": reply.attended + written,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.last.thinking_tokens},
        }

    def about(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        """This server's own object in a response: what is attended to, and what is not."""
        reply = self.begun
        notices = [f"ignored, because this server does not know it: {name}" for name in ignored]
        return {
            "cache": reply.cache,
            "reason": reply.reason,
            "session": self.session,
            "attended": reply.attended,
            "read": reply.read,
            "evicted_turns": reply.evicted_turns,
            "evicted_tokens": reply.evicted_tokens,
            "window": reply.window,
            "recalled": len(self.last.recalled),
            "notices": [*reply.notices, *notices],
        }

    @property
    def headers(self) -> dict[str, str]:
        if not self.reply:
            return {}
        evicted = f"turns={self.reply.evicted_turns}, tokens={self.reply.evicted_tokens}"
        return {"X-Mlx-Stream-Cache": self.reply.cache, "X-Mlx-Stream-Evicted": evicted}


class AnswerFormat(Protocol):
    """An API's format for replies."""

    def first(self) -> Events:
        """Return the events before the text."""
        ...

    def piece(self, piece: Piece) -> Events:
        """Return the events for a piece."""
        ...

    def last(self, counts: ReplyCounts, about: Mapping[str, Any]) -> Events:
        """Return the final events, after the last piece."""
        ...

    def whole(self, counts: ReplyCounts, about: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the whole response."""
        ...


class ReplyAnswer:
    """Sends a reply as a response.

    Args:
        pieces: the pieces of the reply, with None once it has begun.
        ignored: names of request fields that this server does not know.
    """

    def __init__(
        self,
        service: ModelService,
        counts: ReplyCounts,
        pieces: AsyncGenerator[Piece | None, None],
        form: AnswerFormat,
        ignored: Sequence[str] = (),
    ):
        self.service, self.counts, self._pieces, self.form = service, counts, pieces, form
        self.ignored, self._began, self._first = ignored, time.monotonic(), False

    async def send(self, stream: bool, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            MlxStreamError, ApiError: the reply failed before anything was sent.
        """
        client = Client(receive)
        try:
            if stream:
                await self._send_events(client, send)
            else:
                await self._send_whole(client, scope, receive, send)
        finally:
            scope["state"]["counts"] = self._count() | ({"left": 1} if client.left else {})

    async def _send_whole(self, client: Client, scope: Scope, receive: Receive, send: Send) -> None:
        async with client.present(), aclosing(self._items()) as items:
            async for _ in items:
                pass
        if not client.left:
            whole = self.form.whole(self.counts, self.counts.about(self.ignored))
            await JSONResponse(whole, headers=self.counts.headers)(scope, receive, send)

    async def _send_events(self, client: Client, send: Send) -> None:
        events = EventStream(send)
        async with client.present():
            try:
                await self._write(events)
            except Exception as raised:
                if not events.begun:
                    raise
                await events.data(as_api_error(raised).content)
                if not isinstance(raised, MlxStreamError | ApiError):  # so that it is logged
                    raise
        if events.begun and not client.left:
            await events.end()

    async def _write(self, events: EventStream) -> None:
        silences = 0
        async with aclosing(self._items()) as items:
            async for item in items:
                silences += item is None
                if not events.begun and (self.counts.reply or silences == SILENCES_BEFORE_HEAD):
                    await events.begin(self.counts.headers)
                    await events.data(*self.form.first())
                if item is not None:
                    await events.data(*self.form.piece(item))
                elif events.begun:
                    await events.comment(self._progress())
        about = self.counts.about(self.ignored)
        if turns := about["evicted_turns"]:
            await events.comment(f"{turns} earlier turns are not attended to")
        await events.data(*self.form.last(self.counts, about))

    async def _items(self) -> AsyncGenerator[Piece | None, None]:
        """Yield the pieces, and None when the reply starts and during silences."""
        pieces = with_silences(self._pieces, self.service.stopping)
        async with aclosing(pieces):
            async for piece in pieces:
                if piece is not None:
                    self._note_first()
                    self.counts.add(piece)
                yield piece
        if self.counts.last.finish not in COMPLETE:
            raise ApiError(503, "the reply was cut off: its stream was closed", "cut")

    def _progress(self) -> str:
        if not self.counts.reply:
            return "waiting for a stream"
        done, total = self.counts.progress or (0, self.counts.reply.read)
        return f"read {done} of {total} tokens"

    def _note_first(self) -> None:
        if not self._first:
            self._first = True
            self.service.counters.firsts += 1
            self.service.counters.first_seconds += time.monotonic() - self._began

    def _count(self) -> dict[str, Any]:
        """Add the reply to the totals; return the counts for the log."""
        reply, counters = self.counts.reply, self.service.counters
        if not reply:
            return {}
        cached, written = self.counts.cached, self.counts.last.written
        counters.read += reply.read
        counters.cached += cached
        counters.written += written
        counters.evicted_turns += reply.evicted_turns
        counters.caches[reply.cache] += 1
        found = {"cache": reply.cache, "read": reply.read, "cached": cached, "written": written}
        return found | ({"evicted_turns": reply.evicted_turns} if reply.evicted_turns else {})
