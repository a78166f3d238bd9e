"""A conversation on one stream: each turn reads only its own tokens; knows no files.

The beginning (a system prompt) is pinned: it is the stream's sinks. When room is needed, the oldest
exchanges leave, each whole, so that what is attended is always a conversation that the model's
template would render. However a reply ends (end token, limit, stop string, Ctrl-C, a closed
generator), the stream afterwards holds the final text and nothing else. Retry, undo and edit move
the ring's end back and read nothing again.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

from mlx_stream.chat.eviction import ActiveTurn, Idle, TurnEvictor
from mlx_stream.chat.exchange import ConversationState, Exchange, Pending, PlacedTurn
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.errors import TemplateError, TextError, ValueRefused, WeightsError
from mlx_stream.generate.completion import cumulative, stream_pieces
from mlx_stream.generate.speculative import decode_speculatively, stream_factory
from mlx_stream.generate.stats import Stats, eviction_notice
from mlx_stream.generate.token_stream import check_max_tokens, read_all_but_last_step, read_in_steps
from mlx_stream.load import Model
from mlx_stream.program.notices import Notify, discard
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder, StopMatcher
from mlx_stream.text.template import ChatTemplate
from mlx_stream.window import DEFAULT_SINKS

DEFAULT_MAX_TOKENS = 512
# A step that raises one may have left anything in the buffers, which pass for evaluated then.
BROKEN = (RuntimeError, MemoryError, WeightsError)
Progress = Callable[[int, int], None]
Pieces = Generator[Piece, None, None]
Begin = Callable[[], tuple[tuple[PlacedTurn, ...], PlacedTurn]]


class ChatSession:
    """Talk with a model for ever, in the memory of one window.

    Args:
        model: from `mlx_stream.load`.
        system: the system prompt. It is always attended, and comes on top of the window: the
            stream has as many sinks as it has tokens, or `sinks` if those are more.
        window, sinks, kv_bits: see `Model.new_cache`; sampling: how tokens are chosen.
        max_tokens: of one reply, unless `reply` is told otherwise.
        stop: strings before which a reply ends.
        notify: told in one line what the user should know: a reduced window, a turn longer than
            the window. The same lines are in `stats.notices`.
        evict: what leaves when room is needed: the oldest exchanges, each whole ("turn"), or the
            oldest tokens, one by one ("token").
        pin: False lets the system prompt be evicted like other text: for comparison.
        on_evict: called after a turn with the exchanges and the tokens that left during it.
        template: in place of the model's own; speculate, draft: see `mlx_stream.stream`.

    Raises:
        TemplateError: the model has no chat template, or one that rewrites earlier turns.
        ValueRefused: a value out of range; a system prompt longer than the window.
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
        notify: Notify = discard,
        evict: str = "turn",
        pin: bool = True,
        on_evict: Callable[[int, int], None] | None = None,
        template: ChatTemplate | None = None,
        kv_bits: int | None = None,
        speculate: bool | None = None,
        draft: Model | None = None,
    ):
        template = template or model.tokenizer.template
        if template is None:
            said = f"{model.name} has no chat template: it is not a chat model; use generate"
            raise TemplateError(said)
        if evict not in ("turn", "token"):
            raise ValueRefused(f"--evict must be turn or token, not {evict!r}")
        self.model, self.template = model, template
        self.max_tokens, self.stop = check_max_tokens(max_tokens), StopMatcher(stop).stops
        self.evict, self.pin, self.on_evict = evict, pin, on_evict
        self.steps = False  # whether replies yield after each step, so that others get a turn
        self.failed = False  # whether a step did, so that what is attended has to be read again
        self.sinks, self.kv_bits = DEFAULT_SINKS if sinks is None else sinks, kv_bits
        self._stream_factory = stream_factory(model, speculate, draft, kv_bits, sampling)
        self.sampler = Sampler(sampling or Sampling())
        self.stats = Stats(seed=self.sampler.sampling.seed or 0)
        self._on_notice, self._eviction_reported = notify, False
        # A reply is text. A special token is none: were one read, the model could open a turn of
        # its own, which no template renders. So each of them ends a reply.
        self._end_ids = model.tokenizer.eos_ids | model.tokenizer.special_ids
        self._begin(system, window)

    @property
    def system(self) -> str | None:
        return self.prompts.system

    @property
    def exchanges(self) -> list[Exchange]:
        """The exchanges that are attended, oldest first; asking ends a reply that is going on."""
        return [held.exchange for held in self._settle().turns]

    def reply(
        self,
        question: str,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Pieces:
        """Read a question and yield the reply's pieces; closing the generator stops the reply.

        A reply that is still going on when the next one is asked for is closed.

        Args:
            progress: called while the question is read with the tokens read and those to read.

        Raises:
            ValueRefused: `max_tokens` below 1, or an empty stop string.
            TextError: the question is empty.
        """
        if not question:
            raise TextError("the question is empty")
        limit, reply = self._new_reply(max_tokens, stop)
        return self._pieces(lambda: self._ask(question, limit), reply, limit, progress)

    def retry(
        self,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Pieces:
        """Answer the last question once more; only its last token is read again.

        Raises:
            ValueRefused: as `reply`; or there is no question, or not all of it is attended.
        """
        limit, reply = self._new_reply(max_tokens, stop)
        self._last_question()
        return self._pieces(self._last_question, reply, limit, progress)

    def edit(
        self,
        question: str,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Pieces:
        """Put another question in place of the last one; otherwise as `reply` after `undo`."""
        pieces = self.reply(question, max_tokens, stop, progress)
        self.undo()
        return pieces

    def undo(self) -> Exchange:
        """Take the last exchange back and return it; nothing is read again.

        Raises:
            ValueRefused: none is attended.
        """
        *held, last = self._turns_or_refuse("taken back")
        excess = max(0, self.tokens.length - last.base)
        if excess <= self.cache.rewindable:
            self.tokens.rewind(excess)
        else:  # it is longer than the window: what is left of it leaves
            self.tokens.evict(self.cache.length - self.cache.oldest)
        self.evictor.state = Idle(tuple(held), last.before)
        self._count()
        return last.exchange

    def clear(self, keep: int = 0) -> None:
        """Let every exchange but the last `keep` leave attention; the pinned beginning stays."""
        self._settle()
        while len(self.evictor.state.turns) > keep:
            self.evictor.evict_oldest()
        if not self.evictor.state.turns:
            self.evictor.state = Idle()
        self.tokens.restart_observer()
        self._count(asked=True)

    def restart(self, system: str | None, window: int | None) -> None:
        """Go on with another system prompt or window: what is attended is read again.

        Raises:
            TemplateError, ValueRefused, MemoryRefused: as the constructor; nothing has changed.
        """
        for _ in self._restart_steps(system, window):
            pass

    def _restart_steps(self, system: str | None, window: int | None) -> Iterator[None]:
        """Do what `restart` does, and yield after each step; closed before, nothing has changed."""
        exchanges, before = self.exchanges, dict(vars(self))
        self.stats, settled = replace(self.stats), self.evictor.ended
        try:
            self._begin(system, window)
            yield from self.replay_steps(exchanges)
            self.evictor.ended, self.failed = settled, False
        except BaseException:
            vars(self).update(before)
            raise

    def replay(self, exchanges: Sequence[Exchange], progress: Progress | None = None) -> None:
        """Read exchanges of before, in chunks, as if they were said now; same evictions."""
        for _ in self.replay_steps(exchanges, progress):
            pass

    def replay_steps(
        self, said: Sequence[Exchange], progress: Progress | None = None
    ) -> Iterator[None]:
        """Do what `replay` does, and yield after each step."""
        texts = (e.closing_ids + e.question_ids + e.reply_ids for e in said)
        step = cumulative(progress, len(self.prompts.pinned) + sum(map(len, texts)))
        for exchange in said:
            now = self._settle()
            self.evictor.make_room(len(now.pending.ids) + self._reserve(exchange, self.max_tokens))
            turn = self._turn(exchange)
            yield from read_in_steps(self.tokens, turn.prompt_ids, step)
            held, reply = self.evictor.state.turns, exchange.reply_ids
            self.evictor.state = Idle((*held, turn), Pending(reply))
            self.evictor.make_room(len(reply), keep=1)
            if reply:
                yield from read_in_steps(self.tokens, reply, step)
            self.evictor.state = Idle(
                self.evictor.state.turns, Pending((), self.prompts.rest_of(exchange))
            )
            self._count()

    def conversation_state(self) -> ConversationState:
        """Return what `resume` needs beside the exchanges and the stream's state."""
        now = self._settle()
        places = ((held.before, held.base, held.lead) for held in now.turns)
        return ConversationState(tuple(places), now.pending, self.sampler.state())

    def resume(self, talk: ConversationState, exchanges: Sequence[Exchange]) -> None:
        """Stand where `talk` says; the stream has been restored already.

        Args:
            exchanges: those of `talk.places`.

        Raises:
            ValueRefused: the stream does not attend to them.
        """
        held = tuple(PlacedTurn(e, *place) for e, place in zip(exchanges, talk.places, strict=True))
        rests = [self.prompts.rest_of(exchange) for exchange in exchanges]
        ids = self.tokens.attended_ids()
        self.evictor.check(held, talk.pending, rests, self.prompts.pinned, ids)
        if not all(self.accepts_reply(exchange.reply_ids) for exchange in exchanges):
            raise ValueRefused("a reply holds what no reply can hold")
        self.sampler.restore(talk.sampler)
        self.evictor.state = Idle(held, talk.pending)
        self._count()

    def accepts_reply(self, ids: Sequence[int]) -> bool:
        """Return whether ids can be a reply's: tokens of this model, none of them special."""
        return all(id < self.model.config.vocab_size and id not in self._end_ids for id in ids)

    # --- one turn ---

    def _new_reply(
        self, max_tokens: int | None, stop: Sequence[str] | None
    ) -> tuple[int, ReplyDecoder]:
        limit = self.max_tokens if max_tokens is None else check_max_tokens(max_tokens)
        return limit, ReplyDecoder(
            self.model.tokenizer.decoder(), self.stop if stop is None else stop
        )

    def _pieces(
        self, begin: Begin, reply: ReplyDecoder, limit: int, progress: Progress | None
    ) -> Pieces:
        if self.failed:
            self._notify("what is attended is read again: a step of the reply before failed")
            for _ in self._restart_steps(self.system, self.stats.window):
                if self.steps:
                    yield Piece("")
        earlier, turn = begin()
        now = self.evictor.state = ActiveTurn(earlier, turn, reply)
        # A question that is asked again: its last token's output is what the reply begins from.
        self.tokens.rewind(max(0, self.tokens.length - turn.base - len(turn.prompt_ids) + 1))
        prompt = turn.prompt_ids[self.tokens.length - turn.base :]
        ids = self._ids(prompt, limit, progress)
        try:
            for piece in stream_pieces(
                ids, reply, len(prompt), limit, self.stats, self.tokens, self.steps
            ):
                yield self._last_piece(piece) if piece.finish else piece
                if not self._is_current(now):  # the next turn has begun and settled this one
                    return
        except BROKEN:
            self.failed = True
            self.cache.release()
            raise
        finally:
            if self._is_current(now):
                self._settle()

    def _is_current(self, turn: ActiveTurn) -> bool:
        return isinstance(self.evictor.state, ActiveTurn) and self.evictor.state.reply is turn.reply

    def _ids(
        self, prompt: Sequence[int], limit: int, told: Progress | None
    ) -> Iterator[int | None]:
        """Yield a reply's ids; with `steps`, None after each step of the prompt but the last."""
        step = cumulative(told, len(prompt))
        if self.steps:
            prompt = yield from read_all_but_last_step(self.tokens, prompt, step)
        for id in decode_speculatively(
            self.tokens, prompt, self.sampler, limit, self._end_ids, step
        ):
            if not self.tokens.lookahead:  # else it was read as a guess, where there was room
                self.evictor.make_room(1)  # before it is read, when the next is asked for
            yield id

    def _ask(self, question: str, limit: int) -> tuple[tuple[PlacedTurn, ...], PlacedTurn]:
        """Make room for a question and its reply; return what is before it, and the turn."""
        now = self._settle()
        if self.tokens.length <= len(self.prompts.pinned):
            closing, ids = [], self.prompts.opening(question)
        else:
            closing, ids = self.prompts.following(now.pending.rest, question)
        exchange = Exchange(question, "", tuple(closing), tuple(ids), ())
        if len(ids) > self.cache.geometry.window:
            self._notify(
                f"this turn of {len(ids):,} tokens is longer than the window of "
                f"{self.cache.geometry.window:,}: it is read in full, and only its end is attended"
            )
        self.evictor.make_room(len(now.pending.ids) + self._reserve(exchange, limit))
        return self.evictor.state.turns, self._turn(exchange)

    def _reserve(self, exchange: Exchange, limit: int) -> int:
        """Return the tokens there must be room for before a question is read."""
        asked = exchange.closing_ids + exchange.question_ids
        return len(asked) + min(limit, self.cache.geometry.window // 4)

    def _turn(self, exchange: Exchange) -> PlacedTurn:
        """Return where an exchange stands that is read next."""
        now = self.evictor.state
        assert isinstance(now, Idle)
        if now.turns:
            lead = now.pending.ids + exchange.closing_ids
        else:
            # The exchange before has left, or there was none: nothing of it is read any more.
            lead = self.prompts.pinned[self.tokens.length :]
            exchange = replace(exchange, closing_ids=())
        return PlacedTurn(exchange, now.pending, self.tokens.length, lead)

    def _last_question(self) -> tuple[tuple[PlacedTurn, ...], PlacedTurn]:
        """Return what is before the last turn, and the turn as it was before its reply."""
        *held, last = self._turns_or_refuse("answered again")
        if max(last.start, self.cache.geometry.sinks) < self.cache.oldest:
            raise ValueRefused(
                "the last question has left the window in part, so it cannot be answered again: "
                "ask it anew, or with a larger --window"
            )
        blank = replace(last.exchange, reply="", reply_ids=(), rest="")
        return tuple(held), replace(last, exchange=blank)

    def _turns_or_refuse(self, what: str) -> tuple[PlacedTurn, ...]:
        held = self._settle().turns
        if not held:
            gone = self.stats.evicted_exchanges
            said = "all that was said has left attention:" if gone else "nothing was said yet:"
            raise ValueRefused(f"{said} there is nothing that could be {what}")
        return held

    def _settle(self) -> Idle:
        """Leave the stream with the turn and the final text of the reply, and nothing else.

        The turn may have been interrupted anywhere; what is missing is read with the next one. An
        interrupt in here is made good by the next call: nothing is done twice.
        """
        now = self.evictor.state
        if isinstance(now, ActiveTurn):
            turn = now.finish(trim=self.template.trims)
            wanted = turn.prompt_ids + turn.exchange.reply_ids
            self.tokens.rollback_lookahead()
            excess = self.tokens.length - turn.base - len(wanted)
            if excess > 0:
                # A window smaller than what must be taken back cannot hold a whole turn anyway.
                self.tokens.rewind(min(excess, self.cache.rewindable))
            unread = wanted[max(0, self.tokens.length - turn.base) :]
            rest = self.prompts.rest_of(turn.exchange)
            now = self.evictor.end_turn((*now.turns, turn), Pending(unread, rest))
            self._count()
        return now

    # --- the stream, and what is said about it ---

    def _begin(self, system: str | None, window: int | None) -> None:
        """Allocate the stream; read nothing yet."""
        turns = PromptBuilder(self.model.tokenizer, self.template, system, self.pin)
        pinned = len(turns.pinned)
        sinks = self.model.sinks_for(pinned, self.sinks, window)
        self.cache, self.tokens = self._stream_factory(sinks, window, self._notify)
        self.prompts, cache = turns, self.cache
        self.evictor = TurnEvictor(cache, whole=self.evict == "turn")
        self.stats.sinks, self.stats.window = cache.geometry.sinks, cache.geometry.window
        self.stats.pinned, self.stats.cache_bytes = pinned, cache.nbytes
        self._count()

    def _last_piece(self, piece: Piece) -> Piece:
        left = zip(
            ("evicted_exchanges", "evicted_tokens"),
            self.evictor.evicted_since_report(),
            strict=True,
        )
        return replace(piece, attended=self.cache.attended, **dict(left))

    def _count(self, asked: bool = False) -> None:
        """Bring the statistics up to date, and say what has left, if nobody `asked` for that."""
        self.stats.attended, self.stats.evicted = self.cache.attended, self.cache.evicted
        self.evictor.forget()
        exchanges, tokens = self.evictor.evicted_since_report()
        self.evictor.mark_reported()
        self.stats.evicted_exchanges += exchanges
        if tokens > 0 and not asked and not self._eviction_reported:
            self._eviction_reported = True
            self._notify(eviction_notice(self.stats.window))
        if self.on_evict and (exchanges or tokens > 0):
            self.on_evict(exchanges, tokens)

    def _notify(self, notice: str) -> None:
        self.stats.add_notices(notice)
        self._on_notice(notice)
