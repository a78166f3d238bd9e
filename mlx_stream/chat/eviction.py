"""Which exchanges a stream attends to, and how the oldest leave; knows no text and no template."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mlx_stream.cache import StreamCache
from mlx_stream.chat.exchange import Held, Unread
from mlx_stream.errors import ValueRefused
from mlx_stream.text.pieces import Reply


@dataclass(frozen=True)
class Between:
    """Between turns: the exchanges attended, and what is unread of the last one."""

    held: tuple[Held, ...] = ()
    unread: Unread = field(default_factory=Unread)


@dataclass(frozen=True)
class During:
    """In a turn: the exchanges before it, its question, and what is said so far."""

    held: tuple[Held, ...]
    turn: Held
    reply: Reply

    def ended(self, trim: bool) -> Held:
        """Return the turn with its final text; what was held back of a reply that was cut is said.

        Args:
            trim: whether the template drops spaces around a reply.
        """
        self.reply.flush()
        kept, rest = self.reply.kept(trim=trim)
        exchange = replace(
            self.turn.exchange,
            reply=self.reply.said(trim=trim),
            reply_ids=tuple(self.reply.ids[:kept]),
            rest=rest,
            finish=self.reply.finish,
        )
        return replace(self.turn, exchange=exchange)


class Attended:
    """The exchanges that a stream of one conversation attends to.

    Attributes:
        now: exchanged whole, so that whatever interrupts a turn, the next one finds where it was.
        settled: how many turns have come to their end, those that were taken back included.
        whole: whether exchanges leave whole, or token by token as in any stream.
    """

    def __init__(self, cache: StreamCache, whole: bool):
        self.cache, self.whole = cache, whole
        self.now: Between | During = Between()
        self.settled = 0
        self._gone = 0
        self._told = (0, 0)

    def settle(self, held: tuple[Held, ...], unread: Unread) -> Between:
        """End a turn."""
        now = Between(held, unread)
        self.now, self.settled = now, self.settled + 1
        return now

    def make_room(self, count: int, keep: int = 0) -> None:
        """Let the oldest exchanges leave until `count` tokens can be read; the last `keep` stay."""
        self.forget()
        while self.whole and self.cache.room < count and len(self.now.held) > keep:
            self.evict_oldest()

    def evict_oldest(self) -> None:
        """Let the oldest exchange leave, and what closes it."""
        self.cache.evict(max(0, min(self._end_of_oldest(), self.cache.length) - self.cache.oldest))
        self._drop_oldest()

    def forget(self) -> None:
        """Forget exchanges of which no token is attended any more."""
        sinks = self.cache.geometry.sinks
        while (
            self.now.held
            and sinks < self.cache.oldest
            and self._end_of_oldest() <= self.cache.oldest
        ):
            self._drop_oldest()

    def check(
        self,
        held: Sequence[Held],
        unread: Unread,
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
            whole = h.read + h.exchange.reply_ids
            follows = number == 0 or h.lead == h.before.ids + h.exchange.closing_ids
            if not (0 <= h.base <= end and follows and left == Unread(whole[end - h.base :], rest)):
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

    def gone(self) -> tuple[int, int]:
        """Return the exchanges and the tokens that left since `told` was last called."""
        return self._gone - self._told[0], self.cache.evicted - self._told[1]

    def told(self) -> None:
        self._told = self._gone, self.cache.evicted

    def _drop_oldest(self) -> None:
        self.now = replace(self.now, held=self.now.held[1:])
        self._gone += 1

    def _end_of_oldest(self) -> int:
        """Return the stream's length after the oldest exchange and what closes it."""
        now = self.now
        if len(now.held) > 1:
            return now.held[1].start
        if isinstance(now, During):
            return now.turn.start
        # If it has not been read, what is read of it later begins there.
        return max(self.cache.length, next(iter(now.held)).start + 1)
