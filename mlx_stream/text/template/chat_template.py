"""Renders messages as text, not tokens, using a model's chat template, which is untrusted.

Each turn is read only once, so its text must be exactly what the template appends:

    opening("Be brief.", "Hi")    <|im_start|>system ... user\nHi<|im_end|>\n<|im_start|>assistant\n
    (the model)                   Hello.
    closing                       <|im_end|>\n
    turn("And?", "Be brief.")     <|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n

A template may rewrite an exchange once the next question follows, for example to drop the reply's
thinking; `settled` returns the rewritten form. A template that changes an exchange after that is
refused. Thinking is passed to a template in a separate field if the template has one or drops
thinking, and otherwise as the model wrote it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import Any
from uuid import uuid4

from mlx_stream.errors import TemplateError, one_line
from mlx_stream.text.template.meter import T, metered
from mlx_stream.text.template.sandbox import TemplateEnvironment
from mlx_stream.text.thinking import style_of

# The longest templates of published models have about 30,000 characters.
MAX_SOURCE = 50_000

MessageDict = Mapping[str, Any]
# The messages of a turn, or just the text if the turn is a single user message.
Turn = str | Sequence[MessageDict]
# The variables that tell a template whether and how much to think.
SWITCHES: Sequence[str] = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"
# A placeholder for a reply when only the text around it is wanted. No other text contains it.
MARK = f"Reply{uuid4().int}"
LATER = f"Later{uuid4().int}"
PADDED = f"\n \n{MARK}\n \n"
SYSTEM = "Answer briefly."
THOUGHT = "One more than one."
# The second reply includes thinking, to detect templates that drop the thinking of earlier turns.
EXCHANGES: Sequence[tuple[str, str, str]] = (
    ("What is the first?", "It is one.", ""),
    ("And the second,\nplease?", "It is two.", THOUGHT),
    ("The third?", "It is three.", ""),
    ("The last?", "So it is one, or three.", ""),
    ("Which?", "Three.", ""),
)


def user(content: str) -> MessageDict:
    return {"role": "user", "content": content}


def assistant(content: str) -> MessageDict:
    return {"role": "assistant", "content": content}


def tool_calls(calls: Iterable[tuple[str, Any, str]]) -> list[dict[str, Any]]:
    """Return the `tool_calls` of a message, given the name, arguments and id of each call."""
    return [
        {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}
        for name, arguments, id in calls
    ]


def tool_results(calls: Sequence[MessageDict], content: str) -> list[MessageDict]:
    """Return a result message for each of these tool calls, all with the same content."""
    return [
        {
            "role": "tool",
            "content": content,
            "tool_call_id": call["id"],
            "name": call["function"]["name"],
        }
        for call in calls
    ]


def messages_of(turn: Turn) -> list[MessageDict]:
    return [user(turn)] if isinstance(turn, str) else [*turn]


def stand_in(turn: Sequence[MessageDict]) -> list[MessageDict]:
    """Return placeholder messages that may precede a turn; the last is a reply that contains MARK.

    If the turn contains tool results, that reply calls those tools.
    """
    results = [message for message in turn if message["role"] == "tool"]
    if not results:
        return [user("x"), assistant(MARK)]
    calls = tool_calls((r["name"], {"x": MARK}, r["tool_call_id"]) for r in results)
    return [user("x"), {**assistant(""), "tool_calls": calls}]


def system_turn(system: str | None) -> list[MessageDict]:
    return [] if system is None else [{"role": "system", "content": system}]


class ChatTemplate:
    """A model's compiled chat template, which renders the parts of a conversation.

    A conversation that runs past midnight keeps the date on which its template was built.

    Attributes:
        style: how the model marks its thinking; None if the template does not support thinking.
        names_date: whether it may state the date on which the conversation began.

    Raises:
        TemplateError: from any method, if the template fails, violates the sandbox, takes too much
            time or memory, or cannot be used on a stream.
    """

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        special: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ):
        """Compile a template that may refer to `tokens` and `options` by name.

        The text of a `special` token is never split.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"chat template: it has more than {MAX_SOURCE} characters")
        self.source, self._options = source, dict(options or {})
        self.style, self.names_date = style_of(source), "strftime_now" in source
        self._tokens, self._special, self._now = dict(tokens or {}), special, datetime.now()
        compiled = attempt("cannot be read", lambda: TemplateEnvironment().from_string(source))
        self._template = compiled

    def at(self, moment: datetime) -> "ChatTemplate":
        """Return a copy of the template for a conversation that started at a different time."""
        other = copy(self)
        other._now = moment
        return other

    def with_options(
        self,
        think: bool | None = None,
        effort: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> "ChatTemplate":
        """Return a copy of the template with these settings for thinking, effort and tools.

        Args:
            tools: descriptions of functions, as JSON values.

        Raises:
            TemplateError: the template does not support one of the settings.
        """

        def told(options: Mapping[str, Any]) -> "ChatTemplate":
            options = {**self._options, **options}
            found = ChatTemplate(self.source, self._tokens, self._special, options)
            return found.at(self._now)

        options: dict[str, Any] = {}
        if think is not None:
            options |= dict.fromkeys(SWITCHES, think)
            other = dict.fromkeys(SWITCHES, not think)
            asked = {told(values).opening(None, "x") for values in (options, other)}
            if len(asked) == 1:
                raise TemplateError(
                    "this model's template has no switch for thinking: leave out `think`"
                )
        if effort is not None:
            options[EFFORT] = effort
            if EFFORT not in self.source:
                raise TemplateError(
                    "this model's template has no levels of thinking: leave out `reasoning_effort`"
                )
        if tools:
            # Llama 3.x writes tools into the first question or, with this option, before it.
            options |= {"tools": [*tools], "tools_in_user_message": False}
        return told(options)

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """The tools that are passed to the template."""
        return self._options.get("tools", ())

    def render(self, messages: Sequence[MessageDict], reply: bool) -> str:
        """Return the text of a conversation; `reply` adds the generation prompt."""
        values = {"messages": messages, "add_generation_prompt": reply, **self._tokens}
        # Templates check whether tools and documents are none; transformers always passes both.
        values |= {"tools": None, "documents": None, "strftime_now": self._now.strftime}
        values |= self._options
        size = len(str(messages)) + len(str(self.tools))
        return attempt("failed", lambda: self._template.render(values), size)

    def opening(self, system: str | None, question: Turn) -> str:
        """Return the text of the first turn, up to the point where the model answers."""
        return self.render([*system_turn(system), *messages_of(question)], reply=True)

    def turn(self, question: Turn, system: str | None = None) -> str:
        """Return the text that a later turn appends after `closing`, up to the model's answer.

        A placeholder conversation is rendered; `check` refuses templates that need the real one.
        Encode the text together with `closing`, because some tokenizers put a space before the
        first word of a text.
        """
        messages = messages_of(question)
        before = stand_in(messages)
        text = self.render([*system_turn(system), *before, *messages], reply=True)
        return self._behind_reply(text, before)

    def settled(
        self,
        question: Turn,
        answer: MessageDict,
        system: str | None = None,
        first: bool = False,
        later: bool = False,
    ) -> str:
        """Return an exchange as it is rendered once the next message follows.

        The next message is a question or, after an answer that calls tools, the first result. The
        text that closes the answer is included only if the answer calls tools. With `first`, this
        is the first exchange, and the text before it is included. With `later`, another exchange
        and a question follow this one.
        """
        messages, calls = messages_of(question), answer.get("tool_calls")
        before = [] if first else stand_in(messages)
        messages = [*system_turn(system), *before, *messages, answer]
        following = tool_results(calls, LATER) if calls else [user("x")]
        if later and calls:
            messages += [*following, assistant("x"), user("x")]
        elif later:
            messages += [user("x"), assistant(LATER), user("x")]
        else:
            messages += following
        text = self.render(messages, reply=True)
        if not first:
            text = self._behind_reply(text, before)
        if calls:
            text = text.partition(LATER)[0]
            next_turn = self.turn(following, system).partition(LATER)[0]
        else:
            next_turn = self.closing + self.turn("x", system)
            if later:
                text, next_turn = text.rpartition(LATER)[0], next_turn + self.lead
        require_appended(text.endswith(next_turn), "a reply")
        return text.removesuffix(next_turn)

    def answer(self, reply: str, thinking: str = "", calls: Sequence[Any] = ()) -> MessageDict:
        """Return a reply as a message, with its thinking and its `tool_calls`."""
        called = {"tool_calls": calls} if calls else {}
        if not thinking or not self.style:
            return {**assistant(reply), **called}
        if self.thinking_apart:
            thought = {"reasoning_content": thinking, "thinking": thinking}
            return {**assistant(reply), **thought, **called}
        return {**assistant(self.written(reply, thinking)), **called}

    def written(self, reply: str, thinking: str = "") -> str:
        """Return a reply with its thinking, as the model writes it."""
        if not thinking or not self.style:
            return reply
        return f"{self.style.openings[0]}{thinking}{self.style.closing}{reply}"

    @cached_property
    def thinking_apart(self) -> bool:
        """Whether a reply's thinking is passed to the template separately from the answer.

        This is the case if the template has a field for thinking, writes the thinking marks itself,
        or drops the thinking once another question follows.
        """
        if not self.style:
            return False
        field = {**assistant(MARK), "reasoning_content": THOUGHT, "thinking": THOUGHT}
        if THOUGHT in self.render([user("x"), field], reply=False):
            return True
        written = assistant(self.written("It is two.", f"\n{THOUGHT}\n"))
        text = self.render([user("x"), written, user("x")], reply=True)
        return THOUGHT not in text or text.count(self.style.closing) > 1

    @cached_property
    def thinks_first(self) -> bool:
        """Whether the generation prompt itself opens the model's thinking."""
        asked = self.opening(None, "x").rstrip()
        return bool(self.style) and asked.endswith(self.style.openings[0].rstrip())

    @property
    def closing(self) -> str:
        """The text that follows a reply's content, such as "<|im_end|>\\n".

        Some templates (such as Llama 3's first one) always append the generation prompt. In that
        case, this is the common prefix of that prompt and a later question.
        """
        return self._around_reply[1]

    @property
    def lead(self) -> str:
        """The whitespace between the generation prompt and a reply; the model writes it itself."""
        return self._around_reply[0]

    @cached_property
    def trims(self) -> bool:
        """Whether whitespace around a reply's content is dropped."""
        return PADDED not in self.render([user("x"), assistant(PADDED)], reply=False)

    @cached_property
    def rewrites(self) -> bool:
        """Whether an exchange is rendered differently once the next question follows it."""
        return any(
            self.settled(question, self.answer(reply, thinking))
            != self.turn(question) + self.lead + self.written(reply, thinking)
            for question, reply, thinking in EXCHANGES
        )

    @cached_property
    def settles_late(self) -> bool:
        """Whether an exchange is rendered differently once another exchange follows it."""
        question, reply, thinking = EXCHANGES[1]
        try:
            old = self.settled(question, self.answer(reply, thinking), later=True)
        except TemplateError:
            return False
        return old != self.settled(question, self.answer(reply, thinking))

    @cached_property
    def _around_reply(self) -> tuple[str, str]:
        exchange = [user("x"), assistant(MARK)]
        asked = self.render(exchange[:1], reply=True)
        alone = self.render(exchange, reply=False)
        before, found, after = self.render([*exchange, user("x")], reply=True).partition(MARK)
        once = found and MARK not in after and alone.count(MARK) == 1
        require(once, "it does not write a reply's content exactly once")
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        if lead.strip():  # these are thinking marks, which the model writes itself
            marks = self.style.texts.split() if self.style else ()
            known = any(mark in lead for mark in marks)
            require(
                known,
                f"it writes {lead[:80]!r} only before an existing reply, not before a new one",
            )
            lead = ""
        return lead, shared_start(alone.partition(MARK)[2], after, self._special)

    def _behind_reply(self, text: str, before: Sequence[MessageDict]) -> str:
        """Return the text after the placeholder messages and the closing of their reply."""
        after, closing = text.rpartition(MARK)[2], self.closing
        if "tool_calls" in before[-1]:
            closing = self.render(before, reply=False).rpartition(MARK)[2]
        require_appended(after.startswith(closing), "a question")
        return after.removeprefix(closing)

    def check(self, system: bool) -> None:
        """Check that each exchange is written once and then kept, after a system turn if `system`.

        An exchange may change when the next question is added, and once more when another exchange
        follows, but never after that. A refused template may still be used for conversations that
        are rendered as a whole.
        """
        metered(lambda: check_turns(self, SYSTEM if system else None))


def check_turns(template: ChatTemplate, system: str | None) -> None:
    """Raise TemplateError unless each exchange is written once and then kept; see `check`."""
    if system:
        require(system in template.opening(system, "x"), "it has no system role")
    if template.tools:
        check_tools(template, system)

    def settled(number: int, later: bool = False) -> str:
        question, reply, thinking = EXCHANGES[number]
        answer = template.answer(reply, thinking)
        found = template.settled(question, answer, system, number == 0, later)
        return found + template.closing

    messages, before, last = [*system_turn(system)], "", ""
    for number, (question, reply, thinking) in enumerate(EXCHANGES):
        messages.append(user(question))
        asked = template.render(messages, reply=True)
        turn = template.turn(question, system) if number else asked
        require_appended(asked == before + last + turn, "a later question")
        messages.append(template.answer(reply, thinking))
        before += settled(number - 1, template.settles_late) if number else ""
        last = settled(number)
        plain = turn + template.lead + template.written(reply, thinking) + template.closing
        require_appended(template.rewrites or last == plain, "a reply")


def check_tools(template: ChatTemplate, system: str | None) -> None:
    """Raise TemplateError unless tools are written once, before the first question."""
    names = [tool.get("function", tool).get("name") for tool in template.tools]
    if not all(isinstance(name, str) and name for name in names):
        raise TemplateError('tools: each needs a name, as in {"function": {"name": "search"}}')
    turn, opening = template.turn("x", system), template.opening(system, "x")
    if any(name in turn for name in names):
        raise TemplateError(
            "this model's template repeats the tools with each question, so they cannot be pinned: "
            "leave out tools, or use another model"
        )
    calls = tool_calls([(names[0], {"x": "y"}, "000000001")])
    try:
        if not all(name in opening for name in names):
            raise TemplateError("it does not write them")
        called = template.settled("x", {**assistant(""), "tool_calls": calls}, system)
        if names[0] not in called or LATER not in template.turn(tool_results(calls, LATER), system):
            raise TemplateError("it does not write calls and their results")
    except TemplateError as error:
        raise TemplateError(
            f"this model's template cannot be used with tools: {one_line(error, 200)}"
        ) from error


def attempt(failure: str, work: Callable[[], T], characters: int = 0) -> T:
    """Return the result of `work`; convert any error in the untrusted template to TemplateError."""
    try:
        return metered(work, characters)
    except Exception as error:
        raise TemplateError(f"chat template: it {failure}: {one_line(error, 200)}") from error


def require(holds: object, why: str) -> None:
    if not holds:
        raise TemplateError(f"chat template: {why}, so it cannot be used on a stream")


def require_appended(holds: bool, what: str) -> None:
    require(holds, f"it rewrites earlier turns ({what} is not simply appended)")


def shared_start(first: str, second: str, special: Sequence[str]) -> str:
    """Return the common prefix of two texts, without splitting a special token.

    "<|end|><|endoftext|>" and "<|end|><|user|>" share "<|end|>", not "<|end|><|".
    """
    names = sorted((name for name in special if name in first + second), key=len, reverse=True)
    unit = re.compile("|".join([*map(re.escape, names), "."]), re.DOTALL)
    pairs = zip(unit.findall(first), unit.findall(second), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
