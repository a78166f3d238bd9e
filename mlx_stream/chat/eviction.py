"""Tracks the turns a stream attends to and evicts the oldest; independent of text and templates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mlx_stream.cache import StreamCache
from mlx_stream.chat.exchange import PlacedTurn, ids_of
from mlx_stream.chat.messages import calls_with_ids
from mlx_stream.errors import ValueRefused
from mlx_stream.text.pieces import ReplyDecoder


@dataclass(frozen=True)
class Idle:
    """The state between turns.

    Attributes:
        turns: the attended turns, oldest first. The last ones may not have been read yet.
    """

    turns: tuple[PlacedTurn, ...] = ()
    reply: ClassVar[None] = None
    quoted: ClassVar[int] = 0


@dataclass(frozen=True)
class ActiveTurn:
    """The state during a turn.

    Attributes:
        turns: the attended turns before it.
        turn: the question.
        reply: the reply so far.
        before: the turns that were attended when the reply began.
        plain_ids: the ids of the question without the quotation before it.
    """

    turns: tuple[PlacedTurn, ...]
    turn: PlacedTurn
    reply: ReplyDecoder
    before: tuple[PlacedTurn, ...]
    plain_ids: tuple[int, ...]

    @property
    def quoted(self) -> int:
        """The length of the quotation in tokens."""
        return len(self.turn.exchange.question_ids) - len(self.plain_ids)

    def finish(self, trim: bool) -> PlacedTurn:
        """Return the turn without the quotation and with its final reply.

        The reply includes text that the decoder held back.

        Args:
            trim: whether the template strips spaces around a reply.
        """
        self.reply.flush()
        kept, rest = self.reply.final_ids(trim=trim)
        exchange = replace(
            self.turn.exchange,
            question_ids=self.plain_ids,
            reply=self.reply.final_text(trim=trim),
            reply_ids=tuple(self.reply.ids[:kept]),
            rest=rest,
            finish=self.reply.finish,
            thinking=self.reply.thinking,
            calls=calls_with_ids(self.reply.calls, self.turn.number),
        )
        return replace(self.turn, exchange=exchange)


class TurnEvictor:
    """The turns of one conversation that a stream attends to.

    Attributes:
        state: replaced as a whole, so that an interrupt leaves the old state or the new one.
        whole: whether turns are evicted whole; otherwise tokens are evicted one by one.
        reserved: how many tokens of the window are kept free for a quotation.
        left: the turns that have left the window, oldest first, until the caller takes them.
    """

    def __init__(self, cache: StreamCache, whole: bool, reserved: int = 0):
        self.cache, self.whole, self.reserved = cache, whole, reserved
        self.state: Idle | ActiveTurn = Idle()
        self.left: list[PlacedTurn] = []
        self._evicted_turns = 0
        self._reported = (0, 0)

    def make_room(self, count: int, keep: int = 0) -> None:
        """Evict the oldest turns, except the last `keep`, until `count` tokens can be read."""
        self.forget()
        while self.whole and len(self.state.turns) > keep and self._room < count:
            self.evict_oldest()

    def evict_oldest(self) -> None:
        """Evict the oldest turn and the ids that close it.

        The results of its tool calls are evicted with it, unless only turns of that chain remain.
        """
        self._evict_one()
        while (turns := self.state.turns) and turns[0].exchange.answers_calls:
            active = [self.state.turn] if isinstance(self.state, ActiveTurn) else []
            if all(turn.exchange.answers_calls for turn in (*turns, *active)):
                break
            self._evict_one()

    def _evict_one(self) -> None:
        self.cache.evict(max(0, min(self._end_of_oldest(), self.cache.length) - self.cache.oldest))
        self._drop_oldest()

    def forget(self) -> None:
        """Forget turns with no tokens left in the window, and evict the tokens of forgotten turns.

        A rewind can bring back the end of a turn that was evicted token by token.
        """
        state, cache = self.state, self.cache
        sinks, oldest = cache.geometry.sinks, cache.oldest
        if state.turns:
            first = state.turns[0].start
        else:
            first = state.turn.start if isinstance(state, ActiveTurn) else cache.length
        if oldest < first and (back := min(first, cache.length) - oldest) > 0:
            cache.evict(back)
            oldest = cache.oldest
        while self.state.turns and sinks < oldest and self._end_of_oldest() <= oldest:
            self._drop_oldest()

    def become_idle(self, turns: tuple[PlacedTurn, ...]) -> None:
        """Enter the state between turns, and count the turns that have left the window."""
        attended = {turn.number for turn in turns}
        gone = [turn for turn in self.state.turns if turn.number not in attended]
        self._evicted_turns += len(gone)
        self.left += gone
        self.state = Idle(turns)

    def check(
        self, turns: Sequence[PlacedTurn], pinned: Sequence[int], attended: Sequence[int]
    ) -> None:
        """Check that a stream attends to the pinned ids and some turns, and to nothing else.

        Args:
            attended: the ids that the stream attends to, oldest first.

        Raises:
            ValueRefused: the stream attends to something else.
        """
        ends = [turn.end for turn in turns]
        starts = [turn.start - len(turn.exchange.closing_ids) for turn in turns[1:]]
        length, sinks = self.cache.length, self.cache.geometry.sinks
        if starts != ends[:-1] or (
            turns and not (len(pinned) <= turns[0].start and length <= ends[-1])
        ):
            raise ValueRefused("its exchanges are not at the positions it records")
        known = dict(enumerate(pinned))
        if turns:
            known.update(enumerate(ids_of(turns), turns[0].start))
        places = [*range(min(sinks, length)), *range(self.cache.oldest, length)]
        for place, id in zip(places, attended, strict=True):
            # Sinks beyond the pinned ids stay when their exchange is evicted.
            if known.get(place, id if place < sinks else None) != id:
                raise ValueRefused(f"its token {place} is not the one in the transcript")

    def evicted_since_report(self) -> tuple[int, int]:
        """Return how many turns and tokens were evicted since the last `mark_reported`."""
        return self._evicted_turns - self._reported[0], self.cache.evicted - self._reported[1]

    def mark_reported(self) -> None:
        self._reported = self._evicted_turns, self.cache.evicted

    @property
    def _room(self) -> int:
        """How many tokens, not counting a quotation, can be read before a turn must be evicted."""
        return self.cache.room - self.reserved + self.state.quoted

    def _drop_oldest(self) -> None:
        oldest, *later = self.state.turns
        self.state = replace(self.state, turns=tuple(later))
        self.left.append(oldest)
        self._evicted_turns += 1

    def _end_of_oldest(self) -> int:
        """Return the position after the oldest turn and the ids that close it."""
        oldest, *later = self.state.turns
        if later:
            return later[0].start
        return self.state.turn.start if isinstance(self.state, ActiveTurn) else oldest.end
