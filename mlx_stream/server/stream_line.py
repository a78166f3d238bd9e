"""A line: one stream, the record of what it has read, and its state for clients."""

from dataclasses import dataclass, field
from datetime import datetime

from mlx_stream.engine.handle import Session
from mlx_stream.server.line_record import Record
from mlx_stream.server.line_reply import Taken


@dataclass(eq=False)
class StreamLine:
    """One stream and what it has read.

    Attributes:
        head: the digest of its head.
        began: when it was opened; its template may mention the date.
        kept: the name under which it is kept, if it is.
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
    began: datetime
    kept: str | None = None
    record: Record = field(default_factory=Record)
    reply: Taken | None = None
    used: int = 0
    spare: bool = False
    copies: set[Taken] = field(default_factory=set)
    requests: int = 0
    ended: float = 0.0

    @property
    def window(self) -> int:
        return self.session.stats.window


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
