"""What a conversation reads: the ids of its pinned beginning and of each turn; knows no stream.

    pinned       <|im_start|>system\\nBe brief.<|im_end|>\\n                 never leaves attention
    opening      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    following    <|im_end|>\\n  and  <|im_start|>user\\nAnd?<|im_end|>\\n<|im_start|>assistant\\n

What people type is text: a special token's name in it is encoded as the characters it is, so that
nobody opens a turn by typing one.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.settle import common_prefix
from mlx_stream.errors import TemplateError, one_line
from mlx_stream.program.notices import Notify
from mlx_stream.text.template import ChatTemplate, Message, assistant, system_turn, user
from mlx_stream.text.tokenizer import Tokenizer

# The model's part of the opening exchange that stands for a system prompt.
UNDERSTOOD = "Understood."
# Marks where a text is cut before it is encoded: a code point that Unicode keeps out of texts.
MARK = "\ufdd0"
PROBES = ("What is the first?", "Tell me,\nhow many?")


@dataclass(frozen=True)
class OpenTurn:
    """What surrounds the text of a user's turn that stays open while text is added to it.

    Attributes:
        opening: before the first turn's text: <|im_start|>system ... <|im_start|>user\\n
        closing: after it, up to where the model answers: <|im_end|>\\n<|im_start|>assistant\\n
        reopening: after a reply, up to the next turn's text: <|im_end|>\\n<|im_start|>user\\n
        lead: spaces that come before the text; they are encoded with its first word.
    """

    opening: str
    closing: str
    reopening: str
    lead: str = ""


class PromptBuilder:
    """The ids of a conversation's parts, under one template and one system prompt.

    Attributes:
        pinned: ids that stay attended for ever: the system prompt's; what the template says
            before any question; nothing, where no turn ends there, or without `pin`.
        head: the messages the pinned ids stand for, to render the same with the template.

    Raises:
        TemplateError: the template rewrites earlier turns.
        TextError: the system prompt is not valid Unicode.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, system: str | None, pin: bool):
        self.tokenizer, self.template, self.system = tokenizer, template, system
        names = "|".join(re.escape(name) for name in tokenizer.special_texts)
        self._names = re.compile(f"(?={names})") if names else None
        self.head: list[Message] = system_turn(system)
        self._before: str | None = None
        template.check(False)
        if system is None or self._has_system_role():
            self.pinned = self._border() if pin else ()
            if self.pinned or system is None or not pin:
                return
        # No system role, or one inside the first question: then the prompt opens the conversation.
        self.head = [user(system), assistant(UNDERSTOOD)]
        text = self.escape_special_tokens(system)
        self._before = template.settled(text, UNDERSTOOD, first=True) + template.closing
        self.pinned = self._border()

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a reply, which is text.

        A special token is none: were one read, the model could open a turn of its own, which no
        template renders.
        """
        return self.tokenizer.eos_ids | self.tokenizer.special_ids

    def accepts(self, reply_ids: Sequence[int]) -> bool:
        """Return whether ids can be a reply's."""
        size = self.tokenizer.vocab_size
        return all(id < size and id not in self.end_ids for id in reply_ids)

    def question(
        self, question: str, rest: str | None, first: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that close the turn before a question, and those of the question.

        Args:
            rest: text of the reply before that was not read as ids; None: there is no turn before.
            first: whether it is the conversation's first question.

        Raises:
            TemplateError: the template failed, or would write other pinned ids for this question.
        """
        if first:
            return (), tuple(self.opening(question))
        closing, ids = self.following(rest or "", question)
        return () if rest is None else tuple(closing), tuple(ids)

    def settle(self, exchange: Exchange, first: bool) -> Exchange:
        """Return an exchange with the ids it has once the next question is there.

        Those of its reply are the ones that were sampled, where these are the template's text of
        it, else the ids of that text.

        Raises:
            TemplateError: the template refuses the reply.
        """
        if not self.template.rewrites:
            return exchange
        text = self._settled_text(exchange.question, exchange.reply, first)
        head = self._settled_text(exchange.question, PROBES[0], first).removesuffix(PROBES[0])
        sampled = None
        if text.startswith(head) and not exchange.rest:
            sampled = self._last_ids(exchange, text[len(head) :].replace(MARK, ""))
        ids = self._ids(text, first) if sampled is None else (*self._ids(head, first), *sampled)
        as_read = ids == exchange.question_ids + exchange.reply_ids and not exchange.rest
        return replace(exchange, settled_ids=None if as_read else ids)

    def encode_again(
        self,
        exchanges: Mapping[int, Exchange],
        rest: str | None = None,
        notify: Notify | None = None,
    ) -> dict[int, Exchange]:
        """Return exchanges in this model's ids, by number: what another model said is read as text.

        Args:
            rest: of the turn before them, that was not read as ids; None if there is none.
            notify: told of an exchange that this template refuses; only those after it are
                returned. Without it, a refusal is raised.
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
        return found

    def _encode_exchange(self, exchange: Exchange, rest: str | None, first: bool) -> Exchange:
        closing, question = self.question(exchange.question, rest, first)
        ids = exchange.reply_ids
        known = self.accepts(ids)
        if not known or self.tokenizer.decode(ids) + exchange.rest != exchange.reply:
            exchange = replace(exchange, reply_ids=(), rest=exchange.reply)
        exchange = replace(exchange, closing_ids=closing, question_ids=question)
        return self.settle(exchange, first)

    def opening(self, question: str) -> tuple[int, ...]:
        """Return the ids of the first question's turn, which come after the pinned ones.

        Raises:
            TemplateError: the template failed, or would write other pinned ids for this question.
        """
        return self._ids(self._opening_text(self.escape_special_tokens(question)), first=True)

    def following(self, rest: str, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that close the reply before, and those of a later question's turn.

        Both are encoded as one text, behind the reply: some tokenizers put a space before the
        first word of whatever they are given, and would put it where the conversation has none.

        Args:
            rest: text of the reply before that was not read as ids.
        """
        turn = self.template.turn(self.escape_special_tokens(question), self._turn_system)
        return self._ids_behind(rest + self.template.closing, turn)

    def open_turn(self) -> OpenTurn:
        """Return what surrounds a user's text, in the template's words.

        Raises:
            TemplateError: it does not write the text as it is, or something else around another.
        """
        if self.template.rewrites:
            raise TemplateError(
                "chat template: it writes earlier turns anew, so no turn can be kept open"
            )
        opening, closing = around(self._opening_text)
        again, closing_again = around(lambda probe: self.template.turn(probe, self._turn_system))
        before, after = opening.rstrip(" "), again.rstrip(" ")
        lead = opening[len(before) :]
        if closing != closing_again or lead != again[len(after) :]:
            raise TemplateError(
                "chat template: it does not write a first question as it writes later ones, so no "
                "turn can be kept open"
            )
        return OpenTurn(before, closing, self.template.closing + after, lead)

    def rest_of(self, exchange: Exchange) -> str:
        """Return the text of a reply that is read after its ids, with what closes it."""
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
    def _turn_system(self) -> str | None:
        """The system prompt as a turn of its own, if it is one."""
        if self._before is not None or self.system is None:
            return None
        return self.escape_special_tokens(self.system)

    def _opening_text(self, question: str) -> str:
        if self._before is not None:
            return self._before + self.template.turn(question)
        return self.template.opening(self._turn_system, question)

    def _settled_text(self, question: str, reply: str, first: bool) -> str:
        question, reply = map(self.escape_special_tokens, (question, reply))
        opens = first and self._before is None
        whole = self.template.settled(question, reply, self._turn_system, first=opens)
        return (self._before or "") + whole if first else whole

    def _ids(self, text: str, first: bool) -> tuple[int, ...]:
        """Return the ids of a turn's text; that of the first turn has all before it, too."""
        if not first:
            return self._ids_behind(self.template.closing, text)[1]
        ids, count = self.encode(text), len(self.pinned)
        if tuple(ids[:count]) != self.pinned:
            raise TemplateError("chat template: what it says before a question depends on it")
        return tuple(ids[count:])

    def _ids_behind(self, before: str, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of two texts that follow each other and others."""
        ids = tuple(self.encode(before + text, behind_text=True))
        count = common_prefix(self.encode(before, behind_text=True), ids)
        return ids[:count], ids[count:]

    def _last_ids(self, exchange: Exchange, text: str) -> tuple[int, ...] | None:
        """Return the ids of a text that a reply ends with; None if no id begins there."""
        decoder, begin = self.tokenizer.decoder(), len(exchange.reply) - len(text)
        at, ids = 0, exchange.reply_ids
        if not exchange.reply.endswith(text):
            return None
        for number, id in enumerate(ids):
            if at == begin:
                return ids[number:]
            at += len(decoder.add(id))
        return () if not text else None

    def _border(self) -> tuple[int, ...]:
        """Return the ids that come before any first question, if a turn ends there."""
        first, second = (self._opening_text(probe) for probe in PROBES)
        turn = self.template.turn(PROBES[0], self._turn_system)
        if not first.endswith(turn):
            return ()
        before = self.encode(first[: len(first) - len(turn)])
        whole = (before == self.encode(text)[: len(before)] for text in (first, second))
        return tuple(before) if all(whole) else ()

    def escape_special_tokens(self, text: str) -> str:
        """Return a text in which a mark cuts every special token's name apart."""
        text = text.replace(MARK, "")
        if self._names is None:
            return text
        cuts = [match.start() + 1 for match in self._names.finditer(text)]
        return MARK.join(text[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True))

    def encode(self, text: str, behind_text: bool = False) -> list[int]:
        """Return the ids of a text of the template's, in which what is guarded is plain text.

        Args:
            behind_text: whether it follows another text.
        """
        ids: list[int] = []
        for piece in text.split(MARK):
            ids += self.tokenizer.encode(piece, special=False, behind_text=behind_text)
            behind_text = True
        return ids


def around(render: Callable[[str], str]) -> tuple[str, str]:
    """Return what is before and after a question in its render, whatever it is."""
    probes = (*PROBES, "?")
    before, _, after = render(probes[0]).partition(probes[0])
    if not all(render(probe) == before + probe + after for probe in probes):
        raise TemplateError(
            "chat template: what it writes around a question depends on it, so no turn can be "
            "kept open"
        )
    return before, after
