"""Encodes the pinned prefix and the turns of a conversation; independent of streams.

    pinned       <|im_start|>system\\nBe brief.<|im_end|>\\n                 never evicted
    opening      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    following    <|im_end|>\\n  and  <|im_start|>user\\nAnd?<|im_end|>\\n<|im_start|>assistant\\n

A control token's name in a user's text is encoded as plain characters, so it cannot open a turn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.messages import Question, as_messages
from mlx_stream.chat.reply_format import ReplyFormat
from mlx_stream.chat.settle import common_prefix
from mlx_stream.chat.template_messages import escaped_json
from mlx_stream.chat.turn_texts import PROBES, TurnTexts
from mlx_stream.errors import TemplateError, one_line
from mlx_stream.program.notices import Notify
from mlx_stream.text.control_tokens import MARK, ControlTokens
from mlx_stream.text.template.chat_template import (
    ChatTemplate,
    MessageDict,
    assistant,
    system_turn,
    user,
)
from mlx_stream.text.tokenizer import Tokenizer

# The model's reply in the opening exchange that replaces a system prompt.
UNDERSTOOD = "Understood."
# A template that starts a conversation with this many tokens of its own triggers a notice.
LONG_HEAD = 100


@dataclass(frozen=True)
class OpenTurn:
    """The template's text around a user turn that stays open while text is added to it.

    Attributes:
        opening: precedes the first turn's text: <|im_start|>system ... <|im_start|>user\\n
        closing: follows it, up to the model's answer: <|im_end|>\\n<|im_start|>assistant\\n
        reopening: links a reply to the next turn's text: <|im_end|>\\n<|im_start|>user\\n
        lead: spaces before the text, which are encoded together with its first word.
    """

    opening: str
    closing: str
    reopening: str
    lead: str = ""


class PromptBuilder:
    """Encodes the parts of a conversation with one template and one system prompt.

    Attributes:
        pinned: ids that are always attended to: the system prompt, or else the template's text
            before any question. Empty without `pin`, or if that text does not end at a turn
            boundary.
        head: the messages that render to the pinned ids.
        replies: what a reply may contain, and how to parse it.

    Raises:
        TemplateError: the template rewrites earlier turns.
        TextError: the system prompt is not valid Unicode.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        system: str | None,
        pin: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ):
        if tools:
            template = template.with_options(tools=tools)
        self._control = ControlTokens(tokenizer, template)
        if tools:
            template = template.with_options(tools=escaped_json(tools, self._control.escape))
        self.tokenizer, self.template, self.system = tokenizer, template, system
        self.replies = ReplyFormat(tokenizer, template, self._control)
        self.head: list[MessageDict] = system_turn(system)
        self.texts = texts = TurnTexts(template, self.escape_special_tokens, system)
        template.check(False)
        _ = self.replies.call_style  # raises an error if the call format is unknown
        if system is None or self._has_system_role():
            self.pinned = (self._border() or self._border_in_question()) if pin else ()
            if self.pinned or system is None or not pin:
                return
        # There is no system role, or every question repeats the prompt: use an opening exchange
        # instead.
        self.head = [user(system), assistant(UNDERSTOOD)]
        asked, texts.system = texts.system or "", None
        answer = assistant(UNDERSTOOD)
        texts.before = template.settled(asked, answer, first=True) + template.closing
        self.pinned = self._border()

    def question(
        self, question: Question, previous: Exchange | None, first: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that close the previous exchange, and the ids of a turn's messages.

        Args:
            previous: the exchange before this one; None if no earlier one is attended to.
            first: whether this is the conversation's first question.

        Raises:
            TemplateError: the template failed, or the pinned ids differ for this question.
        """
        text = self.texts.asked(as_messages(question), first)
        if first:
            return (), self._ids(text, first=True)
        before = self.template.closing if previous is None else self.end_of(previous)
        closing, ids = self._ids_behind(before + self.texts.header, text)
        return () if previous is None else closing, ids

    def settle(self, exchange: Exchange, first: bool, later: bool = False) -> Exchange:
        """Return an exchange with the ids of its text as rendered before the next message.

        The next message is a question, or the result of a tool that the reply calls. If `later`,
        another exchange comes before it. The reply keeps its sampled ids if they decode to the
        template's text for it; otherwise that text is encoded.

        Raises:
            TemplateError: the template refuses the reply.
        """
        calls = bool(exchange.calls)
        later = later and (self.template.settles_late or calls)
        tools = calls or exchange.answers_calls  # Some templates render results in two ways.
        # Thinking without ids must be encoded, unlike plain text.
        marks = exchange.thinking and not exchange.reply_ids
        if not (self.template.rewrites or later or tools or marks):
            return replace(exchange, settled_ids=None)
        message = self.replies.message(exchange)
        text = self.texts.settled(exchange, message, first, later)
        text = text.removesuffix(self._closing_in(text, exchange))
        heads = [self.texts.head_of_reply(exchange, message, first, later)]
        if calls:  # most templates also keep the thinking until the chain of calls ends
            heads.append(self.texts.asked(exchange.asked, first))
        ids = self._ids(text, first)
        for head in heads if not exchange.rest else ():
            if text.startswith(head):
                sampled = self.replies.last_ids(exchange, text[len(head) :].replace(MARK, ""))
                if sampled is not None:
                    ids = (*self._ids(head, first), *sampled)
        as_read = ids == exchange.question_ids + exchange.reply_ids and not exchange.rest
        return replace(exchange, settled_ids=None if as_read else ids)

    def encode_again(
        self,
        exchanges: Mapping[int, Exchange],
        previous: Exchange | None = None,
        notify: Notify | None = None,
    ) -> dict[int, Exchange]:
        """Return exchanges by number, with this model's ids; replies by another model are encoded.

        Args:
            previous: the exchange before them, if it is attended to.
            notify: called for each exchange that the template refuses; only later ones are
                returned. If this is None, the error is raised.
        """
        found: dict[int, Exchange] = {}
        # All chains of tool calls before this exchange have ended.
        last_answer = max((n for n, e in exchanges.items() if not e.calls), default=0)
        for number, exchange in exchanges.items():
            first, later = number == 1, number < (last_answer if exchange.calls else max(exchanges))
            try:
                found[number] = self._encode_exchange(exchange, previous, first, later)
            except TemplateError as error:
                if not notify:
                    raise
                notify(f"turns up to {number} are left out: {one_line(error)}")
                found, previous = {}, None
            else:
                previous = found[number]
        return found

    def _encode_exchange(
        self, exchange: Exchange, previous: Exchange | None, first: bool, later: bool
    ) -> Exchange:
        closing, question = self.question(exchange.asked, previous, first)
        if not self.replies.is_written_by(exchange):
            rest = self.template.written(exchange.reply, exchange.thinking)
            exchange = replace(exchange, reply_ids=(), rest=rest)
        exchange = replace(exchange, closing_ids=closing, question_ids=question)
        return self.settle(exchange, first, later)

    def beginning(self, text: str, thinking: str = "") -> list[int]:
        """Return the ids of the start of a reply, given its answer and thinking so far."""
        style, said = self.template.style, self._control.escape(text, reply=True)
        before = self.template.lead
        if style and (thinking or self.template.thinks_first):
            opening = "" if self.template.thinks_first else style.openings[0]
            thinking = self._control.escape(thinking, reply=True)
            before = f"{opening}{thinking}{style.cut}"
        elif style and style.answers:
            before = style.answers[0]
        return self.encode(before + said, behind_text=True)

    def open_turn(self) -> OpenTurn:
        """Return the text that the template writes around a user's text.

        Raises:
            TemplateError: the template changes the user's text, or its own text depends on it.
        """
        if self.template.rewrites:
            raise TemplateError(
                "chat template: it rewrites earlier turns, so no turn can be kept open"
            )
        opening, closing = around(self.texts.opening)
        again, closing_again = around(lambda probe: self.template.turn(probe, self.texts.system))
        before, after = opening.rstrip(" "), again.rstrip(" ")
        lead = opening[len(before) :]
        if closing != closing_again or lead != again[len(after) :]:
            raise TemplateError(
                "chat template: it renders the first question differently from later ones, so no "
                "turn can be kept open"
            )
        return OpenTurn(before, closing, self.template.closing + after, lead)

    def rest_of(self, exchange: Exchange) -> str:
        """Return the end of a reply's text, which is read together with the reply's closing."""
        if exchange.settled_ids is not None:
            return ""
        return exchange.rest if exchange.reply_ids or exchange.rest else self.template.lead

    def end_of(self, exchange: Exchange) -> str:
        """Return the text between the ids of an exchange and the next message."""
        closing = self.template.closing
        if exchange.calls:
            text = self.texts.settled(exchange, self.replies.message(exchange), first=False)
            closing = self._closing_in(text, exchange)
        return self._control.escape(self.rest_of(exchange), reply=True) + closing

    def _closing_in(self, text: str, exchange: Exchange) -> str:
        """Return the text that closes the calls in a rendered exchange, from the end token on."""
        names = (self.tokenizer.text_of(id) for id in self.replies.end_ids)
        ends = [at for name in names if name and (at := text.rfind(name)) >= 0]
        return text[max(ends) :] if exchange.calls and ends else ""

    def _has_system_role(self) -> bool:
        try:
            self.template.check(True)
        except TemplateError:
            return False
        return True

    @property
    def system_place(self) -> str:
        """Where the system prompt goes: its own "turn", the first "question" or an "exchange"."""
        if self.texts.before is not None:
            return "exchange"
        return "question" if self.texts.header else "turn"

    def _ids(self, text: str, first: bool) -> tuple[int, ...]:
        """Return the ids of a turn's text; the first turn's text includes everything before it."""
        if not first:
            return self._ids_behind(self.template.closing + self.texts.header, text)[1]
        ids, count = self.encode(text), len(self.pinned)
        if tuple(ids[:count]) != self.pinned:
            raise TemplateError("chat template: its text before a question depends on the question")
        return tuple(ids[count:])

    def _ids_behind(self, before: str, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of two consecutive texts that follow other text.

        They are encoded as one text, because some tokenizers add a space before the first word of a
        text, and the conversation has no space there.
        """
        ids = tuple(self.encode(before + text, behind_text=True))
        count = common_prefix(self.encode(before, behind_text=True), ids)
        return ids[:count], ids[count:]

    def _border(self) -> tuple[int, ...]:
        """Return the ids before the first question; empty if they do not end at a turn boundary."""
        first, second = (self.texts.opening(probe) for probe in PROBES)
        turn = self.template.turn(PROBES[0], self.texts.system)
        if not first.endswith(turn):
            return ()
        before = self.encode(first[: len(first) - len(turn)])
        whole = (before == self.encode(text)[: len(before)] for text in (first, second))
        return tuple(before) if all(whole) else ()

    def _border_in_question(self) -> tuple[int, ...]:
        """Return the ids before the first question's text, if its turn starts with a system prompt.

        In that case, the header of a later question, such as <start_of_turn>user\\n, is treated as
        part of the closing of the previous turn and is evicted with that turn. The oldest attended
        question is therefore always rendered as the first one.
        """
        system = self.texts.system
        if system is None:
            return ()
        try:
            opening, closing = around(self.texts.opening)
            header, again = around(lambda probe: self.template.turn(probe, system))
        except TemplateError:
            return ()
        before = self.encode(opening)
        texts = (opening + probe for probe in (*PROBES, "\nx"))
        stands = all(before == self.encode(text)[: len(before)] for text in texts)
        spaced, repeated = header != header.rstrip(" "), system in header
        if closing != again or spaced or repeated or not stands:
            return ()
        self.texts.header = header
        return tuple(before)

    def escape_special_tokens(self, text: str) -> str:
        """Return the text with marks that split anything that would be read as a control token."""
        return self._control.escape(text)

    def encode(self, text: str, behind_text: bool = False) -> list[int]:
        """Return the ids of a rendered text; marks split control-token names in plain text.

        Args:
            behind_text: whether the text follows other text.
        """
        ids: list[int] = []
        for piece in text.split(MARK):
            ids += self.tokenizer.encode(piece, special=False, behind_text=behind_text)
            behind_text = True
        return ids


def long_head_notice(count: int) -> str:
    return (
        f"this model's template begins every conversation with {count:,} tokens of its own, which "
        "are pinned: a system prompt may replace them"
    )


def around(render: Callable[[str], str]) -> tuple[str, str]:
    """Return the text that a template renders before and after any question."""
    probes = (*PROBES, "?")
    before, _, after = render(probes[0]).partition(probes[0])
    if not all(render(probe) == before + probe + after for probe in probes):
        raise TemplateError(
            "chat template: its text around a question depends on the question, so no turn can be "
            "kept open"
        )
    return before, after
