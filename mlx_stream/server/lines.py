"""Finds the live stream that has read a client's history; independent of HTTP.

A line is one stream with a record of the turns that it has read, as digests. The cases for a
request's closed turns T and a line's turns R are:

    T are the last of R, or all of them      extended   the question is read
    one more in R, and its question          retried    the reply is rolled back, 1 token is read
    one more in R                            edited     the turn is rolled back, in a copy
    more in R, or only the first T match     forked     a copy is rolled back; other turns are read
    T begin later than R                     shifted    the turns left out are evicted first
    nothing matches                          cold       the newest turns that fit are read
    T is empty                               new

A line that is writing a reply is neither waited for nor copied.
"""

import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Unpack

from mlx_stream.chat.messages import Message
from mlx_stream.chat.session import DEFAULT_MAX_TOKENS
from mlx_stream.engine.engine import Engine
from mlx_stream.engine.handle import EngineReplyOptions, Session
from mlx_stream.engine.reply_reader import Item, ReplyReader
from mlx_stream.engine.session_worker import ReplyEnd, ReplyPlan, ReplyStart
from mlx_stream.errors import (
    ComputeError,
    EngineClosed,
    MemoryRefused,
    QueueFull,
    ValueRefused,
    WeightsError,
)
from mlx_stream.models.window import THINKING_WINDOWS
from mlx_stream.server.conversation import DIGEST_BYTES, TURN_BYTES, Conversation, Digests
from mlx_stream.text.pieces import Piece
from mlx_stream.text.tool_calls import ToolCall

DEFAULT_STREAMS = 4


