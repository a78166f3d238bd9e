"""The rows of a transcript and their checksums; independent of the database.

A turn's checksum covers the session's id, the turn's number and its texts. Reading therefore
detects rows that were altered, swapped, copied from another session or removed. It does not detect
a forgery with new checksums.
"""

import hashlib
import json
import re
import struct
import uuid
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Self

from mlx_stream.chat.exchange import FINISHES, Exchange, question_of
from mlx_stream.chat.messages import Message
from mlx_stream.text.tool_calls import ToolCall

EVICTS = ("turn", "token")
ASKED, ANSWERED, FORGOTTEN = "asked", "answered", "forgotten"  # states of a turn
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+]00:00)", re.ASCII)
ID = re.compile(r"[0-9a-f]{32}", re.ASCII)

Value = str | int | bytes | None
Row = tuple[Value, ...]
ASKED_ROLES = {"user", "tool", "system"}
KINDS = {type(None): "n", str: "s", bytes: "b", int: "i"}


@dataclass(frozen=True)
class SessionHeader:
    """The description of a session.

    Attributes:
        id: 32 hexadecimal digits, random.
        created: when the session was created, in ISO 8601, UTC, to the second.
        model: the source that the user gave.
        fingerprint: the model's fingerprint.
        evict: the unit of eviction: `turn` or `token`.
        kv_bits: bits per number in the ring's keys and values; None if they are not quantized.
    """

    id: str
    created: str
    model: str
    fingerprint: str
    system: str | None
    window: int
    sinks: int
    evict: str
    kv_bits: int | None = None

    @classmethod
    def new(cls, **fields: Any) -> Self:
        """Return a header with a new id, created now."""
        return cls(id=uuid.uuid4().hex, created=now(), **fields)

    def check(self) -> None:
        check_types(str, self.id, self.created, self.model, self.fingerprint, self.system or "")
        check_types(int, self.window, self.sinks, self.kv_bits or 0)
        if not ID.fullmatch(self.id) or not is_time(self.created):
            raise ValueError(f"id {self.id[:40]!r}, created {self.created[:40]!r}")
        if self.window < 1 or self.sinks < 0 or self.evict not in EVICTS:
            raise ValueError(f"window {self.window}, sinks {self.sinks}, evict {self.evict!r:.40}")


@dataclass(frozen=True)
class TranscriptState:
    """The row of the `session` table.

    Attributes:
        first: number of the oldest attended turn, from 1; `count` + 1 if no turn is attended.
        sampler: state of the random number generator, in hexadecimal.
        recall_from: number of the oldest turn that may be recalled.
        count: number of turns.
        last: checksum of the last turn; "" if there are no turns.
    """

    header: SessionHeader
    first: int
    sampler: str
    recall_from: int = 1
    count: int = 0
    last: str = ""

    def check(self) -> None:
        self.header.check()
        check_types(int, self.first, self.recall_from, self.count)
        check_types(str, self.sampler, self.last)
        if not (1 <= self.first <= self.count + 1 and 1 <= self.recall_from <= self.count + 1):
            raise ValueError(
                f"the first attended turn {self.first} or recalled turn {self.recall_from} is out "
                f"of range for {self.count} turns"
            )

    def row(self) -> Row:
        values = (1, *astuple(self.header), *(getattr(self, name) for name in NUMBERS))
        return (*values, digest("session", *values))


NUMBERS = tuple(field.name for field in fields(TranscriptState))[1:]


def state_of(row: Sequence[Value]) -> TranscriptState:
    """Return the state stored in a row.

    Raises:
        ValueError, TypeError: the row was altered.
    """
    *values, checksum = row
    if checksum != digest("session", *values):
        raise ValueError("its description was altered")
    found: list[Any] = values[1:]
    count = len(fields(SessionHeader))
    state = TranscriptState(SessionHeader(*found[:count]), *found[count:])
    state.check()
    return state


@dataclass(frozen=True)
class StoredTurn:
    """A turn in the transcript.

    Attributes:
        state: `asked`, `answered` or `forgotten`; the texts of a forgotten turn have been removed.
        exchange: the question and reply; the reply is empty if the turn has not been answered.
        time: when the turn was written, in ISO 8601, UTC, to the second.
    """

    number: int
    state: str
    exchange: Exchange
    time: str

    def rows(self) -> tuple[Row, list[Row]]:
        """Return the row for the `turns` table, without its checksum, and those for `messages`."""
        exchange, answered = self.exchange, self.state == ANSWERED
        if exchange.finish not in FINISHES:
            raise ValueError(f"finish {exchange.finish!r:.40} is not one of {', '.join(FINISHES)}")
        check_types(str, exchange.question, exchange.reply, exchange.rest, exchange.thinking)
        thinking = exchange.thinking or None
        settled = None if exchange.settled_ids is None else pack_ids(exchange.settled_ids)
        finish, closing = exchange.finish if answered else None, pack_ids(exchange.closing_ids)
        turn: Row = (self.number, self.state, finish, self.time, closing, settled)
        calls = calls_json(exchange.calls) if exchange.calls else None
        question, reply = (pack_ids(ids) for ids in (exchange.question_ids, exchange.reply_ids))
        messages: list[Row] = []
        for place, asked in enumerate(exchange.asked):
            check_types(str, asked.role, asked.text, asked.name, asked.id)
            of = calls_json([ToolCall(asked.name, {}, asked.id)]) if asked.role == "tool" else None
            ids = b"" if place else question  # the first row has the ids of all the messages
            messages.append((self.number, place, asked.role, asked.text, None, of, ids, None))
        rest, place = exchange.rest, len(messages)
        answer = (self.number, place, "assistant", exchange.reply, thinking, calls, reply, rest)
        if self.state == FORGOTTEN:
            return turn, []
        return turn, [*messages, answer] if answered else messages


