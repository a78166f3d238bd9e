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
from collections.abc import Callable, Mapping, Sequence
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

Message = Mapping[str, str]
# The names by which templates are told whether to think, and for how long.
SWITCHES: Sequence[str] = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"
# Stands for a reply where only its surroundings are wanted. No other text contains it.
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


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system_turn(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


class ChatTemplate:
    """A model's chat template, compiled, and the parts of a conversation it makes.

    A conversation that passes midnight keeps the date on which its template was built.

    Attributes:
        style: how the model marks its thinking; None if the template knows of none.

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

    def thinking_as(self, think: bool | None, effort: str | None) -> "ChatTemplate":
        """Return the same template, told whether the model shall think, and how hard.

        Raises:
            TemplateError: it cannot be told.
        """

        def told(options: Mapping[str, Any]) -> "ChatTemplate":
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
        return told(options)

    def render(self, messages: Sequence[Message], reply: bool) -> str:
        """Return the text of a conversation; `reply` adds what asks the model for its turn."""
        values = {"messages": messages, "add_generation_prompt": reply, **self._tokens}
        # Templates test tools and documents for none; transformers always passes both.
        values |= {"tools": None, "documents": None, "strftime_now": self._now.strftime}
        values |= self._options
        return attempt("failed", lambda: self._template.render(values), len(str(messages)))

    def opening(self, system: str | None, question: str) -> str:
        """Return the text of a first turn, up to where the model answers."""
        return self.render([*system_turn(system), user(question)], reply=True)

    def turn(self, question: str, system: str | None = None) -> str:
        """Return what a later turn appends after `closing`, up to where the model answers.

        A stand-in for the conversation is rendered; `check` refuses templates that need the real
        one. Encode it with `closing`: some tokenizers put a space before the first word of a text.
        """
        messages = [*system_turn(system), user("x"), assistant(MARK), user(question)]
        return self._behind_reply(self.render(messages, reply=True))

    def settled(
        self,
        question: str,
        reply: str,
        system: str | None = None,
        first: bool = False,
        thinking: str = "",
        later: bool = False,
    ) -> str:
        """Return an exchange as it is rendered once the next question follows, without `closing`.

        With `first`, it is the first one, and what comes before it is in the text. With `later`,
        there is another exchange before that question.
        """
        before = [] if first else [user("x"), assistant(MARK)]
        answer = self.answer(reply, thinking)
        messages = [*system_turn(system), *before, user(question), answer, user("x")]
        if later:
            messages[-1:] = [user("x"), assistant(LATER), user("x")]
        text = self.render(messages, reply=True)
        if not first:
            text = self._behind_reply(text)
        next_turn = self.closing + self.turn("x", system)
        if later:
            text, next_turn = text.rpartition(LATER)[0], next_turn + self.lead
        require_appended(text.endswith(next_turn), "a reply")
        return text.removesuffix(next_turn)

    def answer(self, reply: str, thinking: str = "") -> Message:
        """Return the message of a reply with its thinking."""
        if not thinking or not self.style:
            return assistant(reply)
        if self.thinking_apart:
            return {**assistant(reply), "reasoning_content": thinking, "thinking": thinking}
        return assistant(self.written(reply, thinking))

    def written(self, reply: str, thinking: str = "") -> str:
        """Return a reply with its thinking, as the model writes it."""
        if not thinking or not self.style:
            return reply
        return f"{self.style.openings[0]}{thinking}{self.style.closing}{reply}"

    @cached_property
    def thinking_apart(self) -> bool:
        """Whether a reply's thinking is given to the template apart from the answer.

        It is if the template has a field for it, writes its marks itself, or drops it from the
        reply once there is another question.
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
            self.settled(question, reply, thinking=thinking)
            != self.turn(question) + self.lead + self.written(reply, thinking)
            for question, reply, thinking in EXCHANGES
        )

    @cached_property
    def settles_late(self) -> bool:
        """Whether an exchange is rendered differently once another one follows it."""
        question, reply, thinking = EXCHANGES[1]
        try:
            old = self.settled(question, reply, thinking=thinking, later=True)
        except TemplateError:
            return False
        return old != self.settled(question, reply, thinking=thinking)

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

    def _behind_reply(self, text: str) -> str:
        """Return what follows the reply that MARK stands for, and what closes it."""
        after = text.partition(MARK)[2]
        require_appended(after.startswith(self.closing), "a question")
        return after.removeprefix(self.closing)

    def check(self, system: bool) -> None:
        """Make sure that each exchange is written once and stays, after a system turn if `system`.

        An exchange may change when the next question is added, and once more when another exchange
        follows, but never after that. A template
        that is refused may still be used for conversations that are rendered whole.
        """
        metered(lambda: self._check(SYSTEM if system else None))

    def _check(self, system: str | None) -> None:
        if system:
            require(system in self.opening(system, "x"), "it has no system role")

        def settled(number: int, later: bool = False) -> str:
            question, reply, thinking = EXCHANGES[number]
            found = self.settled(question, reply, system, number == 0, thinking, later)
            return found + self.closing

        messages, before, last = [*system_turn(system)], "", ""
        for number, (question, reply, thinking) in enumerate(EXCHANGES):
            messages.append(user(question))
            asked = self.render(messages, reply=True)
            turn = self.turn(question, system) if number else asked
            require_appended(asked == before + last + turn, "a later question")
            messages.append(self.answer(reply, thinking))
            before += settled(number - 1, self.settles_late) if number else ""
            last = settled(number)
            plain = turn + self.lead + self.written(reply, thinking) + self.closing
            require_appended(self.rewrites or last == plain, "a reply")


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
