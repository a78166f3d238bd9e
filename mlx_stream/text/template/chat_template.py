"""Chat templates on a stream: messages to text, not tokens. The templates are untrusted.

Each turn is read once, so it must be what the template appends:

    opening("Be brief.", "Hi")    <|im_start|>system ... user\nHi<|im_end|>\n<|im_start|>assistant\n
    (the model)                   Hello.
    closing                       <|im_end|>\n
    turn("And?", "Be brief.")     <|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n

A template may rewrite an exchange once the next question follows, for example to drop the
reply's thinking: `settled` returns the rewritten form. A template that changes an exchange after
that is refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from uuid import uuid4

from mlx_stream.errors import TemplateError, one_line
from mlx_stream.text.template.meter import T, metered
from mlx_stream.text.template.sandbox import TemplateEnvironment

# The longest templates of published models have about 30,000 characters.
MAX_SOURCE = 50_000

Message = Mapping[str, str]
# Stands for a reply where only what surrounds it is wanted. No other text holds it.
MARK = f"Reply{uuid4().int}"
PADDED = f"\n \n{MARK}\n \n"
SYSTEM = "Answer briefly."
# The second reply thinks aloud: templates that drop the thinking of earlier turns show it here.
EXCHANGES: Sequence[tuple[str, str]] = (
    ("What is the first?", "It is one."),
    ("And the second,\nplease?", "<think>\nOne more than one.\n</think>\n\nIt is two."),
    ("The third?", "It is three."),
    ("The last?", "So it is one, or three."),
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

    Raises:
        TemplateError: any method, if the template fails, does what the sandbox forbids, takes too
            much time or memory, or cannot be used on a stream.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str] | None = None, special: Sequence[str] = ()
    ):
        """Compile a template that may name `tokens`; no text of `special` tokens is ever cut."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"chat template: it has more than {MAX_SOURCE} characters")
        self.source = source
        self._tokens, self._special, self._now = dict(tokens or {}), special, datetime.now()
        compiled = attempt("cannot be read", lambda: TemplateEnvironment().from_string(source))
        self._template = compiled

    def at(self, moment: datetime) -> "ChatTemplate":
        """Return the same template, for a conversation that began at another time."""
        other = copy(self)
        other._now = moment
        return other

    def render(self, messages: Sequence[Message], reply: bool) -> str:
        """Return the text of a conversation; `reply` adds what asks the model for its turn."""
        values = {"messages": messages, "add_generation_prompt": reply, **self._tokens}
        # Templates test tools and documents for none; transformers always passes both.
        values |= {"tools": None, "documents": None, "strftime_now": self._now.strftime}
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
        self, question: str, reply: str, system: str | None = None, first: bool = False
    ) -> str:
        """Return an exchange as it is rendered once the next question follows, without `closing`.

        With `first`, it is the first one, and what comes before it is in the text.
        """
        before = [] if first else [user("x"), assistant(MARK)]
        messages = [*system_turn(system), *before, user(question), assistant(reply), user("x")]
        text = self.render(messages, reply=True)
        if not first:
            text = self._behind_reply(text)
        next_turn = self.closing + self.turn("x", system)
        require_appended(text.endswith(next_turn), "a reply")
        return text.removesuffix(next_turn)

    @property
    def closing(self) -> str:
        """What follows a reply's content, "<|im_end|>\\n" say.

        Some templates (Llama 3's first) always ask for the next reply at once: what that request
        and a later question have in common.
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
            self.settled(question, reply) != self.turn(question) + self.lead + reply
            for question, reply in EXCHANGES
        )

    @cached_property
    def _around_reply(self) -> tuple[str, str]:
        exchange = [user("x"), assistant(MARK)]
        asked = self.render(exchange[:1], reply=True)
        alone = self.render(exchange, reply=False)
        before, found, after = self.render([*exchange, user("x")], reply=True).partition(MARK)
        once = found and MARK not in after and alone.count(MARK) == 1
        require(once, "it does not write a reply's content once")
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        require(not lead.strip(), f"it writes {lead[:80]!r} only before a reply that is there")
        return lead, shared_start(alone.partition(MARK)[2], after, self._special)

    def _behind_reply(self, text: str) -> str:
        """Return what follows the reply that MARK stands for, and what closes it."""
        after = text.partition(MARK)[2]
        require_appended(after.startswith(self.closing), "a question")
        return after.removeprefix(self.closing)

    def check(self, system: bool) -> None:
        """Make sure that each exchange is written once and stays; `system`: behind a system turn.

        An exchange may change when the next question is there, and never after that. A template
        that is refused may still be used for conversations that are rendered whole.
        """
        metered(lambda: self._check(SYSTEM if system else None))

    def _check(self, system: str | None) -> None:
        if system:
            require(system in self.opening(system, "x"), "it has no system role")
        messages, before = [*system_turn(system)], ""
        for number, (question, reply) in enumerate(EXCHANGES):
            messages.append(user(question))
            asked = self.render(messages, reply=True)
            turn = self.turn(question, system) if number else asked
            require_appended(asked == before + turn, "a later question")
            messages.append(assistant(reply))
            settled = self.settled(question, reply, system, first=number == 0)
            require_appended(self.rewrites or settled == turn + self.lead + reply, "a reply")
            before += settled + self.closing


def attempt(failure: str, work: Callable[[], T], characters: int = 0) -> T:
    """Return what `work` returns; whatever a stranger's program raises is a TemplateError."""
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
    """Return what two texts begin with alike, without a part of a special token.

    "<|end|><|endoftext|>" and "<|end|><|user|>" share "<|end|>", not "<|end|><|".
    """
    names = sorted((name for name in special if name in first + second), key=len, reverse=True)
    unit = re.compile("|".join([*map(re.escape, names), "."]), re.DOTALL)
    pairs = zip(unit.findall(first), unit.findall(second), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
