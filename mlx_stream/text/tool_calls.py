"""Reads the tool calls in a reply, in the formats that chat templates use; runs no tools."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_stream.text.thinking import overlap


@dataclass(frozen=True)
class ToolCall:
    """A tool call in a reply.

    Attributes:
        arguments: the parsed JSON object.
        id: identifies the call in the message with its result. "" if the model gave none.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True)
class CallStyle:
    """How a model family writes tool calls: after the answer, up to the end of the reply.

    Attributes:
        signs: strings that every template of such a model contains.
        openings: strings that begin the calls.
        read: returns the calls in a text that begins with an opening; raises ValueError if it
            holds anything else.
        tokens: special tokens in calls. They do not end a reply.
        leads: whether calls can occur only at the beginning of a reply.
    """

    signs: tuple[str, ...]
    openings: tuple[str, ...]
    read: Callable[[str], list[ToolCall]]
    tokens: tuple[str, ...] = ()
    leads: bool = False


def call_of(value: Any) -> ToolCall:
    """Return the call in a parsed JSON object; raise ValueError if it is not a call."""
    if not isinstance(value, dict):
        raise ValueError("not an object")
    name, id = value.get("name"), value.get("id", "")
    arguments = value.get("arguments", value.get("parameters"))
    if not (isinstance(name, str) and name and isinstance(id, str)):
        raise ValueError("no name")
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # as it will be rendered
    return ToolCall(name, arguments, id)


def parse_values(text: str, between: str) -> list[Any]:
    """Return consecutive JSON values; the text between them must match a pattern."""
    values, at, decoder = [], 0, json.JSONDecoder(strict=False, parse_constant=refuse_constant)
    gap = re.compile(between)
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
            found = gap.match(text, at)
            if not found:
                raise ValueError("other text")
            at = found.end()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return values


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_tagged(text: str) -> list[ToolCall]:
    """Read `<tool_call>{...}</tool_call>` (Qwen, Hermes)."""
    body = re.sub(r"^\s*<tool_call>\s*|\s*</tool_call>\s*$", "", text)
    return [*map(call_of, parse_values(body, r"\s*(?:</tool_call>\s*<tool_call>\s*|$)"))]


def read_mistral(text: str) -> list[ToolCall]:
    """Read `[TOOL_CALLS][{...}]` and `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}` (Mistral)."""
    body = text.strip().removeprefix("[TOOL_CALLS]").strip()
    if body.startswith("["):
        (values,) = parse_values(body, r"\s*$")
        return [*map(call_of, values)]
    calls = []
    for part in body.split("[TOOL_CALLS]"):
        head, _, arguments = part.partition("[ARGS]")
        name, _, id = head.partition("[CALL_ID]")
        (value,) = parse_values(arguments.strip(), r"\s*$")
        calls.append(call_of({"name": name.strip(), "id": id.strip(), "arguments": value}))
    return calls


def read_llama(text: str) -> list[ToolCall]:
    """Read `{"name": ..., "parameters": {...}}` (Llama 3)."""
    body = text.strip().removeprefix("<|python_tag|>").strip()
    return [*map(call_of, parse_values(body, r"\s*;?\s*"))]


HARMONY = re.compile(
    r"\s*(?:<\|start\|>assistant)?(?: ?to=functions\.([^\s<]+))?\s*<\|channel\|>commentary"
    r"(?: to=functions\.([^\s<]+))?\s*(?:<\|constrain\|>)?(?:json)?\s*<\|message\|>(.*)",
    re.DOTALL,
)


def read_harmony(text: str) -> list[ToolCall]:
    """Read `<|channel|>commentary to=functions.name json<|message|>{...}` (gpt-oss)."""
    found = HARMONY.fullmatch(text)
    if not found:
        raise ValueError("no call")
    (value,) = parse_values(found[3].strip(), r"\s*$")
    return [call_of({"name": found[1] or found[2], "arguments": value})]


HARMONY_CALLS = (" to=functions.", "<|channel|>commentary to=functions.")
CALL_STYLES = (
    CallStyle(
        ("<|channel|>commentary", "functions."),
        (*HARMONY_CALLS, *(f"<|start|>assistant{opening}" for opening in HARMONY_CALLS)),
        read_harmony,
        ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"),
    ),
    CallStyle(
        ("[TOOL_CALLS]",), ("[TOOL_CALLS]",), read_mistral, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    ),
    CallStyle(
        ("<tool_call>", '"arguments'),
        ("<tool_call>",),
        read_tagged,
        ("<tool_call>", "</tool_call>"),
    ),
    CallStyle(
        ("<|start_header_id|>", "tool_calls", '"parameters": '),
        ("<|python_tag|>", "{"),
        read_llama,
        ("<|python_tag|>",),
        leads=True,
    ),
)


def call_style_of(source: str) -> CallStyle | None:
    """Return the style of tool calls that a template's source uses, if any."""
    return next((s for s in CALL_STYLES if all(sign in source for sign in s.signs)), None)


class CallReader:
    """Split an answer into its text and its tool calls; text that may be a call is held back.

    Args:
        style: None if there are no tools; then everything is text.

    Attributes:
        calls: the calls, once `flush` has read them.
        begin: the length of the answer's text; the calls follow it, perhaps after whitespace.
    """

    def __init__(self, style: CallStyle | None):
        self.style = style
        self.calls: tuple[ToolCall, ...] = ()
        self.begin = 0
        self._pending, self._inside = "", False

    def add(self, text: str) -> str:
        """Return the text that is known not to be a call."""
        if not self.style:
            return text
        self._pending += text
        if self._inside:
            return ""
        place, self._inside = self._opening(self.style)
        return self._take(len(self._pending[:place].rstrip()))

    def flush(self) -> str:
        """Read the calls at the end of a reply; return held-back text that is not part of one."""
        if self.style and self._inside:
            try:
                self.calls = tuple(self.style.read(self._pending))
            except ValueError:  # the model wrote something that only begins like a call
                self.calls = ()
        return "" if self.calls else self._take(len(self._pending))

    def _opening(self, style: CallStyle) -> tuple[int, bool]:
        """Return where calls begin or may begin, and whether they do."""
        text = self._pending
        if style.leads:
            start = text.lstrip()
            inside = not self.begin and start.startswith(style.openings)
            begins = not self.begin and any(mark.startswith(start) for mark in style.openings)
            return (0 if inside or begins else len(text)), inside
        places = [at for mark in style.openings if (at := text.find(mark)) >= 0]
        if places:
            return min(places), True
        return len(text) - max(overlap(text, mark) for mark in style.openings), False

    def _take(self, count: int) -> str:
        taken, self._pending = self._pending[:count], self._pending[count:]
        self.begin += len(taken)
        return taken