def turn_of(turn: Row, messages: Sequence[Row]) -> StoredTurn:
    """Return the turn that these rows hold; `turn` does not include the checksum.

    Raises:
        ValueError, TypeError: the rows do not form a turn.
    """
    columns: tuple[Any, ...] = turn
    number, state, finish, time, closing, settled = columns
    answered = state == ANSWERED
    places = [(message[0], message[1]) for message in messages]
    roles = [message[2] for message in messages]
    asked_roles = roles[:-1] if answered else roles
    if (
        state not in (ASKED, ANSWERED, FORGOTTEN)
        or bool(asked_roles) != (state != FORGOTTEN)
        or not ASKED_ROLES.issuperset(asked_roles)
        or (answered and roles[-1] != "assistant")
        or places != [(number, at) for at in range(len(roles))]
    ):
        raise ValueError(f"its messages do not belong to a turn in state {state!r:.40}")
    if (finish in FINISHES) != answered or not is_time(time):
        raise ValueError(f"a turn in state {state!r} has finish {finish!r:.40}, time {time!r:.40}")
    check_types(int, number)
    missing: Row = (number, -1, "", "", None, None, b"", "")
    reply: tuple[Any, ...] = messages[-1] if answered else missing
    asked = tuple(map(message_of, messages[: len(asked_roles)]))
    texts: list[Any] = [reply[3], reply[7], reply[4] or ""]
    check_types(str, *texts)
    exchange = replace(
        question_of(asked) if asked else Exchange("", "", (), (), ()),
        reply=texts[0],
        closing_ids=unpack_ids(closing),
        question_ids=unpack_ids(messages[0][6] if asked else b""),
        reply_ids=unpack_ids(reply[6]),
        rest=texts[1],
        finish=finish or "interrupted",
        settled_ids=None if settled is None else unpack_ids(settled),
        thinking=texts[2],
        calls=calls_of(reply[5]),
    )
    return StoredTurn(number, state, exchange, time)


def message_of(row: Row) -> Message:
    """Return the message in a row that `StoredTurn.rows` wrote."""
    columns: tuple[Any, ...] = row
    check_types(str, columns[3])
    if (columns[2] == "tool") != (columns[5] is not None):
        raise ValueError("a tool message must name its call, and no other message may")
    (call,) = calls_of(columns[5]) or (ToolCall("", {}),)
    return Message(columns[2], columns[3], name=call.name, id=call.id)


def calls_json(calls: Sequence[ToolCall]) -> str:
    """Return tool calls as JSON text."""
    values = [[call.name, call.arguments, call.id] for call in calls]
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


def calls_of(text: Any) -> tuple[ToolCall, ...]:
    """Return the tool calls in JSON text; an empty tuple for None.

    Raises:
        ValueError, TypeError: the text holds something else.
    """
    if text is None:
        return ()
    try:
        calls = tuple(ToolCall(*values) for values in json.loads(text))
    except RecursionError as error:
        raise ValueError("its calls are nested too deeply") from error
    for call in calls:
        check_types(str, call.name, call.id)
        check_types(dict, call.arguments)
    return calls


def turn_checksum(session: str, turn: Row, messages: Sequence[Row]) -> str:
    """Return the checksum of a turn's rows."""
    values = (value for row in (turn, *messages) for value in row)
    return digest("turn", session, len(messages), *values)


def pack_ids(ids: Sequence[int]) -> bytes:
    """Pack ids as little-endian uint32."""
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as error:
        raise ValueError(f"ids must be whole numbers below 2^32: {error}") from error


def unpack_ids(data: Any) -> tuple[int, ...]:
    check_types(bytes, data)
    if len(data) % 4:
        raise ValueError("the last id is cut short")
    return struct.unpack(f"<{len(data) // 4}I", data)


def digest(*values: Value) -> str:
    """Return the SHA-256 of some values, each encoded with its type and length."""
    parts = []
    for value in values:
        if type(value) not in KINDS:
            raise TypeError(f"a {type(value).__name__} cannot be stored")
        text = "" if value is None else str(value)
        data = value if isinstance(value, bytes) else text.encode()
        parts += f"{KINDS[type(value)]}{len(data)}:".encode(), data
    return hashlib.sha256(b"".join(parts)).hexdigest()


def check_types(kind: type, *values: object) -> None:
    for value in values:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")


def is_time(text: Any) -> bool:
    """Return whether a value is a time as `now` writes it, in a year valid in any time zone."""
    try:
        return bool(TIME.fullmatch(text)) and 1 < datetime.fromisoformat(text).year < 9999
    except (ValueError, TypeError):
        return False


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
