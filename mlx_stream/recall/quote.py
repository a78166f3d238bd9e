"""Quotes earlier exchanges inside a question, within a token limit; independent of models.

    Quoted from earlier in this conversation:
    [2026-05-09 17:03] "My dog is called Rufus." was answered: "What a lovely name!"
    End of quotation.

    What is my dog called?

A quotation is untrusted text: quotes and newlines in it are escaped, so that it stays on one
line.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol, runtime_checkable

BEGIN, END = "Quoted from earlier in this conversation:", "End of quotation."
SENTENCE = re.compile(r"(?<=[.!?\n])\s+|(?<=[\u3002\uff01\uff1f])")
CUT = "..."
# A longer text is cut to the part around a word before its tokens are counted.
CHARACTERS_PER_TOKEN = 16
# An exchange cut to fewer characters is not worth quoting.
SHORTEST = 24


@dataclass(frozen=True)
class Passage:
    """An earlier exchange that may answer a question.

    Attributes:
        number: the number of the turn.
        time: when it was written, in ISO 8601.
        words: the words of the question that it, or an adjacent exchange, contains.
        share: the share of the question that these words make up, from 0 to 1.
    """

    number: int
    time: str
    question: str
    reply: str
    words: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def date(self) -> str:
        """The local date and time, to the minute."""
        return datetime.fromisoformat(self.time).astimezone().strftime("%Y-%m-%d %H:%M")

    @property
    def line(self) -> str:
        question, reply = (
            json.dumps(text, ensure_ascii=False) for text in (self.question, self.reply)
        )
        return f"[{self.date}] {question} was answered: {reply}"


@runtime_checkable
class RecallStore(Protocol):
    """Finds earlier exchanges of a conversation that have left its window."""

    def leave(self, number: int, question: str, reply: str) -> None:
        """Add an exchange that has just left the window.

        It may be added again with a different reply.
        """
        ...

    def find(self, question: str, previous: str, first: int, end: int) -> Sequence[Passage]:
        """Return exchanges that are likely to answer a question, likeliest first; often none.

        Args:
            previous: the previous question, or "".
            first, end: the range of turn numbers to search, excluding `end`.
        """
        ...


Count = Callable[[str], int]


def choose_passages(passages: Sequence[Passage], most: int, count: Count) -> list[Passage]:
    """Return the likeliest passages that fit, in chronological order.

    A passage that is too long is cut to the sentences around its words.

    Args:
        most: the maximum number of tokens in the whole quotation.
        count: counts the tokens in a text.
    """
    chosen: list[Passage] = []

    def fits(passage: Passage) -> bool:
        return count(quote([*chosen, passage], "")) <= most

    for passage in passages:
        if cut := cut_passage(passage, most, fits):
            chosen.append(cut)
    return sorted(chosen, key=lambda passage: passage.number)


def quote(passages: Sequence[Passage], question: str) -> str:
    """Return a question with a quotation before it."""
    return "\n".join([BEGIN, *(passage.line for passage in passages), END, "", question])


def cut_passage(passage: Passage, most: int, fits: Callable[[Passage], bool]) -> Passage | None:
    """Return a passage, cut as much as necessary to fit; None if too little would be left."""
    longest, words = most * CHARACTERS_PER_TOKEN, passage.words
    question, reply = (cut_around(t, words, longest) for t in (passage.question, passage.reply))
    sizes = [len(question), len(reply)]
    shortest = min(SHORTEST, max(sizes))
    while max(sizes) >= shortest:
        asked, answered = cut_around(question, words, sizes[0]), cut_around(reply, words, sizes[1])
        cut = replace(passage, question=asked, reply=answered)
        if fits(cut):
            return cut
        longer = sizes.index(max(sizes))
        sizes[longer] = sizes[longer] * 2 // 3
    return None


def cut_around(text: str, words: Sequence[str], most: int) -> str:
    """Return a text, or at most `most` characters of it around the first of `words` found.

    The excerpt begins and ends at sentence boundaries if it contains any.
    """
    if len(text) <= most:
        return text
    small = text.lower()
    # The index stems words; here only their first letters are compared.
    places = (small.find(word[: max(3, min(5, len(word) - 2))]) for word in words)
    at = next((place for place in places if place >= 0), 0)
    start = max(0, min(at - most // 3, len(text) - most))
    borders = [start + border.end() for border in SENTENCE.finditer(text[start : start + most])]
    begin = max((border for border in borders if border <= at), default=start)
    end = max((border for border in borders if border > at), default=start + most)
    before, behind = CUT * (begin > 0), CUT * (end < len(text))
    return before + text[begin:end].strip() + behind