class Record:
    """The turns that a line has read, including evicted ones.

    Attributes:
        digests: `TURN_BYTES` for each turn.
        sizes: the number of tokens in each turn; 0 if it was never read.
        attended: how many of the last turns are attended.
    """

    def __init__(
        self, digests: bytes | bytearray = b"", sizes: Sequence[int] = (), attended: int = 0
    ):
        self.digests, self.sizes, self.attended = bytearray(digests), array("I", sizes), attended

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        return self.digests.__sizeof__() + self.sizes.__sizeof__()

    def copy(self) -> "Record":
        return Record(self.digests, self.sizes, self.attended)

    def add(self, digests: bytes) -> None:
        """Add turns; their sizes are not known yet."""
        self.digests += digests
        self.sizes.extend([0] * (len(digests) // TURN_BYTES))

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` turns."""
        self.attended = max(0, self.attended - (len(self) - count))
        del self.digests[count * TURN_BYTES :], self.sizes[count:]

    def set_attended(self, sizes: Sequence[int]) -> None:
        """Set the sizes of the last turns, which are those attended."""
        self.attended = len(sizes)
        if sizes:
            self.sizes[len(self) - len(sizes) :] = array("I", sizes)

    def find(self, digests: bytes) -> tuple[int, int]:
        """Return where this record contains the longest possible prefix of some turns.

        Returns:
            The start and end positions; the last ones if there are several. Both are 0 if the
                record does not contain the first turn.
        """
        if self.digests.endswith(digests):
            return len(self) - len(digests) // TURN_BYTES, len(self)
        if self.digests.find(digests[:TURN_BYTES]) < 0:
            return 0, 0
        return find_longest(turns_in(digests), turns_in(self.digests))

    def fits(self, first: int, last: int, window: int) -> bool:
        """Return whether enough of the turns from `first` to `last` is attended.

        That is at least half of the tokens that a stream would attend to if it read the newest of
        these turns that fit a window.
        """
        attended = sum(self.sizes[max(first, len(self) - self.attended) : last])
        most = 0
        for size in reversed(self.sizes[first:last]):
            if most and most + size > window:
                break
            most += size
        return attended > 0 and 2 * attended >= min(most, window)


def turns_in(digests: bytes | bytearray) -> list[bytes]:
    return [bytes(digests[at : at + TURN_BYTES]) for at in range(0, len(digests), TURN_BYTES)]


def find_longest(wanted: Sequence[bytes], turns: Sequence[bytes]) -> tuple[int, int]:
    """Return where `turns` last contains the longest possible prefix of `wanted`.

    Uses the Knuth-Morris-Pratt algorithm. For A B C in A B A B D, the prefix is A B, at 2 to 4.
    """
    shorter, best = [0] * len(wanted), (0, 0)  # the longest prefix that is also a suffix

    def extend(count: int, turn: bytes) -> int:
        while count and (count == len(wanted) or wanted[count] != turn):
            count = shorter[count - 1]
        return count + (wanted[count] == turn)

    for at in range(1, len(wanted)):
        shorter[at] = extend(shorter[at - 1], wanted[at])
    count = 0
    for at, turn in enumerate(turns, 1):
        count = extend(count, turn)
        if count and count >= best[1] - best[0]:
            best = at - count, at
    return best


@dataclass(eq=False)
class StreamLine:
    """One stream and what it has read.

    Attributes:
        reply: the reply in progress.
        used: the number of the last request that used it.
        spare: whether its conversation continues in a copy, so that this line is closed first.
        copies: the replies that are waiting for copies of it.
        requests: how many it has answered.
        ended: when its last reply ended, by `time.monotonic`.
    """

    id: int
    session: Session
    head: bytes
    record: Record = field(default_factory=Record)
    reply: "Taken | None" = None
    used: int = 0
    spare: bool = False
    copies: "set[Taken]" = field(default_factory=set)
    requests: int = 0
    ended: float = 0.0


@dataclass(frozen=True)
class LineState:
    """The state of a line, without any text.

    Attributes:
        state: `idle` or `replying`.
        turns: the number of turns it has read, or was given as a history.
        attended_turns: the number of turns it attends to.
        attended, evicted, pinned, window: in tokens.
        idle_seconds: time since its last reply ended; 0 during a reply.
    """

    id: int
    state: str
    turns: int
    attended_turns: int
    attended: int
    evicted: int
    pinned: int
    window: int
    cache_bytes: int
    requests: int
    idle_seconds: float


@dataclass(eq=False)
class Taken:
    """How much of one reply its reader has taken."""

    characters: int = 0


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


@dataclass(frozen=True)
class Choice:
    """How a request is answered.

    Attributes:
        cache: the name of the case; see the module's docstring.
        reason: why, in a few words.
        record: the line's record, up to the question; for a retry, including the question.
        source: the line to use, or to copy; None for a new one.
        copy: whether to copy it.
        retry: whether its last question is answered again.
        back: how many of its last turns are rolled back.
        keep: how many of the newest turns left after that may stay attended; None for all.
        history: the messages of turns to read as text.
        unread: how many turns before them are not read.
    """

    cache: str
    reason: str
    record: Record
    source: StreamLine | None = None
    copy: bool = False
    retry: bool = False
    back: int = 0
    keep: int | None = None
    history: tuple[Message, ...] = ()
    unread: int = 0


class LineReply:
    """One reply on a line: an iterator over its pieces, for one reader, with or without asyncio.

    `start` waits until the attributes are set and the prompt is about to be read. It raises an
    error for a bad request before there are any pieces. A reply that is not read to the end must be
    cancelled, which makes the line idle again; this is automatic if the reply is garbage-collected.

    Attributes:
        line: the number of the line.
        cache: `new`, `extended`, `retried`, `edited`, `forked`, `shifted` or `cold`.
        reason: why, in a few words.
        attended: the tokens attended when the reply begins.
        read: how many of them are read for this reply.
        evicted_turns: how many of the request's closed turns are not attended.
        evicted_tokens: how many of the line's tokens have been evicted since it was opened.
        window: in tokens.
        notices: lines for the user.
        finish: set once it has ended: `end`, `stop`, `length` or `cancelled`.
        calls: the tools that the reply calls; set once it has ended.
    """

    def __init__(self, lines: "Lines", request: Request):
        self._lines = lines
        self.request: Request | None = request  # until it has started
        self._count = len(request.conversation.turns)
        self.reader: ReplyReader | None = None
        self.taken = Taken()
        self.source: StreamLine | None = None  # of the copy, until it has been made
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
        """End the reply within one step; any thread may call this, and it returns at once."""
        if self.reader:
            self.reader.cancel()

    def start(self) -> "LineReply":
        """Wait until the prompt is about to be read.

        Raises:
            ValueRefused: an option is out of range, or the head is too long for the window.
            TemplateError: the template refuses the messages.
            MemoryRefused: another stream exceeds the engine's budget, and none can be closed.
            MlxStreamError: see `Session.reply`.
        """
        while self.request:
            try:
                self._receive(self._take())
            except MemoryRefused:
                if not self._lines.start_again(self):
                    raise
        return self

    async def start_async(self) -> "LineReply":
        """Like `start`, but without blocking the event loop."""
        while self.request:
            try:
                self._receive(await self._take_async())
            except MemoryRefused:
                if not self._lines.start_again(self):
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
        try:
            return self.reader.take()
        except BaseException:
            self.reader.cancel()
            raise

    async def _take_async(self) -> Item | None:
        assert self.reader
        try:
            return await self.reader.take_async()
        except BaseException:  # such as the cancellation of the reading task
            self.reader.cancel()
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


class Lines:
    """The streams of one server; chooses one for each request. Any thread may call its methods.

    Args:
        engine: computes the replies.
        streams: the maximum number of lines.
        window, sinks, kv_bits: for every line; see `ChatSession`.
        shared: see `Engine.session`.
        on_idle: called whenever a line may be used again, perhaps on the engine's thread. It must
            return at once.

    Raises:
        ValueRefused: `streams` is below 1.
    """

    def __init__(
        self,
        engine: Engine,
        streams: int = DEFAULT_STREAMS,
        window: int | None = None,
        sinks: int | None = None,
        kv_bits: int | None = None,
        shared: bool = True,
        on_idle: Callable[[], None] | None = None,
    ):
        if streams < 1:
            raise ValueRefused(f"`streams` must be at least 1, not {streams}")
        self.engine, self.streams, self.window = engine, streams, window
        self._sinks, self._kv_bits, self._shared = sinks, kv_bits, shared
        self._on_idle, self._digests = on_idle, Digests(os.urandom(DIGEST_BYTES))
        # Reentrant: a reply that has already ended reports this at once.
        self._lock = threading.RLock()
        self._lines: list[StreamLine] = []
        self._numbers = self._requests = 0
        self._closed = False

    def begin(
        self,
        conversation: Conversation,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        **options: Unpack[EngineReplyOptions],
    ) -> LineReply:
        """Start the reply to a conversation; returns immediately.

        Args:
            options: see `Session.reply`. `progress` is called by the thread that reads.

        Raises:
            QueueFull: every stream is writing a reply, or the engine's queue is full.
            ValueRefused: an option is out of range.
            EngineClosed: the engine is closed, or these lines are.
        """
        asked = conversation.question[: -1 if conversation.begins_reply else None]
        moment = datetime.now()
        day = moment.date().isoformat() if self.engine.names_date else ""
        request = Request(
            conversation,
            moment,
            self._digests.of_head(conversation.head, day),
            self._digests.of_turns(conversation.turns),
            self._digests.of_messages(asked),
            max_tokens,
            options,
        )
        reply = LineReply(self, request)
        with self._lock:
            if self._closed:
                raise EngineClosed("the server is closing")
            self._start(reply, request, self._choose(request))
        return reply

    def start_again(self, reply: LineReply) -> bool:
        """Restart a reply whose stream did not fit in memory.

        An idle line is closed to make room, or the reply does without a copy.

        Returns:
            Whether that was possible.
        """
        with self._lock:
            request, source = reply.request, reply.source
            self.copied(reply)
            if source:
                source.spare = False
            closed = self._close_one(source)
            if not request or not (closed or (source and not source.reply)):
                return False
            self._start(reply, request, self._choose(request, copies=closed))
            return True

    def copied(self, reply: LineReply) -> None:
        """Release the line that was copied for a reply."""
        with self._lock:
            if reply.source:
                reply.source.copies.discard(reply.taken)
            reply.source = None

    def state(self) -> list[LineState]:
        """Return the state of each line."""
        with self._lock:
            lines, now = [*self._lines], time.monotonic()
        return [line_state(line, now) for line in lines]

    def close(self, id: int) -> None:
        """Close a line; a reply in progress on it fails.

        Raises:
            ValueRefused: there is no such line.
        """
        with self._lock:
            line = next((line for line in self._lines if line.id == id), None)
            if line is None:
                raise ValueRefused(f"there is no stream {id}")
            self._drop(line)

    def close_all(self) -> None:
        """Close every line, and start no more replies."""
        with self._lock:
            self._closed = True
            for line in [*self._lines]:
                self._drop(line)

    # --- the choice; called under the lock ---

    def _choose(self, request: Request, copies: bool = True) -> Choice:
        """Return what to do; without `copies`, everything is done in place."""
        turns = request.conversation.turns
        if not turns:
            return Choice("new", "there are no earlier turns", Record())
        best, why = self._best_match(request)
        if best is None:
            return self._read_newest(request, why)
        line, first, last = best
        count, behind, record = last - first, len(line.record) - last, line.record.copy()
        keep, shifted = (count, "shifted") if first else (None, "")
        left_out = f"; older turns that the client left out: {first:,}" if first else ""
        if count == len(turns) and not behind:
            reason = f"the stream has read these turns{left_out}"
            return Choice(shifted or "extended", reason, record, line, keep=keep)
        asked = line.record.digests[last * TURN_BYTES :][:DIGEST_BYTES]
        again = asked == request.asked and not request.conversation.begins_reply
        if count == len(turns) and behind == 1 and again:
            reason = f"the question has been answered before{left_out}"
            keep = keep and keep + 1
            return Choice(shifted or "retried", reason, record, line, retry=True, keep=keep)
        edited = count == len(turns) and behind == 1
        rest = turns[count:]
        if len(rest) > self._most_turns:
            return self._read_newest(request, "the turns to read fill the window")
        record.truncate(last)
        record.add(request.turns[count * TURN_BYTES :])
        # A copied line is the first to be closed, so an edit does not displace another line.
        place = len(self._lines) < self.streams or (not edited and self._next_to_go(line))
        reason = f"turns rolled back: {behind:,}{left_out}"
        if rest:
            shifted, reason = "", f"turns that the stream has read: {count:,} of {len(turns):,}"
        return Choice(
            shifted or ("edited" if edited else "forked"),
            reason,
            record,
            line,
            copy=copies and bool(place),
            back=behind,
            keep=keep,
            history=messages_of_turns(rest),
        )

    def _best_match(self, request: Request) -> tuple[tuple[StreamLine, int, int] | None, str]:
        """Return the line to use and where the request's turns stand in its record.

        A match of more turns is better. Among equal matches, one of all turns at the end of a line
        with nothing older to evict is best, then a later position, then the end of a record. If no
        line matches, return why.
        """
        found: list[tuple[tuple[Any, ...], tuple[StreamLine, int, int]]] = []
        why = "no stream has the same head"
        for line in self._lines:
            if line.head != request.head:
                continue
            first, last = line.record.find(request.turns)
            if last == first:
                why = "no stream has read the first turn" if "head" in why else why
            elif line.reply:
                why = "the stream that has read these turns is writing a reply"
            elif not line.record.fits(first, last, line.session.stats.window):
                why = "too many of these turns have been evicted"
            else:
                behind = len(line.record) - last
                asked = line.record.digests[last * TURN_BYTES :][:DIGEST_BYTES] == request.asked
                whole = last - first == len(request.conversation.turns)
                simple = whole and not first and behind < 2
                rank = (last - first, simple, last, not behind, asked, line.used)
                found.append((rank, (line, first, last)))
        best = max(found, key=lambda each: each[0], default=None)
        return (best[1] if best else None), why

    def _read_newest(self, request: Request, reason: str) -> Choice:
        record, turns = Record(), request.conversation.turns
        record.add(request.turns)
        newest = turns[-self._most_turns :]
        unread = len(turns) - len(newest)
        return Choice("cold", reason, record, history=messages_of_turns(newest), unread=unread)

    @property
    def _most_turns(self) -> int:
        """The most turns that a window can hold: each has at least one token."""
        return self.window or THINKING_WINDOWS[0]

    # --- opening and closing lines; called under the lock ---

    def _next_to_go(self, besides: StreamLine | None = None) -> StreamLine | None:
        """Return the idle line to close if room is needed: copied ones first, then short ones."""
        idle = [x for x in self._lines if not (x.reply or x.copies or x is besides)]
        return min(idle, key=lambda x: (not x.spare, len(x.record) > 1, x.used), default=None)

    def _close_one(self, besides: StreamLine | None = None) -> bool:
        line = self._next_to_go(besides)
        if line:
            self._drop(line)
        return line is not None

    def _drop(self, line: StreamLine) -> None:
        if line in self._lines:
            self._lines.remove(line)
        line.session.close()

    def _open(self, request: Request, source: StreamLine | None) -> StreamLine:
        """Return a new line, or a copy of one."""
        if len(self._lines) >= self.streams and not self._close_one(source):
            raise QueueFull(f"all {self.streams:,} streams are writing replies: try again later")
        if source:
            session = source.session.fork()
        else:
            head = request.conversation.head
            session = self.engine.session(
                system=head.system,
                window=self.window,
                sinks=self._sinks,
                kv_bits=self._kv_bits,
                think=head.think,
                reasoning_effort=head.reasoning_effort,
                tools=head.tools,
                shared=self._shared,
                began=request.moment,
            )
        self._numbers += 1
        return StreamLine(self._numbers, session, request.head)

    def _start(self, reply: LineReply, request: Request, choice: Choice) -> None:
        line = choice.source
        fresh = choice.copy or line is None
        if fresh:
            line = self._open(request, choice.source)
        assert line
        taken = reply.taken = Taken()
        question = None if choice.retry else request.conversation.question
        plan = ReplyPlan(
            question,
            choice.back,
            choice.keep,
            choice.history,
            choice.unread,
            given=lambda: taken.characters,
            on_end=partial(self._end, line, taken, choice.record, request.asked, fresh),
        )
        line.reply = taken
        try:
            reply.reader = line.session.begin(plan, request.max_tokens, **request.options)
        except BaseException:
            line.reply = None
            if fresh:
                line.session.close()
            raise
        self._requests += 1
        line.used, line.spare, line.requests = self._requests, False, line.requests + 1
        if fresh:
            self._lines.append(line)
            if source := choice.source:
                reply.source = source
                source.copies.add(taken)
                source.spare = choice.back == 1 and not choice.history
        reply.line, reply.cache, reply.reason = line.id, choice.cache, choice.reason
        reply.reader.when_done(partial(self._done, line, taken, fresh, choice.source))

    def _end(
        self,
        line: StreamLine,
        taken: Taken,
        record: Record,
        asked: bytes,
        fresh: bool,
        end: ReplyEnd | None,
    ) -> None:
        """Write a turn into a line's record when its reply ends; on the engine's thread."""
        with self._lock:
            if end:
                if end.replaced:
                    record.truncate(len(record) - 1)
                if end.exchange:
                    said = self._digests.of_reply(end.exchange.reply, end.exchange.calls)
                    record.add(asked + said)
                record.set_attended(end.sizes)
                line.record = record
            if end.failed if end else fresh:
                self._drop(line)
        self._release(line, taken)

    def _done(
        self,
        line: StreamLine,
        taken: Taken,
        fresh: bool,
        source: StreamLine | None,
        future: Future[Any],
    ) -> None:
        """Release a line whose reply never began; close one that does not match its record."""
        error = None if future.cancelled() else future.exception()
        with self._lock:
            if source:
                source.copies.discard(taken)
            # A step may also fail after the reply, while the turn is being settled.
            lost = isinstance(error, ComputeError | WeightsError)
            if lost or (line.reply is taken and (fresh or error or future.cancelled())):
                self._drop(line)
        self._release(line, taken)

    def _release(self, line: StreamLine, taken: Taken) -> None:
        with self._lock:
            if line.reply is not taken:
                return
            line.reply, line.ended = None, time.monotonic()
        if self._on_idle:
            self._on_idle()


def messages_of_turns(turns: Sequence[Sequence[Message]]) -> tuple[Message, ...]:
    return tuple(message for turn in turns for message in turn)


def line_state(line: StreamLine, now: float) -> LineState:
    stats = line.session.stats
    return LineState(
        line.id,
        "replying" if line.reply else "idle",
        len(line.record),
        line.record.attended,
        stats.attended,
        stats.evicted,
        stats.pinned,
        stats.window,
        stats.cache_bytes,
        line.requests,
        0.0 if line.reply else now - line.ended,
    )
