"""Which exchanges a stream attends to, and how the oldest leave; knows no text and no template."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mlx_stream.cache import StreamCache
from mlx_stream.chat.exchange import Pending, PlacedTurn
from mlx_stream.errors import ValueRefused
from mlx_stream.text.pieces import ReplyDecoder


@dataclass(frozen=True)
class Idle:
    """Between turns: the exchanges attended, and what is unread of the last one."""

    turns: tuple[PlacedTurn, ...] = ()
    pending: Pending = field(default_factory=Pending)


@dataclass(frozen=True)
class ActiveTurn:
    """In a turn: the exchanges before it, its question, and what is said so far."""

    turns: tuple[PlacedTurn, ...]
    turn: PlacedTurn
    reply: ReplyDecoder

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
    """The exchanges that a stream of one conversation attends to.

    Attributes:
        now: exchanged whole, so that whatever interrupts a turn, the next one finds where it was.
        settled: how many turns have come to their end, those that were taken back included.
        whole: whether exchanges leave whole, or token by token as in any stream.
    """

    def __init__(self, cache: StreamCache, whole: bool):
        self.cache, self.whole = cache, whole
        self.state: Idle | ActiveTurn = Idle()
        self.ended = 0
        self._gone = 0
        self._told = (0, 0)

    def end_turn(self, held: tuple[PlacedTurn, ...], unread: Pending) -> Idle:
        """End a turn."""
        now = Idle(held, unread)
        self.state, self.ended = now, self.ended + 1
        return now

    def make_room(self, count: int, keep: int = 0) -> None:
        """Let the oldest exchanges leave until `count` tokens can be read; the last `keep` stay."""
        self.forget()
        while self.whole and self.cache.room < count and len(self.state.turns) > keep:
            self.evict_oldest()

    def evict_oldest(self) -> None:
        """Let the oldest exchange leave, and what closes it."""
        self.cache.evict(max(0, min(self._end_of_oldest(), self.cache.length) - self.cache.oldest))
        self._drop_oldest()

    def forget(self) -> None:
        """Forget exchanges of which no token is attended any more."""
        sinks = self.cache.geometry.sinks
        while (
            self.state.turns
            and sinks < self.cache.oldest
            and self._end_of_oldest() <= self.cache.oldest
        ):
            self._drop_oldest()

    def check(
        self,
        held: Sequence[PlacedTurn],
        unread: Pending,
        rests: Sequence[str],
        pinned: Sequence[int],
        ids: Sequence[int],
    ) -> None:
        """Make sure that a stream attends to `held`, `pinned` before it, and to nothing else.

        Nor may it be about to read anything else, which is what `unread` and each `before` hold.

        Args:
            unread: of the last one.
            rests: the text of each one that is read after its ids.
            ids: those attended, oldest first.

        Raises:
            ValueRefused: it does not.
        """
        said = dict(enumerate(pinned))
        ends = [*((h.before, h.base) for h in held[1:]), (unread, self.cache.length)]
        for number, (h, rest, (left, end)) in enumerate(zip(held, rests, ends, strict=False)):
            whole = h.prompt_ids + h.exchange.reply_ids
            follows = number == 0 or h.lead == h.before.ids + h.exchange.closing_ids
            if not (
                0 <= h.base <= end and follows and left == Pending(whole[end - h.base :], rest)
            ):
                raise ValueRefused("its exchanges do not stand where they were said")
            # Before the first one's own ids is what is pinned, or nothing that is attended.
            own = 0 if number else len(h.lead)
            said.update(enumerate(whole[own:], h.base + own))
        sinks, length = self.cache.geometry.sinks, self.cache.length
        places = [*range(min(sinks, length)), *range(self.cache.oldest, length)]
        for place, id in zip(places, ids, strict=True):
            # Sinks beyond the pinned ones stay when their exchange has left.
            if said.get(place, id if place < sinks else None) != id:
                raise ValueRefused(f"its token {place} is not the one that was said there")

    def evicted_since_report(self) -> tuple[int, int]:
        """Return the exchanges and the tokens that left since `told` was last called."""
        return self._gone - self._told[0], self.cache.evicted - self._told[1]

    def mark_reported(self) -> None:
        self._told = self._gone, self.cache.evicted

    def _drop_oldest(self) -> None:
        self.state = replace(self.state, turns=self.state.turns[1:])
        self._gone += 1

    def _end_of_oldest(self) -> int:
        """Return the stream's length after the oldest exchange and what closes it."""
        now = self.state
        if len(now.turns) > 1:
            return now.turns[1].start
        if isinstance(now, ActiveTurn):
            return now.turn.start
        # If it has not been read, what is read of it later begins there.
        return max(self.cache.length, next(iter(now.turns)).start + 1)
