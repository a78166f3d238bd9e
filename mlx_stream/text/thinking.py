"""Separates a model's thinking from its answer as the reply is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True)
class ThinkingStyle:
    """How a model family marks its thinking in a reply.

    Attributes:
        openings: strings that begin thinking; the first is the usual one.
        closing: the string that ends it.
        answers: strings that may precede the answer.
        cut: the string that is read to end thinking that is too long; it includes `closing`.
        sign: a string that every template of such a model contains.
        ends: special tokens among these strings that end a reply once the answer has begun: the
            template would treat the text after them as thinking.
    """

    openings: tuple[str, ...]
    closing: str
    answers: tuple[str, ...]
    cut: str
    sign: str
    ends: tuple[str, ...] = ()

    @property
    def texts(self) -> str:
        """All of the style's strings; the special tokens in them do not end a reply."""
        return " ".join((*self.openings, self.closing, *self.answers, self.cut))


# OpenAI's Harmony: every part of a reply names its channel, and the first part lacks this prefix.
PART = "<|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>"
ANSWERS = ("<|channel|>final<|message|>", "<|channel|>commentary<|message|>")
STYLES = (
    ThinkingStyle(
        (ANALYSIS, PART + ANALYSIS),
        "<|end|>",
        (*ANSWERS, *(PART + answer for answer in ANSWERS)),
        f"<|end|>{PART}{ANSWERS[0]}",
        "<|channel|>analysis",
        ("<|start|>", "<|end|>"),
    ),
    ThinkingStyle(
        ("<|channel>thought\n",), "<channel|>", (), "\n<channel|>", "<channel|>", ("<|channel>",)
    ),
    ThinkingStyle(("[THINK]",), "[/THINK]", (), "[/THINK]", "[/THINK]", ("[THINK]",)),
    ThinkingStyle(("<think>",), "</think>", (), "\n</think>\n\n", "</think>", ("<think>",)),
)


def style_of(source: str) -> ThinkingStyle | None:
    """Return the style of thinking that a template's source uses, if any."""
    return next((style for style in STYLES if style.sign in source), None)


class Phase(Enum):
    """The part of a reply that the next text belongs to."""

    UNKNOWN = auto()  # at the beginning, and after thinking has ended
    THINKING = auto()
    ANSWER = auto()


class ThinkingReader:
    """Split a reply into thinking and answer; text that may be a marker is held back.

    Args:
        style: None if the model does not think; then everything is the answer.
        inside: whether the reply begins inside thinking, because the request opened it.

    Attributes:
        phase: what the next text belongs to.
        thinking: all the thinking so far.
    """

    def __init__(self, style: ThinkingStyle | None, inside: bool = False):
        self.style = style
        self.phase = Phase.UNKNOWN if style else Phase.ANSWER
        if inside:
            self.phase = Phase.THINKING
        self.thinking = ""
        self._pending, self._ended = "", False

    def add(self, text: str) -> tuple[str, str]:
        """Return the thinking and the answer that are final now."""
        if self.phase is Phase.ANSWER or not self.style:
            return "", text
        self._pending += text
        thought = ""
        while True:
            if self.phase is Phase.UNKNOWN and not self._begin(self.style):
                return self._thought(thought), ""
            if self.phase is Phase.ANSWER:
                answer, self._pending = self._pending, ""
                return self._thought(thought), answer
            before, found, after = self._pending.partition(self.style.closing)
            if not found:
                held = overlap(before, self.style.closing)
                thought += before[: len(before) - held]
                self._pending = before[len(before) - held :]
                return self._thought(thought), ""
            thought, self._pending, self.phase = thought + before, after, Phase.UNKNOWN
            self._ended = True

    def flush(self) -> tuple[str, str]:
        """Return what was held back; no more text may follow."""
        held, self._pending = self._pending, ""
        if self.phase is Phase.THINKING:
            return self._thought(held), ""
        return "", "" if self.thinking and not held.strip() else held

    def _begin(self, style: ThinkingStyle) -> bool:
        """Determine what comes next; return whether that is known yet."""
        text = self._pending.lstrip()
        for marks, phase in ((style.openings, Phase.THINKING), (style.answers, Phase.ANSWER)):
            for mark in marks:
                if text.startswith(mark):
                    self._pending, self.phase = text[len(mark) :], phase
                    return True
        if any(mark.startswith(text) for mark in (*style.openings, *style.answers)):
            return False
        if self._ended:
            self._pending = text
        self.phase = Phase.ANSWER
        return True

    def _thought(self, text: str) -> str:
        if not self.thinking:
            text = text.lstrip()
        self.thinking += text
        return text


@dataclass(frozen=True)
class ThinkingRules:
    """What a model's reply may contain, in ids.

    Attributes:
        style: None if the model does not think.
        inside: whether a reply begins inside thinking.
        ends: ids that end a reply once the answer has begun.
        cut: ids appended to end the thinking once it reaches `limit` ids.
    """

    style: ThinkingStyle | None = None
    inside: bool = False
    ends: frozenset[int] = frozenset()
    cut: tuple[int, ...] = ()
    limit: int = 0

    def reader(self) -> ThinkingReader:
        return ThinkingReader(self.style, self.inside)


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `mark`."""
    most = min(len(text), len(mark) - 1)
    return next((n for n in range(most, 0, -1) if mark.startswith(text[-n:])), 0)


def split_thinking(
    style: ThinkingStyle | None, pieces: Sequence[str], inside: bool
) -> tuple[str, str]:
    """Return the thinking and the answer of a whole reply."""
    reader = ThinkingReader(style, inside)
    found = [reader.add(piece) for piece in pieces]
    found.append(reader.flush())
    return reader.thinking, "".join(answer for _, answer in found)
