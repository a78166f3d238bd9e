"""Messages, calls and tools in the form passed to a template, with every string escaped."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_stream.chat.messages import Message
from mlx_stream.text.template.chat_template import MessageDict, tool_calls
from mlx_stream.text.tool_calls import ToolCall


def message_dicts(
    messages: Sequence[Message], escape: Callable[[str], str] = str
) -> list[MessageDict]:
    """Return messages in the form passed to a template."""
    return [message_dict(message, escape) for message in messages]


def message_dict(message: Message, escape: Callable[[str], str]) -> MessageDict:
    found: dict[str, Any] = {"role": message.role, "content": escape(message.text)}
    if message.role == "tool":
        found |= {"tool_call_id": escape(message.id), "name": escape(message.name)}
    return found


def escaped_json(value: Any, escape: Callable[[str], str]) -> Any:
    """Return a JSON value with every string escaped."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {escape(key): escaped_json(item, escape) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped_json(item, escape) for item in value]
    return value


def escaped_calls(calls: Sequence[ToolCall], escape: Callable[[str], str]) -> list[Any]:
    """Return calls in the form passed to a template."""
    each = ((c.name, c.arguments, c.id) for c in calls)
    return tool_calls(escaped_json([*each], escape))
