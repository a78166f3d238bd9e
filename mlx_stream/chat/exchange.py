"""A question and its reply, as text and ids, and their position in a stream; plain values.

    closing_ids    <|im_end|>\\n    which closes the previous reply
    question_ids   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    reply_ids      Hello.

Both text and ids are kept, because encoding the text does not always reproduce the sampled ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mlx_stream.chat.messages import Message, text_of_messages
from mlx_stream.text.tool_calls import ToolCall

FINISHES = ("end", "stop", "length", "interrupted")


def plural(exchanges: int) -> str:
    """Return "1 exchange" or "2 exchanges"."""
    return f"{exchanges:,} {'exchange' if exchanges == 1 else 'exchanges'}"


@dataclass(frozen=True)
class Exchange:
    """A question and its reply.

    Attributes:
        question: the text as it was asked; for several messages or tool results, their texts.
        reply: the answer as it was shown, without tool calls.
        closing_ids: read before the question to close the previous exchange. They are evicted
            together with that exchange.
        question_ids: the question as the template renders it, up to the point where the model
            answers.
        reply_ids: the ids of the reply.
        rest: the end of the reply that is not covered by `reply_ids`, for example because a stop
            string began inside a token.
        finish: how the reply ended: `end`, `stop`, `length` or `interrupted`.
        thinking: the text of the model's thinking, whose ids are among `reply_ids`.
        settled_ids: the exchange as the template renders it once another question follows. None if
            this does not change the ids.
        messages: what was asked, unless it was a single user message.
        calls: the reply's tool calls. The next turn contains their results.
    """

    question: str
    reply: str
    closing_ids: tuple[int, ...] = field(repr=False)
    question_ids: tuple[int, ...] = field(repr=False)
    reply_ids: tuple[int, ...] = field(repr=False)
    rest: str = field(default="", repr=False)
    finish: str = "end"
    settled_ids: tuple[int, ...] | None = field(default=None, repr=False)
    thinking: str = ""
    messages: tuple[Message, ...] = ()
    calls: tuple[ToolCall, ...] = ()

    @property
    def asked(self) -> tuple[Message, ...]:
        """The messages before the reply."""
        return self.messages or (Message("user", self.question),)

    @property
    def answers_calls(self) -> bool:
        """Whether it contains the results of the previous reply's tool calls."""
        return self.asked[0].role == "tool"

    @property
    def unread(self) -> "Exchange":
        """The same question without a reply and without ids."""
        return question_of(self.asked)

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids that the stream holds between turns, without the next `closing_ids`."""
        if self.settled_ids is not None:
            return self.settled_ids
        return self.question_ids + self.reply_ids


def question_of(messages: Sequence[Message]) -> Exchange:
    """Return an exchange with these messages, as yet without a reply or ids."""
    plain = messages == (Message("user", messages[0].text),)
    rest = () if plain else tuple(messages)
    return Exchange(text_of_messages(messages), "", (), (), (), "", "interrupted", messages=rest)


@dataclass(frozen=True)
class PlacedTurn:
    """An exchange and its position in a stream.

    Attributes:
        number: number of the turn in the conversation, counting from 1.
        start: position of its first question id. Its `closing_ids` come directly before that, as
            long as the previous turn is in the window.
    """

    exchange: Exchange
    number: int
    start: int

    @property
    def end(self) -> int:
        """The position after its last id, once all ids have been read."""
        return self.start + len(self.exchange.ids)


def place_turns(turns: Sequence[PlacedTurn], first: int) -> tuple[PlacedTurn, ...]:
    """Return consecutive turns with their positions, starting at `first`."""
    placed: list[PlacedTurn] = []
    for turn in turns:
        start = placed[-1].end + len(turn.exchange.closing_ids) if placed else first
        placed.append(replace(turn, start=start))
    return tuple(placed)


def ids_of(turns: Sequence[PlacedTurn]) -> tuple[int, ...]:
    """Return the ids of consecutive turns, from the start of the first one."""
    closings = ((), *(turn.exchange.closing_ids for turn in turns[1:]))
    pairs = zip(closings, turns, strict=False)
    return tuple(id for closing, turn in pairs for id in closing + turn.exchange.ids)


def unread_ids(pinned: Sequence[int], turns: Sequence[PlacedTurn], length: int) -> tuple[int, ...]:
    """Return the ids of the pinned beginning and of some turns that a stream has not read yet.

    Args:
        length: how many tokens the stream has read.
    """
    if not turns:
        return ()
    start = turns[0].start
    return (*pinned[length:start], *ids_of(turns)[max(0, length - start) :])


@dataclass(frozen=True)
class ConversationState:
    """The state of a conversation, apart from its exchanges and its stream.

    Attributes:
        turns: number of the last turn.
        places: `number` and `start` of each attended turn, oldest first.
        sampler: state of the random number generator, in hexadecimal.
    """

    turns: int
    places: tuple[tuple[int, int], ...]
    sampler: str

    @property
    def first(self) -> int:
        """The number of the oldest attended turn; `turns` + 1 if there is none."""
        return self.places[0][0] if self.places else self.turns + 1
