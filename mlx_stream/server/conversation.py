"""A client's messages, split into a head, closed turns and an open turn, with their digests.

    system      Be brief.                        the head, with the tools
    user        Hi          \\
    assistant   Hello!      /                    a closed turn
    user        And then?                        the question

The ids of tool calls differ from client to client. Here, results are in the order of the calls, and
messages have no ids.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from mlx_stream.chat.messages import Message, answering, check_message
from mlx_stream.errors import ValueRefused
from mlx_stream.text.tool_calls import ToolCall

# A template can render this many within its time limit, and no chat has anywhere near that many.
MOST_IN_TURN = 1_024
# The maximum number of characters in a turn or a head: encoding more would hold up the other
# streams, and the window would keep only the end.
LONGEST_TEXT, LONGEST_PER_TOKEN = 2**18, 8
DIGEST_BYTES = 32
TURN_BYTES = 2 * DIGEST_BYTES


@dataclass(frozen=True)
class Head:
    """What is pinned, and how the template is used.

    Attributes:
        tools: JSON schemas in the format of OpenAI's API.
        think, reasoning_effort: see `ChatSession`.
    """

    system: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    think: bool | None = None
    reasoning_effort: str | None = None


@dataclass(frozen=True)
class Conversation:
    """A client's messages.

    Attributes:
        turns: the closed turns, each a sequence of messages that ends with the reply.
        question: the open turn. A final assistant message is the beginning of the reply.
    """

    head: Head
    turns: tuple[tuple[Message, ...], ...]
    question: tuple[Message, ...]

    @property
    def begins_reply(self) -> bool:
        return self.question[-1].role == "assistant"


def longest_text(window: int | None) -> int:
    """Return how many characters of one turn, or of a head, are read."""
    return max(LONGEST_TEXT, LONGEST_PER_TOKEN * (window or 0))


def characters_of(turn: Iterable[Message]) -> int:
    return sum(len(message.text) + len(message.thinking) for message in turn)


def check_lengths(conversation: Conversation, longest: int) -> None:
    """Refuse a conversation whose head or question is too long to be read.

    Raises:
        ValueRefused: it is longer than `longest` characters.
    """
    for what, count in (
        ("the system prompt has", len(conversation.head.system or "")),
        ("the messages after the last reply have", characters_of(conversation.question)),
    ):
        if count > longest:
            raise ValueRefused(
                f"{what} {count:,} characters, but at most {longest:,} are read at once: send "
                "less, or use a larger --window"
            )


def conversation_of(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    think: bool | None = None,
    reasoning_effort: str | None = None,
) -> Conversation:
    """Split a client's messages into a head, closed turns and an open turn.

    Consecutive replies are merged.

    Raises:
        ValueRefused: there is nothing to answer, a reply answers nothing, tool results do not
            match the calls before them, or too many messages have no reply between them.
        TextError: a text is not valid Unicode.
    """
    for message in messages:
        check_message(message)
    first = next((at for at, m in enumerate(messages) if m.role != "system"), len(messages))
    system = "\n\n".join(message.text for message in messages[:first])
    turns: list[tuple[Message, ...]] = []
    asked, calls = list[Message](), ()
    for message in messages[first:]:
        if message.role != "assistant":
            asked.append(message)
        elif asked:
            turns.append((*results_in_order(asked, calls), without_ids(message)))
            asked, calls = [], message.calls
        elif turns:
            turns[-1] = (*turns[-1][:-1], join_replies(turns[-1][-1], message))
            calls = (*calls, *message.calls)
        else:
            raise ValueRefused("the first message is a reply: begin with a user message")
    if asked:
        question = results_in_order(asked, calls)
    elif turns and not turns[-1][-1].calls:
        question = turns.pop()
    else:
        raise ValueRefused("there is nothing to answer: end with a user or tool message")
    head = Head(system or None, tools, think, reasoning_effort)
    return Conversation(head, tuple(turns), question)


def results_in_order(asked: Sequence[Message], calls: Sequence[ToolCall]) -> tuple[Message, ...]:
    """Return a turn's messages, with tool results in the order of the calls, and without ids."""
    if len(asked) > MOST_IN_TURN:
        raise ValueRefused(
            f"{len(asked):,} messages have no reply between them, and the limit is "
            f"{MOST_IN_TURN:,}: merge them"
        )
    if not calls:
        return answering(asked, ())
    places = [replace(call, id=call.id or f"call {at}") for at, call in enumerate(calls)]
    order = [call.id for call in places]
    found = answering(asked, places)
    return tuple(replace(m, id="") for m in sorted(found, key=lambda m: order.index(m.id)))


def without_ids(reply: Message) -> Message:
    if not reply.calls:
        return reply
    return replace(reply, calls=tuple(replace(call, id="") for call in reply.calls))


def join_replies(first: Message, second: Message) -> Message:
    """Merge two replies into one."""
    second = without_ids(second)
    return replace(
        first,
        text="\n\n".join(filter(None, (first.text, second.text))),
        thinking="\n\n".join(filter(None, (first.thinking, second.thinking))),
        calls=(*first.calls, *second.calls),
    )


class Digests:
    """Keyed digests of `DIGEST_BYTES` each; they cannot be predicted without the key."""

    def __init__(self, key: bytes):
        self._key = key

    def of_head(self, head: Head, *more: object) -> bytes:
        """Return the digest of a head and of everything else that its stream depends on."""
        values = [head.system, head.tools, head.think, head.reasoning_effort, *more]
        return self._of([canonical(values)])

    def of_turns(self, turns: Iterable[Sequence[Message]]) -> bytes:
        """Return the digests of closed turns, `TURN_BYTES` each: for the messages and the reply."""
        return b"".join(
            self.of_messages(messages) + self.of_reply(reply.text, reply.calls)
            for *messages, reply in turns
        )

    def of_messages(self, messages: Sequence[Message]) -> bytes:
        """Return the digest of a turn's messages."""
        return self._of(text for m in messages for text in (m.role, m.name, m.text))

    def of_reply(self, text: str, calls: Sequence[ToolCall] = ()) -> bytes:
        """Return the digest of an answer and its tool calls, ignoring thinking and ids."""
        answer = unicodedata.normalize("NFC", text).strip()
        return self._of([answer, *(canonical([c.name, c.arguments]) for c in calls)])

    def _of(self, texts: Iterable[str]) -> bytes:
        found = blake2b(key=self._key, digest_size=DIGEST_BYTES)
        for text in texts:
            data = text.encode()
            found.update(len(data).to_bytes(8, "little"))
            found.update(data)
        return found.digest()


def canonical(value: Any) -> str:
    """Return a value as JSON that does not depend on the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=dict)
