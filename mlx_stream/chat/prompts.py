"""Encodes the pinned beginning and the turns of a conversation; independent of streams.

    pinned       <|im_start|>system\\nBe brief.<|im_end|>\\n                 never evicted
    opening      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    following    <|im_end|>\\n  and  <|im_start|>user\\nAnd?<|im_end|>\\n<|im_start|>assistant\\n

The name of a control token in a user's text is encoded as plain characters, so that it cannot open
a turn.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.reply_format import ReplyFormat
from mlx_stream.chat.settle import common_prefix
from mlx_stream.errors import TemplateError, one_line
from mlx_stream.program.notices import Notify
from mlx_stream.text.control_tokens import MARK, ControlTokens
from mlx_stream.text.template.chat_template import (
    ChatTemplate,
    Message,
    assistant,
    system_turn,
    user,
)
from mlx_stream.text.tokenizer import Tokenizer

# The model's reply in the opening exchange that replaces a system prompt.
UNDERSTOOD = "Understood."
PROBES = ("What is the first?", "Tell me,\nhow many?")


@dataclass(frozen=True)
class OpenTurn:
    """The texts around a user's turn that stays open while text is added to it.

    Attributes:
        opening: before the first turn's text: <|im_start|>system ... <|im_start|>user\\n
        closing: after it, up to where the model answers: <|im_end|>\\n<|im_start|>assistant\\n
        reopening: from a reply to the next turn's text: <|im_end|>\\n<|im_start|>user\\n
        lead: spaces before the text; they are encoded with its first word.
    """

    opening: str
    closing: str
    reopening: str
    lead: str = ""


class PromptBuilder:
    """Encode the parts of a conversation with one template and one system prompt.

    Attributes:
        pinned: ids that are always attended: the system prompt, or whatever the template writes
            before any question. Empty without `pin`, or if no turn ends there.
        head: the messages that render to the pinned ids.
        replies: what a reply may hold, and how it is read.

    Raises:
        TemplateError: the template rewrites earlier turns.
        TextError: the system prompt is not valid Unicode.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, system: str | None, pin: bool):
        self.tokenizer, self.template, self.system = tokenizer, template, system
        self._control = ControlTokens(tokenizer, template)
        self.replies = ReplyFormat(tokenizer, template, self._control)
        self.head: list[Message] = system_turn(system)
        self._before: str | None = None
        template.check(False)
        if system is None or self._has_system_role():
            self.pinned = self._border() if pin else ()
            if self.pinned or system is None or not pin:
                return
        # No system role, or one inside the first question: make the prompt an opening exchange.
        self.head = [user(system), assistant(UNDERSTOOD)]
        text = self.escape_special_tokens(system)
        self._before = template.settled(text, UNDERSTOOD, first=True) + template.closing
        self.pinned = self._border()

    def question(
        self, question: str, rest: str | None, first: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that close the previous turn, and the ids of a question.

        Args:
            rest: text of the previous reply that was not read as ids; None if there is no reply.
            first: whether it is the conversation's first question.

        Raises:
            TemplateError: the template failed, or writes other pinned ids for this question.
        """
        question = self.escape_special_tokens(question)
        if first:
            return (), self._ids(self._opening_text(question), first=True)
        turn = self.template.turn(question, self._turn_system)
        before = self._control.escape(rest or "", reply=True) + self.template.closing
        closing, ids = self._ids_behind(before, turn)
        return () if rest is None else closing, ids

    def settle(self, exchange: Exchange, first: bool, later: bool = False) -> Exchange:
        """Return an exchange with the ids that the template renders before the next question.

        With `later`, there is another exchange before that question. The reply keeps its sampled
        ids if they decode to the template's text of it; otherwise that text is encoded.

        Raises:
            TemplateError: the template refuses the reply.
        """
        later = later and self.template.settles_late
        if not (self.template.rewrites or later):
            return replace(exchange, settled_ids=None)
        reply, thinking = self.replies.escaped(exchange)
        text, probed = (
            self._settled_text(exchange.question, said, thinking, first, later)
            for said in (reply, PROBES[0])
        )
        head, sampled = probed.removesuffix(PROBES[0]), None
        if text.startswith(head) and not exchange.rest:
            sampled = self.replies.last_ids(exchange, text[len(head) :].replace(MARK, ""))
        ids = self._ids(text, first) if sampled is None else (*self._ids(head, first), *sampled)
        as_read = ids == exchange.question_ids + exchange.reply_ids and not exchange.rest
        return replace(exchange, settled_ids=None if as_read else ids)

    def encode_again(
        self,
        exchanges: Mapping[int, Exchange],
        rest: str | None = None,
        notify: Notify | None = None,
    ) -> dict[int, Exchange]:
        """Return exchanges with this model's ids, by number; another model's replies are encoded.

        Args:
            rest: text of the previous reply that was not read as ids; None if there is no reply.
            notify: called for an exchange that the template refuses; only later ones are returned.
                Without it the refusal is raised.
        """
        found: dict[int, Exchange] = {}
        for number, exchange in exchanges.items():
            try:
                found[number] = self._encode_exchange(exchange, rest, number == 1)
            except TemplateError as error:
                if not notify:
                    raise
                notify(f"turns up to {number} are left out: {one_line(error)}")
                found, rest = {}, None
            else:
                rest = self.rest_of(found[number])
        for number in [*found][:-1] if self.template.settles_late else ():
            found[number] = self.settle(found[number], number == 1, later=True)
        return found

    def _encode_exchange(self, exchange: Exchange, rest: str | None, first: bool) -> Exchange:
        closing, question = self.question(exchange.question, rest, first)
        if not self.replies.is_written_by(exchange):
            rest = self.template.written(exchange.reply, exchange.thinking)
            exchange = replace(exchange, reply_ids=(), rest=rest)
        exchange = replace(exchange, closing_ids=closing, question_ids=question)
        return self.settle(exchange, first)

    def open_turn(self) -> OpenTurn:
        """Return the template's texts around a user's text.

        Raises:
            TemplateError: the template changes the text, or what it writes around it depends on it.
        """
        if self.template.rewrites:
            raise TemplateError(
                "chat template: it rewrites earlier turns, so no turn can be kept open"
            )
        opening, closing = around(self._opening_text)
        again, closing_again = around(lambda probe: self.template.turn(probe, self._turn_system))
        before, after = opening.rstrip(" "), again.rstrip(" ")
        lead = opening[len(before) :]
        if closing != closing_again or lead != again[len(after) :]:
            raise TemplateError(
                "chat template: it renders the first question differently from later ones, so no "
                "turn can be kept open"
            )
        return OpenTurn(before, closing, self.template.closing + after, lead)

    def rest_of(self, exchange: Exchange) -> str:
        """Return the text at the end of a reply that is read together with its closing."""
        if exchange.settled_ids is not None:
            return ""
        return exchange.rest if exchange.reply_ids or exchange.rest else self.template.lead

    def _has_system_role(self) -> bool:
        try:
            self.template.check(True)
        except TemplateError:
            return False
        return True

    @property
    def system_is_a_turn(self) -> bool:
        """Whether the template has a place for the system prompt before the first question."""
        return self._before is None

    @property
    def _turn_system(self) -> str | None:
        """The system prompt, if it is a separate turn."""
        if self._before is not None or self.system is None:
            return None
        return self.escape_special_tokens(self.system)

    def _opening_text(self, question: str) -> str:
        if self._before is not None:
            return self._before + self.template.turn(question)
        return self.template.opening(self._turn_system, question)

    def _settled_text(
        self, question: str, reply: str, thinking: str, first: bool, later: bool
    ) -> str:
        question = self.escape_special_tokens(question)
        opens, system = first and self._before is None, self._turn_system
        whole = self.template.settled(question, reply, system, opens, thinking, later)
        return (self._before or "") + whole if first else whole

    def _ids(self, text: str, first: bool) -> tuple[int, ...]:
        """Return the ids of a turn's text; the first turn's text includes everything before it."""
        if not first:
            return self._ids_behind(self.template.closing, text)[1]
        ids, count = self.encode(text), len(self.pinned)
        if tuple(ids[:count]) != self.pinned:
            raise TemplateError("chat template: its text before a question depends on the question")
        return tuple(ids[count:])

    def _ids_behind(self, before: str, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of two consecutive texts that follow other text.

        They are encoded as one text, because some tokenizers add a space before the first word of
        a text, where the conversation has none.
        """
        ids = tuple(self.encode(before + text, behind_text=True))
        count = common_prefix(self.encode(before, behind_text=True), ids)
        return ids[:count], ids[count:]

    def _border(self) -> tuple[int, ...]:
        """Return the ids before the first question, if a turn ends there."""
        first, second = (self._opening_text(probe) for probe in PROBES)
        turn = self.template.turn(PROBES[0], self._turn_system)
        if not first.endswith(turn):
            return ()
        before = self.encode(first[: len(first) - len(turn)])
        whole = (before == self.encode(text)[: len(before)] for text in (first, second))
        return tuple(before) if all(whole) else ()

    def escape_special_tokens(self, text: str) -> str:
        """Return a text in which marks split whatever would be read as a control token."""
        return self._control.escape(text)

    def encode(self, text: str, behind_text: bool = False) -> list[int]:
        """Return the ids of a rendered text, in which marks split the names that are plain text.

        Args:
            behind_text: whether it follows other text.
        """
        ids: list[int] = []
        for piece in text.split(MARK):
            ids += self.tokenizer.encode(piece, special=False, behind_text=behind_text)
            behind_text = True
        return ids


def around(render: Callable[[str], str]) -> tuple[str, str]:
    """Return the texts that a template renders before and after any question."""
    probes = (*PROBES, "?")
    before, _, after = render(probes[0]).partition(probes[0])
    if not all(render(probe) == before + probe + after for probe in probes):
        raise TemplateError(
            "chat template: its text around a question depends on the question, so no turn can be "
            "kept open"
        )
    return before, after
