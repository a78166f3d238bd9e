"""The messages between two replies, and which of them belong together; plain values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.text.tool_calls import ToolCall
from mlx_stream.text.valid_text import check_text

ROLES = ("user", "tool", "system", "assistant")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: `user`, `tool`, `system` or `assistant`.
        calls: an assistant message's tool calls.
        name, id: the name and id of the call that a tool message answers. Default: those of the
            last reply's first call that no earlier message of the turn has answered.
        thinking: an assistant message's thinking.
    """

    role: str
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    id: str = ""
    thinking: str = ""


# The messages of a turn, or only the text if the turn is a single user message.
Question = str | Sequence[Message]


def as_messages(question: Question) -> tuple[Message, ...]:
    """Return the messages of a turn, unchecked; a string is a user message."""
    return (Message("user", question),) if isinstance(question, str) else tuple(question)


def turn_of_messages(question: Question) -> tuple[tuple[Message, ...], Message | None]:
    """Return the messages of a turn, and the assistant message that begins the reply, if any.

    Raises:
        TextError: the question is empty, or a text is not valid Unicode.
        ValueRefused: a message has an unknown role, or an assistant message is not the last.
    """
    if isinstance(question, str) and not question:
        raise TextError("the question is empty")
    texts = isinstance(question, str) or (
        isinstance(question, Sequence) and all(isinstance(one, Message) for one in question)
    )
    if not texts:
        raise TextError(f"a question must be text or a sequence of messages, not {question!r:.60}")
    messages = as_messages(question)
    for place, message in enumerate(messages):
        check_message(message)
        if message.role == "assistant" and place < len(messages) - 1:
            raise ValueRefused("an assistant message must end a turn: it begins the reply")
    begin = messages[-1] if messages and messages[-1].role == "assistant" else None
    if begin and begin.calls:
        raise ValueRefused("the beginning of a reply cannot call tools")
    asked = messages[:-1] if begin else messages
    if not asked:
        raise ValueRefused("a turn needs at least one message")
    return asked, begin


def check_message(message: Message) -> None:
    """Raise ValueRefused or TextError for a message that cannot be passed to a template."""
    if message.role not in ROLES:
        raise ValueRefused(f"a role must be one of {', '.join(ROLES)}, not {message.role!r}")
    for text in (message.text, message.name, message.id, message.thinking):
        check_text(text)


def text_of_messages(messages: Sequence[Message]) -> str:
    """Join the texts of a turn's messages."""
    return "\n\n".join(message.text for message in messages)


def answering(messages: Sequence[Message], calls: Sequence[ToolCall]) -> tuple[Message, ...]:
    """Return a turn's messages, with tool results matched to the calls of the last reply.

    Raises:
        ValueRefused: calls and results do not match.
    """
    waiting, found = [*calls], list[Message]()
    for message in messages:
        if message.role == "tool":
            call = next((c for c in waiting if message.id in ("", c.id)), None)
            if call is None:
                raise ValueRefused(
                    "a tool message has no call to answer: the last reply has "
                    f"{len(calls):,} calls, and the message's id is {message.id!r}"
                )
            waiting.remove(call)
            message = replace(message, id=call.id, name=message.name or call.name)
        found.append(message)
    if waiting:
        raise ValueRefused(
            f"the last reply calls {', '.join(call.name for call in waiting)}: give the result as "
            "a tool message, or undo the reply"
        )
    if calls and any(message.role != "tool" for message in found):
        raise ValueRefused("tool results must be a turn of their own: ask in the next turn")
    return tuple(found)


def calls_with_ids(calls: Sequence[ToolCall], number: int) -> tuple[ToolCall, ...]:
    """Return the calls in the reply of turn `number`, each with the model's id or a new one."""
    return tuple(
        call if call.id else replace(call, id=f"{number:06}{place:03}")
        for place, call in enumerate(calls)
    )
