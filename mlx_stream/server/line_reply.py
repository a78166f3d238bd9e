"""A reply on one of the lines, for its reader; does not know which line is chosen, or why."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from mlx_stream.engine.handle import EngineReplyOptions
from mlx_stream.engine.reply_reader import Item, ReplyReader
from mlx_stream.engine.session_worker import ReplyEnd, ReplyStart
from mlx_stream.errors import EngineClosed, MemoryRefused, MlxStreamError, SnapshotError
from mlx_stream.server.conversation import Conversation
from mlx_stream.text.pieces import Piece
from mlx_stream.text.tool_calls import ToolCall


class LineClosed(EngineClosed):
    """The line was closed while it was replying."""


@dataclass(eq=False)
class Taken:
    """How much of one reply its reader has taken.

    Attributes:
        closed: whether its line was closed by `Lines.close`.
    """

    characters: int = 0
    closed: bool = False


@dataclass(frozen=True)
class Request:
    """A conversation to answer.

    Attributes:
        head: the digest of its head.
        turns: the digests of its closed turns.
        asked: the digest of its question, without the beginning of a reply.
        moment: when it arrived.
    """

    conversation: Conversation
    moment: datetime
    head: bytes
    turns: bytes
    asked: bytes
    max_tokens: int
    options: EngineReplyOptions


class Starter(Protocol):
    """The lines that a reply is started on; see `Lines`."""

    def start_again(self, reply: "LineReply", error: MlxStreamError) -> bool: ...

    def copied(self, reply: "LineReply") -> None: ...


class LineReply:
    """One reply on a line: an iterator over its pieces, for one reader, with or without asyncio.

    `start` waits until the attributes are set and the prompt is about to be read. It raises an
    error for a bad request before there are any pieces. A reply that is not read to the end must be
    cancelled, which makes the line idle again; this is automatic if the reply is garbage-collected.

    Attributes:
        line: the number of the line.
        cache: `new`, `extended`, `retried`, `edited`, `forked`, `shifted`, `restored` or
            `cold`.
        reason: why, in a few words.
        attended: the number of tokens attended when the reply begins.
        read: how many of them are read for this reply.
        evicted_turns: how many of the request's closed turns are not attended.
        evicted_tokens: how many of the line's tokens have been evicted since it was opened.
        window: the size of the line's window, in tokens.
        notices: lines for the user.
        finish: set once it has ended: `end`, `stop`, `length` or `cancelled`.
        calls: the tools that the reply calls; set once it has ended.
    """

    def __init__(self, lines: Starter, request: Request):
        self._lines = lines
        self.request: Request | None = request  # until it has started
        self._count = len(request.conversation.turns)
        self.reader: ReplyReader | None = None
        self.taken = Taken()
        self.source: Any = None  # the line that is copied for it, until the copy has been made
        self.restored: Any = None  # the kept line that is restored for it
        self._last: Piece | None = None
        self.line, self.cache, self.reason = 0, "", ""
        self.attended = self.read = self.evicted_turns = self.evicted_tokens = self.window = 0
        self.notices: tuple[str, ...] = ()
        self.finish: str | None = None
        self.calls: tuple[ToolCall, ...] = ()

    @property
    def cached(self) -> int:
        """How many of the tokens attended when the reply begins were not read for it."""
        return max(0, self.attended - self.read)

    def cancel(self) -> None:
        """End the reply within one step; any thread may call this, and it returns immediately."""
        if self.reader:
            self.reader.cancel()

    def start(self) -> "LineReply":
        """Wait until the prompt is about to be read.

        Raises:
            ValueRefused: an option is out of range, or the head is too long for the window.
            TemplateError: the template refuses the messages.
            MemoryRefused: one more stream would exceed the engine's budget, and none can be closed.
            MlxStreamError: see `Session.reply`.
        """
        while self.request:
            try:
                self._receive(self._take())
            except (MemoryRefused, SnapshotError) as error:
                if not self._lines.start_again(self, error):
                    raise
        return self

    async def start_async(self) -> "LineReply":
        """Like `start`, but without blocking the event loop."""
        while self.request:
            try:
                self._receive(await self._take_async())
            except (MemoryRefused, SnapshotError) as error:
                if not self._lines.start_again(self, error):
                    raise
        return self

    def __iter__(self) -> "LineReply":
        return self

    def __next__(self) -> Piece:
        self.start()
        while self.finish is None:
            if piece := self._receive(self._take()):
                return piece
        raise StopIteration

    def __aiter__(self) -> "LineReply":
        return self

    async def __anext__(self) -> Piece:
        await self.start_async()
        while self.finish is None:
            if piece := self._receive(await self._take_async()):
                return piece
        raise StopAsyncIteration

    def _take(self) -> Item | None:
        assert self.reader
        with self._ending_errors(self.reader):
            return self.reader.take()

    async def _take_async(self) -> Item | None:
        assert self.reader
        with self._ending_errors(self.reader):
            return await self.reader.take_async()

    @contextmanager
    def _ending_errors(self, reader: ReplyReader) -> Iterator[None]:
        """Cancel the reply if reading it fails, or the task that reads it is cancelled."""
        try:
            yield
        except EngineClosed as error:
            reader.cancel()
            if self.taken.closed:
                raise LineClosed("this stream was closed by another request") from error
            raise
        except BaseException:
            reader.cancel()
            raise

    def _receive(self, item: Item | None) -> Piece | None:
        """Process an item; return its piece, if any. The last one waits until the line is idle."""
        if isinstance(item, ReplyStart):
            self._set_start(item)
        elif isinstance(item, Piece):
            self.taken.characters += len(item.text)
            if item.finish is None:
                return item
            self._last = item
        elif isinstance(item, ReplyEnd):
            self.notices += item.notices
            self.calls = item.exchange.calls if item.exchange else ()
            self.finish = self._last.finish if self._last else "cancelled"
            return self._last
        else:
            self.request, self.finish = None, "cancelled"
        return None

    def _set_start(self, start: ReplyStart) -> None:
        self.request = None  # its text may be large
        self._lines.copied(self)
        self.attended, self.read, self.window = start.attended, start.read, start.window
        self.evicted_turns, self.evicted_tokens = self._count - start.turns, start.evicted
        self.notices += start.notices
        if start.restarted:
            self.cache, self.reason = "cold", "the turns to read fill the window"
