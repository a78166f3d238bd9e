"""Opens, uses and closes the lines that answer requests; independent of HTTP.

A line is one stream with a record of the turns that it has read. `line_choice` says which of them
answers a request.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from typing import Any, Unpack

from mlx_stream.chat.session import DEFAULT_MAX_TOKENS
from mlx_stream.engine.engine import Engine
from mlx_stream.engine.handle import EngineReplyOptions
from mlx_stream.engine.session_worker import ReplyEnd, ReplyPlan
from mlx_stream.errors import (
    ComputeError,
    EngineClosed,
    MlxStreamError,
    QueueFull,
    SnapshotError,
    ValueRefused,
    WeightsError,
)
from mlx_stream.server.conversation import (
    DIGEST_BYTES,
    Conversation,
    Digests,
    check_lengths,
    longest_text,
)
from mlx_stream.server.kept_lines import KeptLine, KeptLines
from mlx_stream.server.line_choice import Choice, choose_line, next_to_go
from mlx_stream.server.line_record import Record
from mlx_stream.server.line_reply import LineReply, Request, Taken
from mlx_stream.server.stream_line import LineState, StreamLine, line_state

DEFAULT_STREAMS = 4


class Lines:
    """The streams of one server; chooses one for each request. Any thread may call its methods.

    Args:
        engine: computes the replies.
        streams: the maximum number of lines.
        window, sinks, kv_bits: for every line; see `ChatSession`.
        shared: see `Engine.session`.
        kept: the conversations in files; each line is kept there after each reply.
        on_idle: called whenever a line may be used again, perhaps on the engine's thread. It must
            return immediately.

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
        kept: KeptLines | None = None,
    ):
        if streams < 1:
            raise ValueRefused(f"`streams` must be at least 1, not {streams}")
        self.engine, self.streams, self.window = engine, streams, window
        self._sinks, self._kv_bits, self._shared = sinks, kv_bits, shared
        self._on_idle, self._kept = on_idle, kept
        self._digests = Digests(kept.key if kept else os.urandom(DIGEST_BYTES))
        # Reentrant: a reply that has already ended reports this immediately.
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
        check_lengths(conversation, longest_text(self.window))
        if self.engine.ready:
            self.engine.check_options(options.get("bias"))
        asked = conversation.question[: -1 if conversation.begins_reply else None]
        moment = datetime.now()
        day = moment.date().isoformat() if self.engine.names_date else ""
        request = Request(
            conversation,
            moment,
            self._digests.of_head(conversation.head, day, self.window, self._sinks, self._kv_bits),
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

    def start_again(self, reply: LineReply, error: MlxStreamError) -> bool:
        """Restart a reply whose stream did not fit in memory, or could not be restored.

        If memory was short, an idle line is closed to make room, or the reply does without a copy.

        Returns:
            Whether that was possible.
        """
        with self._lock:
            request, source, closed = reply.request, reply.source, True
            if isinstance(error, SnapshotError):
                if not (self._kept and reply.restored):
                    return False
                self._kept.refuse(reply.restored, error)
            else:
                self.copied(reply)
                if source:
                    source.spare = False
                closed = self._close_one(source)
                if not (closed or (source and not source.reply)):
                    return False
            if not request:
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
        """Close a line without keeping it; a reply in progress on it fails.

        Raises:
            ValueRefused: there is no such line.
        """
        with self._lock:
            line = next((line for line in self._lines if line.id == id), None)
            if line is None:
                raise ValueRefused(f"there is no stream {id}")
            if line.reply:
                line.reply.closed = True
            if self._kept and line.kept:
                line.session.when_idle(None)
                self._kept.remove(line.kept)
            self._drop(line)

    def close_all(self) -> None:
        """Close every line, and start no more replies."""
        with self._lock:
            self._closed = True
            for line in [*self._lines]:
                self._drop(line)

    # --- called under the lock ---

    def _choose(self, request: Request, copies: bool = True) -> Choice:
        kept = self._kept.usable() if self._kept else []
        free = len(self._lines) < self.streams
        return choose_line(request, self._lines, kept, free, self.window, copies)

    def _close_one(self, besides: StreamLine | None = None) -> bool:
        line = next_to_go(self._lines, besides)
        if line:
            self._drop(line)
        return line is not None

    def _drop(self, line: StreamLine) -> None:
        if line in self._lines:
            self._lines.remove(line)
        line.session.close()

    def _open(self, request: Request, source: StreamLine | KeptLine | None) -> StreamLine:
        """Return a new line, a copy of one, or a restored one."""
        copied, head = source if isinstance(source, StreamLine) else None, request.conversation.head
        if not source and self.engine.ready:
            self.engine.check_options(None, head.think, head.reasoning_effort)
        if len(self._lines) >= self.streams and not self._close_one(copied):
            raise QueueFull(f"all {self.streams:,} streams are writing replies: try again later")
        began = source.began if source else request.moment
        if copied:
            session = copied.session.fork()
        else:
            restore = None
            if self._kept and isinstance(source, KeptLine):
                restore = partial(self._kept.restore, source)
            session = self.engine.session(
                system=head.system,
                window=self.window,
                sinks=self._sinks,
                kv_bits=self._kv_bits,
                think=head.think,
                reasoning_effort=head.reasoning_effort,
                tools=head.tools,
                shared=self._shared,
                began=began,
                restore=restore,
            )
        self._numbers += 1
        return StreamLine(self._numbers, session, request.head, began)

    def _start(self, reply: LineReply, request: Request, choice: Choice) -> None:
        line, source = choice.source, choice.source
        fresh = choice.copy or not isinstance(line, StreamLine)
        if fresh:
            line = self._open(request, source)
        assert isinstance(line, StreamLine)
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
        reply.restored, copied = None, None
        if isinstance(source, KeptLine):
            reply.restored = source
            # It continues in the same file, unless turns in the file are rolled back.
            if not choice.back and all(one.kept != source.name for one in self._lines):
                line.kept = source.name
        elif source and fresh:
            reply.source = copied = source
            source.copies.add(taken)
            source.spare = choice.back == 1 and not choice.history
        if fresh:
            self._lines.append(line)
        reply.line, reply.cache, reply.reason = line.id, choice.cache, choice.reason
        reply.reader.when_done(partial(self._done, line, taken, fresh, copied))

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
            elif end and self._kept and len(record):
                self._keep(line, self._kept)
        self._release(line, taken)

    def _keep(self, line: StreamLine, kept: KeptLines) -> None:
        """Write a line to its file as soon as its stream is idle, or before it is closed."""
        line.kept = line.kept or kept.new_name()
        record, window = line.record.copy(), line.window
        found = KeptLine(line.kept, line.head, record, window, line.began)
        line.session.when_idle(partial(kept.save, found))

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
