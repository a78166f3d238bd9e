"""Chat templates on a stream: knows messages and text, not tokens; renders what strangers wrote.

Each turn is read once, so it must be what the template appends:

    opening("Be brief.", "Hi")    <|im_start|>system ... user\nHi<|im_end|>\n<|im_start|>assistant\n
    (the model)                   Hello.
    closing                       <|im_end|>\n
    turn("And?", "Be brief.")     <|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n

A template may write an exchange anew once the next question is there, and drop what its reply
thought: `settled` gives that. One that changes an exchange after that is refused.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from os.path import commonprefix
from typing import Any

from jinja2 import Template

from mlx_stream.errors import TemplateError, one_line
from mlx_stream.text.template.limits import joined
from mlx_stream.text.template.meter import metered
from mlx_stream.text.template.sandbox import compile_template

# The longest templates of published models have about 30,000 characters.
MAX_SOURCE = 100_000

# Stands for a reply's text where only what surrounds it is wanted.
MARK = "ReplyGoesHere"
PADDING = "\n \n"

Message = Mapping[str, str]

SYSTEM: Message = {"role": "system", "content": "Answer briefly."}
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


class ChatTemplate:
    """A model's chat template, compiled, and the parts of a conversation it makes.

    The date a template asks for is that of construction, so that a conversation that passes
    midnight still goes on as it began.
    """

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        special_texts: Sequence[str] = (),
    ):
        """Compile a template.

        Args:
            tokens: the special tokens it may name (`bos_token`, ...).
            special_texts: the texts of all special tokens, none of which is ever cut.

        Raises:
            TemplateError: it is too long, or it is not a Jinja template.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"chat template: {len(source)} characters, more than {MAX_SOURCE} are not accepted"
            )
        self._source, self._tokens = source, dict(tokens or {})
        self._special_texts = special_texts
        self._template = compile_source(source, datetime.now())

    def at(self, moment: datetime) -> "ChatTemplate":
        """Return the same template, for a conversation that began at another time."""
        other = ChatTemplate(self._source, self._tokens, self._special_texts)
        other._template = compile_source(self._source, moment)
        return other

    @classmethod
    def from_config(
        cls,
        tokenizer_config: Mapping[str, Any],
        tokens: Mapping[str, str],
        special_texts: Sequence[str] = (),
    ) -> "ChatTemplate | None":
        """Build the template that tokenizer_config.json holds, or return None if it holds none.

        Raises:
            TemplateError: as the constructor; or several templates and none is the default.
        """
        found = tokenizer_config.get("chat_template")
        if found is None:
            return None
        if isinstance(found, list):
            found = pick_default(found)
        if not isinstance(found, str):
            raise TemplateError(
                "chat template: tokenizer_config's chat_template must be text, or a list with one "
                f"named 'default', not {type(found).__name__}"
            )
        return cls(found, tokens, special_texts)

    def render(self, messages: Sequence[Message], reply: bool) -> str:
        """Return the text of a conversation; `reply` adds what asks the model for its turn.

        Raises:
            TemplateError: the template failed, did what the sandbox forbids, or wrote too much.
        """

        def text() -> str:
            # tools and documents are always passed, as transformers does: templates test for none.
            pieces = self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=reply,
                **self._tokens,
            )
            return joined("", pieces)

        try:
            return metered(text, sum(len(message["content"]) for message in messages))
        # What a stranger's program may raise is not ours to list; all of it means one thing.
        except Exception as error:
            raise TemplateError(f"chat template: it failed: {one_line(error, 200)}") from error

    def opening(self, system: str | None, question: str) -> str:
        """Return the text of a first turn, up to where the model answers.

        Raises:
            TemplateError: as `render`.
        """
        return self.render([*system_turn(system), user(question)], reply=True)

    def turn(self, question: str, system: str | None = None) -> str:
        """Return what a later turn appends after `closing`, up to where the model answers.

        It is found behind a stand-in for the conversation, so it costs the same however long that
        is; `check` makes sure that no template which needs the real one gets this far. Encode
        `closing` and this as one text: some tokenizers put a space before the first word of
        whatever they are given, and would put it here where the conversation has none.

        Raises:
            TemplateError: as `render`; or the template writes no closing before a question.
        """
        mark = stand_in(question, system)
        messages = [*system_turn(system), user("x"), assistant(mark), user(question)]
        return self._behind(mark, self.render(messages, reply=True), "a question")

    def settled(
        self, question: str, reply: str, system: str | None = None, first: bool = False
    ) -> str:
        """Return an exchange as it is written once the next question is there, without `closing`.

        That is where templates drop what a reply thought. With `first`, it is the conversation's
        first one, and all that comes before it is in the text.

        Raises:
            TemplateError: as `render`; or the template refuses the reply.
        """
        mark = stand_in(question, reply, system)
        before = [*system_turn(system)]
        if not first:
            before += [user("x"), assistant(mark)]
        text = self.render([*before, user(question), assistant(reply), user(mark)], reply=True)
        if not first:
            text = self._behind(mark, text, "a question")
        next_turn = self.closing + self.turn(mark, system)
        require(text.endswith(next_turn), "a reply")
        return text[: len(text) - len(next_turn)]

    @property
    def closing(self) -> str:
        """What follows a reply's content, "<|im_end|>\\n" say; may raise TemplateError.

        Some templates (Llama 3's first) ask for the next reply at once, whatever they are told:
        for those it is what a later question and that request have in common.
        """
        return self._around_reply[1]

    @property
    def lead(self) -> str:
        """Whitespace between the generation prompt and a reply, which the model writes itself.

        " " for Mistral. May raise TemplateError: the template puts there what is not whitespace.
        """
        return self._around_reply[0]

    @cached_property
    def trims(self) -> bool:
        """Whether whitespace around a reply's content is dropped; may raise TemplateError."""
        padded = PADDING + MARK + PADDING
        return padded not in self.render([user("x"), assistant(padded)], reply=False)

    @cached_property
    def rewrites(self) -> bool:
        """Whether an exchange is written otherwise once the next question is there."""
        return any(
            self.settled(question, reply) != self.turn(question) + self.lead + reply
            for question, reply in EXCHANGES
        )

    @cached_property
    def _around_reply(self) -> tuple[str, str]:
        asked = self.render([user("x")], reply=True)
        alone = self.render([user("x"), assistant(MARK)], reply=False)
        go_on = self.render([user("x"), assistant(MARK), user("x")], reply=True)
        before, found, after = go_on.partition(MARK)
        if not found or MARK in after or alone.count(MARK) != 1:
            raise TemplateError(
                "chat template: it does not write a reply's content once, so it cannot be used on "
                "a stream"
            )
        closing = shared_start(alone.partition(MARK)[2], after, self._special_texts)
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        if lead.strip():
            raise TemplateError(
                f"chat template: it writes {lead[:80]!r} before a reply that it does not write "
                "when it asks for one, so it cannot be used on a stream"
            )
        return lead, closing

    def _behind(self, mark: str, text: str, what: str) -> str:
        """Return what follows a stand-in for a reply, and what closes it."""
        return appended(self.closing, text.partition(mark)[2], what)

    def check(self, system: bool) -> None:
        """Make sure that each exchange is written once and stays; `system`: behind a system turn.

        An exchange may change when the next question is there, and never after that.

        Raises:
            TemplateError: it does not, or it has no system role. The template may still be used
                for conversations that are rendered whole, but not on a stream.
        """
        metered(lambda: self._check(system))

    def _check(self, system: bool) -> None:
        self._check_settles(None)
        if system:
            self._check_system_role()
            self._check_settles(SYSTEM["content"])

    def _check_system_role(self) -> None:
        try:
            opening = self.opening(SYSTEM["content"], EXCHANGES[0][0])
        except TemplateError as error:
            raise TemplateError(
                "chat template: it has no system role; leave the system prompt out "
                f"({str(error).removeprefix('chat template: ')})"
            ) from error
        if SYSTEM["content"] not in opening:
            raise TemplateError(
                "chat template: it has no system role (the text is dropped); leave the system "
                "prompt out"
            )

    def _check_settles(self, system: str | None) -> None:
        where = "with a system prompt, " if system is not None else ""
        messages, before = [*system_turn(system)], ""
        for number, (question, reply) in enumerate(EXCHANGES):
            messages.append(user(question))
            asked = self.render(messages, reply=True)
            turn = self.turn(question, system) if number else asked
            require(asked == before + turn, f"{where}a later question")
            messages.append(assistant(reply))
            settled = self.settled(question, reply, system, first=number == 0)
            holds = settled.endswith(visible(reply))
            if not self.rewrites:
                holds = settled == turn + self.lead + reply
            require(holds, f"{where}the text of a reply")
            before += settled + self.closing


