"""One question and its reply, as text and as ids, and where it stands in a stream; plain values.

    closing_ids    what closed the reply before it: <|im_end|>\\n
    question_ids   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    reply_ids      Hello.

Text does not always encode back to the ids that were sampled, so both are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FINISHES = ("end", "stop", "length", "interrupted")


def plural(exchanges: int) -> str:
    """Return how many exchanges there are, in words."""
    return f"{exchanges:,} {'exchange' if exchanges == 1 else 'exchanges'}"


@dataclass(frozen=True)
class Exchange:
    """One question and its reply.

    Attributes:
        question: as it was asked.
        reply: as it was shown.
        closing_ids: read before the question to close the exchange before this one; they leave
            attention together with that one.
        question_ids: of the question in the template's words, up to where the model answers.
        reply_ids: those that were read of the reply.
        rest: the end of the reply that `reply_ids` do not cover: a stop string may begin inside
            an id.
        finish: how the reply ended: `end`, `stop`, `length` or `interrupted`.
        settled_ids: its ids as the template writes them once the next question is there, where
            those are others than were read.
    """

    question: str
    reply: str
    closing_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    rest: str = ""
    finish: str = "end"
    settled_ids: tuple[int, ...] | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids the stream holds of it at rest, what closes it not among them."""
        if self.settled_ids is not None:
            return self.settled_ids
        return self.question_ids + self.reply_ids


@dataclass(frozen=True)
class PlacedTurn:
    """An exchange that is attended, or being read.

    Attributes:
        number: which turn of the conversation it is, from 1.
        start: the place in the stream of its first own id. What closes the turn before it stands
            directly before that, as long as that turn is attended.
    """

    exchange: Exchange
    number: int
    start: int

    @property
    def end(self) -> int:
        """The place after its last id, once all of them are read."""
        return self.start + len(self.exchange.ids)


def ids_of(turns: Sequence[PlacedTurn]) -> tuple[int, ...]:
    """Return the ids of turns that follow each other, from the start of the first one on."""
    closings = ((), *(turn.exchange.closing_ids for turn in turns[1:]))
    pairs = zip(closings, turns, strict=False)
    return tuple(id for closing, turn in pairs for id in closing + turn.exchange.ids)


def unread_ids(pinned: Sequence[int], turns: Sequence[PlacedTurn], length: int) -> tuple[int, ...]:
    """Return the ids that a stream of a length has yet to read of turns, and before them."""
    if not turns:
        return ()
    start = turns[0].start
    return (*pinned[length:start], *ids_of(turns)[max(0, length - start) :])


@dataclass(frozen=True)
class ConversationState:
    """Where a conversation stands, beside its exchanges and the state of its stream.

    Attributes:
        turns: the number of the last turn.
        places: of the turns that are attended, oldest first: `number` and `start`.
        sampler: the state of the random numbers, hexadecimal.
    """

    turns: int
    places: tuple[tuple[int, int], ...]
    sampler: str

    @property
    def first(self) -> int:
        """The number of the oldest turn that is attended; one more than the last if none is."""
        return self.places[0][0] if self.places else self.turns + 1
