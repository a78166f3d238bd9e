"""Which turns a stream attends to, and how the oldest leave; knows no text and no template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mlx_stream.cache import StreamCache
from mlx_stream.chat.exchange import PlacedTurn, ids_of
from mlx_stream.errors import ValueRefused
from mlx_stream.text.pieces import ReplyDecoder


@dataclass(frozen=True)
class Idle:
    """Between turns.

    Attributes:
        turns: those attended, oldest first.
        settling: whether what is unread of them is to be read apart from the next question.
    """

    turns: tuple[PlacedTurn, ...] = ()
    settling: bool = False
    reply: ClassVar[None] = None


@dataclass(frozen=True)
class ActiveTurn:
    """In a turn.

    Attributes:
        turns: those attended before it.
        turn: its question.
        reply: what is said so far.
        before: the turns that were attended when the reply began.
    """

    turns: tuple[PlacedTurn, ...]
    turn: PlacedTurn
    reply: ReplyDecoder
    before: tuple[PlacedTurn, ...]

    def finish(self, trim: bool) -> PlacedTurn:
        """Return the turn with its final text; what was held back of a reply that was cut is said.

        Args:
            trim: whether the template drops spaces around a reply.
        """
        self.reply.flush()
        kept, rest = self.reply.final_ids(trim=trim)
        exchange = replace(
            self.turn.exchange,
            reply=self.reply.final_text(trim=trim),
            reply_ids=tuple(self.reply.ids[:kept]),
            rest=rest,
            finish=self.reply.finish,
        )
        return replace(self.turn, exchange=exchange)


class TurnEvictor:
    """The turns that a stream of one conversation attends to.

    Attributes:
        state: exchanged whole, so that whatever interrupts a turn, the next one finds where it was.
        whole: whether turns leave whole, or token by token as in any stream.
    """

    def __init__(self, cache: StreamCache, whole: bool):
        self.cache, self.whole = cache, whole
        self.state: Idle | ActiveTurn = Idle()
        self._gone = 0
        self._reported = (0, 0)

    def make_room(self, count: int, keep: int = 0) -> None:
        """Let the oldest turns leave until `count` tokens can be read; the last `keep` stay."""
        self.forget()
        while self.whole and self.cache.room < count and len(self.state.turns) > keep:
            self.evict_oldest()

    def evict_oldest(self) -> None:
        """Let the oldest turn leave, and what closes it."""
        self.cache.evict(max(0, min(self._end_of_oldest(), self.cache.length) - self.cache.oldest))
        self._drop_oldest()

    def forget(self) -> None:
        """Forget turns of which no token is attended any more.

        A take-back brings the end of a turn back that had left token by token: it leaves again.
        """
        state, cache = self.state, self.cache
        first = state.turns[0].start if state.turns else cache.length
        if isinstance(state, ActiveTurn) and not state.turns:
            first = state.turn.start
        if (back := min(first, cache.length) - cache.oldest) > 0:
            cache.evict(back)
        sinks, oldest = cache.geometry.sinks, cache.oldest
        while self.state.turns and sinks < oldest and self._end_of_oldest() <= oldest:
            self._drop_oldest()

    def become_idle(self, idle: Idle) -> None:
        """Stand between turns; those attended before that are not now have left."""
        here = {turn.number for turn in idle.turns}
        self._gone += sum(turn.number not in here for turn in self.state.turns)
        self.state = idle

    def check(
        self, turns: Sequence[PlacedTurn], pinned: Sequence[int], attended: Sequence[int]
    ) -> None:
        """Make sure that a stream attends to turns, `pinned` before them, and to nothing else.

        Args:
            attended: the ids it attends to, oldest first.

        Raises:
            ValueRefused: it does not.
        """
        ends = [turn.end for turn in turns]
        starts = [turn.start - len(turn.exchange.closing_ids) for turn in turns[1:]]
        length, sinks = self.cache.length, self.cache.geometry.sinks
        if starts != ends[:-1] or (
            turns and not (len(pinned) <= turns[0].start and length <= ends[-1])
        ):
            raise ValueRefused("its exchanges do not stand where they were said")
        known = dict(enumerate(pinned))
        if turns:
            known.update(enumerate(ids_of(turns), turns[0].start))
        places = [*range(min(sinks, length)), *range(self.cache.oldest, length)]
        for place, id in zip(places, attended, strict=True):
            # Sinks beyond the pinned ones stay when their exchange has left.
            if known.get(place, id if place < sinks else None) != id:
                raise ValueRefused(f"its token {place} is not the one that was said there")

    def evicted_since_report(self) -> tuple[int, int]:
        """Return the turns and the tokens that left since `mark_reported` was last called."""
        return self._gone - self._reported[0], self.cache.evicted - self._reported[1]

    def mark_reported(self) -> None:
        self._reported = self._gone, self.cache.evicted

    def _drop_oldest(self) -> None:
        self.state = replace(self.state, turns=self.state.turns[1:])
        self._gone += 1

    def _end_of_oldest(self) -> int:
        """Return the place after the oldest turn and what closes it."""
        oldest, *later = self.state.turns
        if later:
            return later[0].start
        return self.state.turn.start if isinstance(self.state, ActiveTurn) else oldest.end
