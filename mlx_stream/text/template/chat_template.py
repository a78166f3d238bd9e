"""Chat templates on a stream: messages to text, not tokens. The templates are untrusted.

Each turn is read once, so it must be what the template appends:

    opening("Be brief.", "Hi")    <|im_start|>system ... user\nHi<|im_end|>\n<|im_start|>assistant\n
    (the model)                   Hello.
    closing                       <|im_end|>\n
    turn("And?", "Be brief.")     <|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n

A template may rewrite an exchange once the next question follows, for example to drop the
reply's thinking: `settled` returns the rewritten form. A template that changes an exchange after
that is refused. Thinking is given to a template as a field of its own, if the template has one or
drops it, and to others as the model wrote it.
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
# The messages of a turn, or the text of the user's only one.
Turn = str | Sequence[MessageDict]
# The names by which templates are told whether to think, and for how long.
SWITCHES: Sequence[str] = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"
# Stands for a reply where only the text around it is wanted. No other text contains it.
MARK = f"Reply{uuid4().int}"
LATER = f"Later{uuid4().int}"
PADDED = f"\n \n{MARK}\n \n"
SYSTEM = "Answer briefly."
THOUGHT = "One more than one."
# The second reply is thought about: templates that drop the thinking of earlier turns show it here.
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
    """Return the `tool_calls` of a message, given the name, arguments and id of each."""
    return [
        {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}
        for name, arguments, id in calls
    ]


def tool_results(calls: Sequence[MessageDict], content: str) -> list[MessageDict]:
    """Return messages that give the same result for each of these tool calls."""
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
    """Return messages that may come before a turn; the last one is a reply with MARK in it.

    Before the results of tools, it calls these tools.
    """
    results = [message for message in turn if message["role"] == "tool"]
    if not results:
        return [user("x"), assistant(MARK)]
    calls = tool_calls((r["name"], {"x": MARK}, r["tool_call_id"]) for r in results)
    return [user("x"), {**assistant(""), "tool_calls": calls}]


def system_turn(system: str | None) -> list[MessageDict]:
    return [] if system is None else [{"role": "system", "content": system}]


class ChatTemplate:
    """A model's chat template, compiled, and the parts of a conversation it makes.

    A conversation that runs past midnight keeps the date on which its template was built.

    Attributes:
        style: how the model marks its thinking; None if the template has no thinking.

    Raises:
        TemplateError: any method, if the template fails, does what the sandbox forbids, takes too
            much time or memory, or cannot be used on a stream.
    """

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        special: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ):
        """Compile a template that may name `tokens` and `options`.

        No text of `special` tokens is ever cut.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"chat template: it has more than {MAX_SOURCE} characters")
        self.source, self._options = source, dict(options or {})
        self.style = style_of(source)
        self._tokens, self._special, self._now = dict(tokens or {}), special, datetime.now()
        compiled = attempt("cannot be read", lambda: TemplateEnvironment().from_string(source))
        self._template = compiled

    def at(self, moment: datetime) -> "ChatTemplate":
        """Return the same template, for a conversation that began at another time."""
        other = copy(self)
        other._now = moment
        return other

    def with_options(
        self,
        think: bool | None = None,
        effort: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> "ChatTemplate":
        """Return the same template, told whether and how long to think, and of some tools.

        Args:
            tools: descriptions of functions, as JSON values.

        Raises:
            TemplateError: it cannot be told.
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
            # Llama 3.x writes tools into the first question, or, if told so, before it.
            options |= {"tools": [*tools], "tools_in_user_message": False}
        return told(options)

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """The tools that the template is told of."""
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
        """Return the text of a first turn, up to where the model answers."""
        return self.render([*system_turn(system), *messages_of(question)], reply=True)

    def turn(self, question: Turn, system: str | None = None) -> str:
        """Return what a later turn appends after `closing`, up to where the model answers.

        A stand-in for the conversation is rendered; `check` refuses templates that need the real
        one. Encode it with `closing`: some tokenizers put a space before the first word of a text.
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

        That is a question, or, after an answer that calls tools, the first result. What closes the
        answer is not in the text, or, if it calls tools, is. With `first`, it is the first
        exchange, and what comes before it is in the text. With `later`, another exchange and a
        question follow.
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
        """Return the message of a reply with its thinking and its `tool_calls`."""
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
        """Whether a reply's thinking is given to the template apart from the answer.

        This is the case if the template has a field for it, writes its marks itself, or drops it
        from the reply once there is another question.
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
        """Whether what asks for a reply begins the model's thinking."""
        asked = self.opening(None, "x").rstrip()
        return bool(self.style) and asked.endswith(self.style.openings[0].rstrip())

    @property
    def closing(self) -> str:
        """What follows a reply's content, "<|im_end|>\\n" say.

        Some templates (Llama 3's first) always ask for the next reply at once. Then this is what
        that request and a later question have in common.
        """
        return self._around_reply[1]

    @property
    def lead(self) -> str:
        """Whitespace between the generation prompt and a reply, which the model writes itself."""
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
        """Whether an exchange is rendered differently once another one follows it."""
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
        if lead.strip():  # these are marks of thinking, which the model writes itself
            marks = self.style.texts.split() if self.style else ()
            known = any(mark in lead for mark in marks)
            require(
                known,
                f"it writes {lead[:80]!r} only before an existing reply, not before a new one",
            )
            lead = ""
        return lead, shared_start(alone.partition(MARK)[2], after, self._special)

    def _behind_reply(self, text: str, before: Sequence[MessageDict]) -> str:
        """Return what follows a stand-in for earlier messages, and what closes its reply."""
        after, closing = text.rpartition(MARK)[2], self.closing
        if "tool_calls" in before[-1]:
            closing = self.render(before, reply=False).rpartition(MARK)[2]
        require_appended(after.startswith(closing), "a question")
        return after.removeprefix(closing)

    def check(self, system: bool) -> None:
        """Make sure that each exchange is written once and stays, after a system turn if `system`.

        An exchange may change when the next question is added, and once more when another exchange
        follows, but never after that. A template
        that is refused may still be used for conversations that are rendered whole.
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
    """Return what `work` returns; turn what the untrusted program raises into a TemplateError."""
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
    """Return the beginning that two texts share, without a part of a special token.

    "<|end|><|endoftext|>" and "<|end|><|user|>" share "<|end|>", not "<|end|><|".
    """
    names = sorted((name for name in special if name in first + second), key=len, reverse=True)
    unit = re.compile("|".join([*map(re.escape, names), "."]), re.DOTALL)
    pairs = zip(unit.findall(first), unit.findall(second), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
