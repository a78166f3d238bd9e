"""A conversation on one stream: each turn reads only its own tokens; knows no files.

Whatever way a reply ends (end token, limit, stop string, Ctrl-C, a closed generator), the stream
afterwards holds what the model's template would render: tokens past a stop string are taken back,
and what the template puts after a reply is read before the next turn.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from mlx_stream.errors import TemplateError, TextError, ValueRefused
from mlx_stream.generate import Sampler, Sampling, TokenStream, generate
from mlx_stream.load import Model, ignore
from mlx_stream.stream import Piece, Reply, Stats, StopFinder, counted, eviction_notice, paced
from mlx_stream.template import ChatTemplate

DEFAULT_MAX_TOKENS = 512
NOTICES_KEPT = 8


@dataclass(frozen=True)
class Between:
    """Between turns: what the stream must still read before the next one, ids and then text."""

    unread: tuple[int, ...] = ()
    closing: str = ""
    begun: bool = False


@dataclass(frozen=True)
class During:
    """In a turn: its ids, what is said so far, and the length of the stream before it."""

    turn: list[int]
    reply: Reply
    start: int


class ChatSession:
    """Talk with a model for ever, in the memory of one window.

    Args:
        model: from `mlx_stream.load`.
        system: the system prompt; read once, and evicted like any other text when its time comes.
        window, sinks: see `Model.new_cache`.
        sampling: how tokens are chosen.
        max_tokens: of one reply, unless `reply` is told otherwise.
        stop: strings before which a reply ends.
        notify: told in one line what the user should know: a reduced window, a turn longer than
            the window. The same lines are in `stats.notices`.

    Raises:
        TemplateError: the model has no chat template, or one that rewrites earlier turns.
        ValueRefused: a number out of range.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        window: int | None = None,
        sinks: int | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        notify: Callable[[str], None] = ignore,
    ):
        template = model.tokenizer.template
        if template is None:
            raise TemplateError(
                f"{model.name} has no chat template: it is not a chat model; use generate"
            )
        if max_tokens < 1:
            raise ValueRefused(f"--max-tokens must be at least 1, not {max_tokens}")
        template.check(system is not None)
        self.model, self.system = model, system
        self.template: ChatTemplate = template
        self.max_tokens, self.stop = max_tokens, StopFinder(stop).stops
        self.stats = Stats()
        self._told = notify
        self.cache = model.new_cache(sinks, window, notify=self._notify)
        self.tokens = TokenStream(model, self.cache)
        self.sampler = Sampler(sampling or Sampling())
        geometry = self.cache.geometry
        self.stats.sinks, self.stats.window = geometry.sinks, geometry.window
        self.stats.cache_bytes = self.cache.nbytes
        self.stats.seed = self.sampler.sampling.seed or 0
        # A reply is text. A special token is none: were one read, the model could open a turn of
        # its own, which no template renders. So each of them ends a reply.
        self._end_ids = model.tokenizer.eos_ids | model.tokenizer.special_ids
        # Exchanged whole, so that whatever interrupts a turn, the next one finds where it was.
        self._now: Between | During = Between()
        self._eviction_told = False

    def reply(
        self,
        question: str,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generator[Piece, None, None]:
        """Read a question and yield the reply's pieces; closing the generator stops the reply.

        A reply that is still going on when the next one is asked for is closed.

        Args:
            progress: called while the question is read with the tokens read and those to read.

        Raises:
            ValueRefused: `max_tokens` below 1, or an empty stop string.
            TextError: the question is empty.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        if limit < 1:
            raise ValueRefused(f"--max-tokens must be at least 1, not {limit}")
        if not question:
            raise TextError("the question is empty")
        reply = Reply(self.model.tokenizer.decoder(), self.stop if stop is None else stop)
        return self._pieces(question, reply, limit, progress)

    def _pieces(
        self,
        question: str,
        reply: Reply,
        limit: int,
        progress: Callable[[int, int], None] | None,
    ) -> Generator[Piece, None, None]:
        turn = self._turn(question, self._settle())
        now = self._now = During(turn, reply, self.tokens.length)
        ids = generate(
            self.tokens,
            turn,
            self.sampler,
            limit,
            self._end_ids,
            counted(progress, len(turn)),
        )
        try:
            for piece in paced(ids, reply, len(turn), limit, self.stats, self.tokens):
                yield piece
                if self._now is not now:  # the next turn has begun and settled this one
                    return
        finally:
            if self._now is now:
                self._settle()

    def _turn(self, question: str, before: Between) -> list[int]:
        """Return all ids the stream must read before it can reply."""
        if before.begun:
            text = self.template.turn(question, self.system)
        else:
            text = self.template.opening(self.system, question)
        rest = self.model.tokenizer.encode(before.closing + text, special=False)
        turn = [*before.unread, *rest]
        window = self.cache.geometry.window
        if len(turn) > window:
            self._notify(
                f"this turn of {len(turn)} tokens is longer than the window of {window}: it is "
                "read in full, and only its end is attended"
            )
        return turn

    def _settle(self) -> Between:
        """Leave the stream with the turn and the final text of the reply, and nothing else.

        The turn may have been interrupted anywhere; what is missing is read with the next one. An
        interrupt in here is made good by the next call: nothing is done twice.
        """
        now = self._now
        if isinstance(now, Between):
            return now
        kept, rest = now.reply.kept(trim=self.template.trims)
        wanted = [*now.turn, *now.reply.ids[:kept]]
        excess = self.tokens.length - now.start - len(wanted)
        if excess > 0:
            # A window smaller than what must be taken back cannot hold a whole turn anyway.
            self.tokens.rewind(min(excess, self.cache.rewindable))
        lead = "" if kept or rest else self.template.lead
        unread = wanted[max(0, self.tokens.length - now.start) :]
        self._now = Between(tuple(unread), lead + rest + self.template.closing, True)
        self.stats.attended, self.stats.evicted = self.cache.attended, self.cache.evicted
        if self.cache.evicted and not self._eviction_told:
            self._eviction_told = True
            self._notify(eviction_notice(self.stats.window))
        return self._now

    def _notify(self, notice: str) -> None:
        self.stats.notices = [*self.stats.notices[1 - NOTICES_KEPT :], notice]
        self._told(notice)
