"""What a conversation reads: the ids of its pinned beginning and of each turn; knows no stream.

    pinned       <|im_start|>system\\nBe brief.<|im_end|>\\n                 never leaves attention
    opening      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    following    <|im_end|>\\n  and  <|im_start|>user\\nAnd?<|im_end|>\\n<|im_start|>assistant\\n

What people type is text: a special token's name in it is encoded as the characters it is, so that
nobody opens a turn by typing one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_stream.chat.exchange import Exchange
from mlx_stream.errors import TemplateError
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
        self._before = (
            template.opening(None, self.escape_special_tokens(system))
            + template.lead
            + UNDERSTOOD
            + template.closing
        )
        self.pinned = self._border()

    def opening(self, question: str) -> list[int]:
        """Return the ids of the first question's turn, which come after the pinned ones.

        Raises:
            TemplateError: the template failed, or would write other pinned ids for this question.
        """
        ids = self.encode(self._opening_text(self.escape_special_tokens(question)))
        count = len(self.pinned)
        if tuple(ids[:count]) != self.pinned:
            raise TemplateError("chat template: what it says before a question depends on it")
        return ids[count:]

    def following(self, rest: str, question: str) -> tuple[list[int], list[int]]:
        """Return the ids that close the reply before, and those of a later question's turn.

        Both are encoded as one text, behind the reply: some tokenizers put a space before the
        first word of whatever they are given, and would put it where the conversation has none.

        Args:
            rest: text of the reply before that was not read as ids.
        """
        before = rest + self.template.closing
        system = None if self._before is not None else self._escaped_system
        turn = self.template.turn(self.escape_special_tokens(question), system)
        ids = self.encode(before + turn, behind_text=True)
        count = common_prefix(self.encode(before, behind_text=True), ids)
        return ids[:count], ids[count:]

    def open_turn(self) -> OpenTurn:
        """Return what surrounds a user's text, in the template's words.

        Raises:
            TemplateError: it does not write the text as it is, or something else around another.
        """
        opening, closing = around(self._opening_text)
        system = None if self._before is not None else self._escaped_system
        again, closing_again = around(lambda probe: self.template.turn(probe, system))
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
        return exchange.rest if exchange.reply_ids or exchange.rest else self.template.lead

    def _has_system_role(self) -> bool:
        try:
            self.template.check(True)
        except TemplateError:
            return False
        return True

    @property
    def _escaped_system(self) -> str | None:
        return None if self.system is None else self.escape_special_tokens(self.system)

    def _opening_text(self, question: str) -> str:
        if self._before is not None:
            return self._before + self.template.turn(question)
        return self.template.opening(self._escaped_system, question)

    def _border(self) -> tuple[int, ...]:
        """Return the ids that come before any first question, if a turn ends there."""
        first, second = (self._opening_text(probe) for probe in PROBES)
        system = None if self._before is not None else self._escaped_system
        turn = self.template.turn(PROBES[0], system)
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


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
