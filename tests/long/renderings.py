"""Compare how we render conversations, and what a stream reads, with transformers.

    python -m tests.long.renderings TEMPLATE...

The conversations have 1, 2 and 5 turns: with and without a system prompt, with and without thinking
before a reply, with the thinking switch unset, on and off, and with tools where the template
accepts them. Each is rendered by transformers' `apply_chat_template` and by `ChatTemplate`; then
its ids are compared with those that a stream holds after reading it turn by turn. The tokenizer is
a byte-level one with the template's special tokens. Prints a line of JSON for each template, and
the totals; exits with 1 if something differs.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mlx_stream.chat.exchange import Exchange, question_of
from mlx_stream.chat.messages import Message, as_messages
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.chat.template_messages import escaped_calls
from mlx_stream.errors import TemplateError, one_line
from mlx_stream.text.template.chat_template import ChatTemplate, user
from mlx_stream.text.tokenizer import Tokenizer
from mlx_stream.text.tool_calls import ToolCall
from tests.fakes.thinkers import thinker_tokenizer
from tests.fakes.tool_models import TOOLS

QUESTIONS = ("Hi", "And then?\nTell me.", "Why äöü €?", "Go on", "And the man?")
ANSWERS = ("Hello.", "In the end\n\nso it is.", "Thus.", "No more", "The man.")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = ToolCall("weather", {"of": "Rome"}, "000000001")

Turn = tuple[tuple[Message, ...], str, str, tuple[ToolCall, ...]]


def conversations(tools: bool, thinks: bool) -> Iterator[tuple[str, list[Turn]]]:
    """Yield conversations, each after a short description of it."""
    for count in (1, 2, 5):
        turns = [(as_messages(q), a, "", ()) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        yield f"{count} turns", turns[:count]
        if thinks:
            yield (
                f"{count} turns, thinking",
                [(m, a, "One more.", ()) for m, a, *_ in turns[:count]],
            )
    if tools:
        result = (Message("tool", "Fine.", name=CALL.name, id=CALL.id),)
        chain: list[Turn] = [
            (as_messages("How is it?"), "", "", (CALL,)),
            (result, "", "", (CALL,)),
            (result, "It is fine.", "", ()),
        ]
        yield "a chain of calls", chain
        yield "an open chain of calls", chain[:2]


class Reader:
    """Reads conversations turn by turn, as a stream does."""

    def __init__(self, source: str, system: str | None, options: dict[str, Any], tools: bool):
        backend = thinker_tokenizer(source)
        self.tokenizer = Tokenizer(backend, {})
        special = tuple(self.tokenizer.added_texts.values())
        template = ChatTemplate(source, TOKENS, special, options)
        self.prompts = PromptBuilder(self.tokenizer, template, system, True, TOOLS if tools else ())
        self.template = self.prompts.template
        self.theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)
        self.theirs.chat_template = source

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        found = [dict(message) for message in self.prompts.head]
        for asked, reply, thinking, calls in turns:
            found += [dict(m) for m in self.asked(asked)]
            found.append(dict(self.template.answer(reply, thinking, escaped_calls(calls, str))))
        calls = turns[-1][3]
        following = [Message("tool", "Good.", name=c.name, id=c.id) for c in calls]
        return [*found, *(dict(m) for m in self.asked(tuple(following) or as_messages("Next?")))]

    def asked(self, messages: tuple[Message, ...]) -> list[Any]:
        return [
            user(m.text)
            if m.role == "user"
            else {"role": "tool", "content": m.text, "tool_call_id": m.id, "name": m.name}
            for m in messages
        ]

    def read(self, turns: Sequence[Turn]) -> list[int]:
        """Return the ids that a stream holds after a conversation and the next message."""
        exchanges = {number: self.exchange(*turn) for number, turn in enumerate(turns, 1)}
        encoded = self.prompts.encode_again(exchanges)
        ids = [*self.prompts.pinned]
        for exchange in encoded.values():
            ids += exchange.closing_ids + exchange.ids
        following = [Message("tool", "Good.", name=c.name, id=c.id) for c in turns[-1][3]]
        last = encoded[len(turns)]
        closing, asked = self.prompts.question(following or "Next?", last, first=False)
        return [*ids, *closing, *asked]

    def exchange(
        self, asked: Any, reply: str, thinking: str, calls: tuple[ToolCall, ...]
    ) -> Exchange:
        return replace(
            question_of(asked), reply=reply, thinking=thinking, calls=calls, finish="end"
        )


def compare(source: str) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    differ: list[str] = []
    refused: dict[str, str] = {}
    switches = [("", {}), ("on", {"enable_thinking": True}), ("off", {"enable_thinking": False})]
    if "enable_thinking" not in source:
        switches = switches[:1]
    for tools in (False, True):
        for system in (None, "Be brief."):
            for switch, options in switches:
                name = " ".join(["tools"] * tools + ["system"] * bool(system) + [switch]).strip()
                try:
                    reader = Reader(source, system, options, tools)
                except TemplateError as error:
                    refused[name or "plain"] = one_line(error, 160)
                    continue
                thinks = reader.template.style is not None
                place = reader.prompts.system_place if system else ""
                for what, turns in conversations(tools, thinks):
                    messages = reader.messages(turns)
                    given: dict[str, Any] = {"tools": [*reader.template.tools]} if tools else {}
                    theirs = reader.theirs.apply_chat_template(
                        messages,
                        tokenize=False,
                        add_generation_prompt=True,
                        tools_in_user_message=False,
                        **options,
                        **given,
                    )
                    assert isinstance(theirs, str)
                    counts["rendered"] += 1
                    ours = reader.template.render(messages, reply=True)
                    held = reader.tokenizer.encode(theirs, special=False)
                    try:
                        read: Any = reader.read(turns)
                    except TemplateError as error:
                        read = one_line(error, 90)
                    if ours != theirs:
                        differ.append(f"{name} {what} {place}: rendered otherwise")
                    elif read != held:
                        why = read if isinstance(read, str) else "read otherwise"
                        differ.append(f"{name} {what} {place}: {why}")
                    else:
                        counts["equal"] += 1
    return {**counts, "differ": differ, "refused": refused}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("templates", nargs="+", type=Path)
    sums: Counter[str] = Counter()
    for path in parser.parse_args().templates:
        found = compare(path.read_text("utf-8"))
        sums.update({key: found.get(key, 0) for key in ("rendered", "equal")})
        sums["differ"] += len(found["differ"])
        sums["refused whole"] += not found.get("rendered")
        print(json.dumps({"template": path.stem, **found}, ensure_ascii=False), flush=True)
    print(json.dumps(sums))
    return bool(sums["differ"])


if __name__ == "__main__":
    sys.exit(main())