def visible(reply: str) -> str:
    """Return what of a reply no template drops."""
    return reply.rpartition("</think>")[2].strip()


def stand_in(*texts: str | None) -> str:
    """Return a word that is in none of some texts."""
    mark = MARK
    while any(mark in text for text in texts if text):
        mark += "s"
    return mark


def appended(before: str, whole: str, what: str) -> str:
    require(whole.startswith(before), what)
    return whole[len(before) :]


def shared_start(first: str, second: str, special_texts: Sequence[str]) -> str:
    """Return what two texts begin with alike, cut inside no special token of either.

    "<|end|><|endoftext|>" and "<|end|><|user|>" share "<|end|>", not "<|end|><|".
    """
    end = len(commonprefix([first, second]))  # noqa: RUF071
    while cuts := [
        start
        for text in (first, second)
        for name in special_texts
        for start in range(max(0, end - len(name) + 1), end)
        if text.startswith(name, start)
    ]:
        end = min(cuts)
    return first[:end]


def require(holds: bool, what: str) -> None:
    if not holds:
        raise TemplateError(
            f"chat template: it rewrites earlier turns ({what} is not simply appended), so it "
            "cannot be used on a stream, where what was read is never read again"
        )


def system_turn(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def pick_default(templates: Sequence[Any]) -> Any:
    named = {
        entry["name"]: entry.get("template")
        for entry in templates
        if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
    }
    if "default" not in named:
        raise TemplateError(
            "chat template: there are several and none is named 'default' (there are: "
            f"{', '.join(sorted(named)) or 'none with a name'})"
        )
    return named["default"]


def compile_source(source: str, now: datetime) -> Template:
    try:
        return metered(lambda: compile_template(source, now))
    # As in `render`: deep nesting, for one, fails in ways that are not Jinja's.
    except Exception as error:
        raise TemplateError(f"chat template: it cannot be read: {one_line(error, 200)}") from error
