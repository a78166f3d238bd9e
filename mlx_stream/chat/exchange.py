"""One question and its reply, as text and as ids, and where it stands in a stream; plain values.

    closing_ids    what closed the reply before it: <|im_end|>\\n
    question_ids   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    reply_ids      Hello.

Text does not always encode back to the ids that were sampled, so both are kept.
"""

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
    """

    question: str
    reply: str
    closing_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    rest: str = ""
    finish: str = "end"


@dataclass(frozen=True)
class Pending:
    """What the stream has not read of an exchange that is over: ids, then text of its reply."""

    ids: tuple[int, ...] = ()
    rest: str = ""


@dataclass(frozen=True)
class PlacedTurn:
    """An exchange whose tokens are attended.

    Attributes:
        before: what was unread of the exchange before it.
        base: the stream's length before it was read.
        lead: ids read ahead of its own: what was unread, and what closed the exchange before.
    """

    exchange: Exchange
    before: Pending
    base: int
    lead: tuple[int, ...]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids that are read before the model replies."""
        return self.lead + self.exchange.question_ids

    @property
    def start(self) -> int:
        """The stream's length before the exchange's own ids."""
        return self.base + len(self.lead)


@dataclass(frozen=True)
class ConversationState:
    """Where a conversation stands, beside its exchanges and the state of its stream.

    Attributes:
        places: of the exchanges that are held, oldest first: `before`, `base` and `lead`.
        unread: of the last one.
        sampler: the state of the random numbers, hexadecimal.
    """

    places: tuple[tuple[Pending, int, tuple[int, ...]], ...]
    pending: Pending
    sampler: str
