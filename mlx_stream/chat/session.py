"""A conversation on one stream: each turn reads only its own tokens; knows no files.

The beginning (a system prompt) is pinned: it is the stream's sinks. When room is needed, the oldest
turns leave, each whole, so that what is attended is always a conversation that the model's template
would render. However a reply ends (end token, limit, stop string, Ctrl-C, a closed generator), the
stream afterwards holds the final text and nothing else. Retry, undo and edit move the ring's end
back and read nothing again.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from mlx_stream.chat.eviction import ActiveTurn, Idle, TurnEvictor
from mlx_stream.chat.exchange import ConversationState, Exchange, PlacedTurn, unread_ids
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.chat.recorder import Change, ChangeKind, Recorder
from mlx_stream.chat.settle import empty_ring, place_again, take_back
from mlx_stream.errors import SessionError, TemplateError, TextError, ValueRefused, one_line
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import Coroutine, drive, read_ids, run_coroutine
from mlx_stream.generate.speculative import writer_factory
from mlx_stream.generate.stats import Stats, cumulative, eviction_notice
from mlx_stream.generate.token_stream import check_max_tokens
from mlx_stream.load import Model
from mlx_stream.program.notices import Notify, discard
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder, StopMatcher
from mlx_stream.text.template import ChatTemplate

DEFAULT_MAX_TOKENS = 512
Progress = Callable[[int, int], None]
Pieces = Generator[Piece, None, None]
Begin = Callable[[], PlacedTurn]


class ChatSession:
    """Talk with a model for ever, in the memory of one window.

    It has many methods: each verb that reads is there twice, as a plain call and as a coroutine
    (`..._steps`) that says what it needs read, for drivers of several conversations.

    Args:
        model: from `mlx_stream.load`.
        system: the system prompt. It is always attended, and comes on top of the window: the
            stream has as many sinks as it has tokens, or `sinks` if those are more.
        window, sinks, kv_bits: see `Model.new_cache`; sampling: how tokens are chosen.
        max_tokens: of one reply, unless `reply` is told otherwise.
        stop: strings before which a reply ends.
        notify: told in one line what the user should know: a reduced window, a turn longer than
            the window. The same lines are in `stats.notices`.
        evict: what leaves when room is needed: the oldest turns, each whole ("turn"), or the
            oldest tokens, one by one ("token").
        pin: False lets the system prompt be evicted like other text: for comparison.
        on_evict: called after a turn with the turns and the tokens that left during it.
        template: in place of the model's own; speculate, draft: see `mlx_stream.stream`.

    Attributes:
        recorder: writes the conversation down, if it is set.
        number: of the last turn, from 1.
        unanswered: the last turn's question, if the program that asked it ended before its reply
            did. `retry` answers it.

    Raises:
        TemplateError: the model has no chat template, or one that no stream can follow.
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
        self.sinks, self.kv_bits = model.resolve_window(sinks, None)[0], kv_bits
        self.recorder: Recorder | None = None
        self.number, self.unanswered = 0, ""
        self._writer_factory = writer_factory(model, speculate, draft, kv_bits, sampling)
        self.sampler = Sampler(sampling or Sampling())
        self.stats = Stats(seed=self.sampler.sampling.seed or 0)
        self._on_notice, self._eviction_reported = notify, False
        self._begin(system, window)

    @property
    def system(self) -> str | None:
        return self.prompts.system

    @property
    def exchanges(self) -> list[Exchange]:
        """The exchanges that are attended, oldest first; asking ends a reply that is going on."""
        return [turn.exchange for turn in self._settle()]

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
            SessionError: the recorder could not write the turn; that is tried again with the next.
        """
        return drive(self.reply_steps(question, max_tokens, stop, progress))

    def reply_steps(
        self,
        question: str,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Coroutine[Piece, None]:
        """Do what `reply` does as a coroutine."""
        if not question:
            raise TextError("the question is empty")
        limit, reply = self._new_reply(max_tokens, stop)
        return self._turn_steps(lambda: self._ask(question, limit), reply, limit, progress)

    def retry(
        self,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Pieces:
        """Answer the last question once more; what is still attended of it is not read again.

        Raises:
            ValueRefused: as `reply`; or there is no question.
        """
        return drive(self.retry_steps(max_tokens, stop, progress))

    def retry_steps(
        self,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Coroutine[Piece, None]:
        """Do what `retry` does as a coroutine."""
        limit, reply = self._new_reply(max_tokens, stop)
        if not self.unanswered:
            self._turns_or_refuse("answered again")
        return self._turn_steps(lambda: self._ask_again(limit), reply, limit, progress)

    def edit(
        self,
        question: str,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Pieces:
        """Put another question in place of the last one; otherwise as `reply`.

        Raises:
            ValueRefused: as `reply`; or there is no question.
        """
        return drive(self.edit_steps(question, max_tokens, stop, progress))

    def edit_steps(
        self,
        question: str,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Coroutine[Piece, None]:
        """Do what `edit` does as a coroutine."""
        if not question:
            raise TextError("the question is empty")
        limit, reply = self._new_reply(max_tokens, stop)
        if not self.unanswered:
            self._turns_or_refuse("edited")

        def ask() -> PlacedTurn:
            self.prompts.question(question, None, self.number == 1)  # refused, if it is, in time
            self._take_back_last()
            return self._ask(question, limit)

        return self._turn_steps(ask, reply, limit, progress)

    def undo(self) -> Exchange:
        """Take the last exchange back and return it; nothing is read again.

        Raises:
            ValueRefused: none is attended.
        """
        self._settle()
        taken = self._take_back_last()
        self._record(ChangeKind.UNDO, self.number + 1)
        return taken

    def clear(self, first: int | None = None) -> None:
        """Let every turn leave attention, or those before number `first`; the beginning stays."""
        self._settle()
        self.unanswered = ""
        while (turns := self.evictor.state.turns) and (first is None or turns[0].number < first):
            self.evictor.evict_oldest()
        self.tokens.ids.restart_observers()
        self._count(asked=True)
        self._record(ChangeKind.STAND, self.number)

    def restart(self, system: str | None, window: int | None) -> None:
        """Go on with another system prompt or window: what is attended is read again.

        Raises:
            TemplateError, ValueRefused, MemoryRefused: as the constructor; nothing has changed.
        """
        run_coroutine(self.restart_steps(system, window))

    def restart_steps(self, system: str | None, window: int | None) -> Coroutine[Piece, None]:
        """Do what `restart` does as a coroutine; closed before its end, nothing has changed."""
        turns, before = self._settle(), dict(vars(self))
        self.stats = replace(self.stats)
        try:
            self._begin(system, window)
            exchanges = self.prompts.encode_again({t.number: t.exchange for t in turns})
            turns = tuple(PlacedTurn(e, number, 0) for number, e in exchanges.items())
            self.evictor.state = Idle(turns)
            turns = place_again(self.tokens, self.cache, turns, len(self.prompts.pinned))
            self.evictor.become_idle(Idle(turns, settling=True))
            yield from self._read_settling()
        except BaseException:
            vars(self).update(before)
            raise
        self.record_turns()

    def replay_steps(
        self, exchanges: Mapping[int, Exchange], progress: Progress | None = None
    ) -> Coroutine[Piece, None]:
        """Read turns of before, in chunks, as if they were said now; a coroutine.

        Args:
            exchanges: by number of the turn, in order.
        """
        turns = self._settle()
        yield from self._read_settling()
        before = self.prompts.rest_of(turns[-1].exchange) if turns else None
        encoded = self.prompts.encode_again(exchanges, before, self._notify)
        sizes = (len(e.closing_ids) + len(e.ids) for e in encoded.values())
        told = cumulative(progress, len(self.prompts.pinned) + sum(sizes))
        for number, exchange in encoded.items():
            turn = self._place(exchange, number, len(exchange.ids))
            self.number = number
            self.evictor.state = Idle((*self.evictor.state.turns, turn), settling=True)
            yield from self._read_settling(told)

    def renumber(self) -> None:
        """Number the turns that are attended from 1 on, as if nothing had been said before."""
        turns = enumerate(self._settle(), 1)
        turns = tuple(replace(turn, number=number) for number, turn in turns)
        self.evictor.state, self.number = replace(self.evictor.state, turns=turns), len(turns)
        self.unanswered = ""

    def record_turns(self) -> None:
        """Have every turn that is attended written down, with the ids it is attended with."""
        exchanges = {turn.number: turn.exchange for turn in self._settle()}
        self._record(ChangeKind.STAND, self.number, exchanges)

    def conversation_state(self) -> ConversationState:
        """Return what `resume` needs beside the exchanges and the stream's state."""
        places = tuple((turn.number, turn.start) for turn in self._settle())
        count = self.number - bool(self.unanswered)
        return ConversationState(count, places, self.sampler.state())

    def resume(self, state: ConversationState, exchanges: Mapping[int, Exchange]) -> None:
        """Stand where `state` says; the stream has been restored already.

        Args:
            exchanges: those of `state.places`, by number.

        Raises:
            ValueRefused: the stream does not attend to them.
        """
        turns = tuple(PlacedTurn(exchanges[number], number, at) for number, at in state.places)
        self.evictor.check(turns, self.prompts.pinned, self.tokens.ids.attended())
        if not all(self.prompts.accepts(turn.exchange.reply_ids) for turn in turns):
            raise ValueRefused("a reply holds what no reply can hold")
        self.sampler.restore(state.sampler)
        self.number = state.turns
        self.evictor.state = Idle(turns, settling=is_unsettled(turns, self.tokens.length))
        self.evictor.mark_reported()
        self._count()

    # --- one turn ---

    def _new_reply(
        self, max_tokens: int | None, stop: Sequence[str] | None
    ) -> tuple[int, ReplyDecoder]:
        limit = self.max_tokens if max_tokens is None else check_max_tokens(max_tokens)
        stops = self.stop if stop is None else stop
        return limit, ReplyDecoder(self.model.tokenizer.decoder(), stops)

    def _turn_steps(
        self, begin: Begin, reply: ReplyDecoder, limit: int, progress: Progress | None
    ) -> Coroutine[Piece, None]:
        if self.tokens.failed:
            self._notify("what is attended is read again: a step of the reply before failed")
            yield from self.restart_steps(self.system, self.stats.window)
        self._settle()
        yield from self._read_settling()
        turn = begin()
        yield from self._read_settling(before=turn.start)
        turns = tuple(t for t in self.evictor.state.turns if t.number != turn.number)
        self.number, self.unanswered = turn.number, ""
        self.evictor.state = ActiveTurn(turns, turn, reply, turns)
        prompt = unread_ids(self.prompts.pinned, (*turns, turn), self.tokens.length)
        writer = write_reply(
            self.writer,
            prompt,
            self.sampler,
            limit,
            self.prompts.end_ids,
            reply,
            self.stats,
            self.evictor.make_room,
            cumulative(progress, len(prompt)),
        )
        result = None
        try:
            while self.evictor.state.reply is reply:  # else the next turn has settled this one
                result = yield writer.send(result)
        except StopIteration as end:
            yield self._last_piece(end.value)
        finally:
            writer.close()
            if self.evictor.state.reply is reply:
                self._settle()
        yield from self._read_settling()

    def _ask(self, question: str, limit: int, number: int | None = None) -> PlacedTurn:
        """Make room for a question and its reply; return where it will stand."""
        number, turns = number or self.number + 1, self.evictor.state.turns
        rest = self.prompts.rest_of(turns[-1].exchange) if turns else None
        closing, ids = self.prompts.question(question, rest, number == 1)
        if len(ids) > self.cache.geometry.window:
            self._notify(
                f"this turn of {len(ids):,} tokens is longer than the window of "
                f"{self.cache.geometry.window:,}: it is read in full, and only its end is attended"
            )
        exchange = Exchange(question, "", closing, ids, ())
        turn = self._place(exchange, number, len(ids) + min(limit, self.cache.geometry.window // 4))
        self.number, self.unanswered = number, question
        with suppress(SessionError):  # told when the turn has ended, if it still cannot be written
            self._record(ChangeKind.ASK, number, {number: turn.exchange})
        return turn

    def _ask_again(self, limit: int) -> PlacedTurn:
        """Return the last turn without its reply; of its question, one token at least is unread."""
        if self.unanswered:
            return self._ask(self.unanswered, limit, self.number)
        turns = self._turns_or_refuse("answered again")
        question = turns[-1].exchange.question_ids
        if not take_back(self.tokens, self.cache, turns[-1].start, question, left=1):
            turns = place_again(self.tokens, self.cache, turns, len(self.prompts.pinned))
            self.evictor.become_idle(Idle(turns, settling=True))
        blank = replace(turns[-1].exchange, reply="", reply_ids=(), rest="", settled_ids=None)
        return replace(turns[-1], exchange=blank)

    def _place(self, exchange: Exchange, number: int, count: int) -> PlacedTurn:
        """Make room for `count` tokens of a turn that is read next; return where it will stand."""
        pinned, turns = self.prompts.pinned, self.evictor.state.turns
        waiting = len(unread_ids(pinned, turns, self.tokens.length)) + len(exchange.closing_ids)
        self.evictor.make_room(waiting + count)
        if turns := self.evictor.state.turns:
            return PlacedTurn(exchange, number, turns[-1].end + len(exchange.closing_ids))
        # The turn before has left, or there was none: there is nothing to close.
        start = max(self.tokens.length, len(pinned))
        return PlacedTurn(replace(exchange, closing_ids=()), number, start)

    def _take_back_last(self) -> Exchange:
        """Take the last turn back and return it; it is not recorded yet."""
        if self.unanswered:
            taken = Exchange(self.unanswered, "", (), (), (), finish="interrupted")
            self.number, self.unanswered = self.number - 1, ""
            return taken
        *turns, last = self._turns_or_refuse("taken back")
        if take_back(self.tokens, self.cache, turns[-1].end if turns else last.start, ()):
            self.evictor.state = replace(self.evictor.state, turns=tuple(turns))
        elif last.start < self.cache.geometry.sinks:  # the sinks hold something of it
            self._begin(self.system, self.stats.window)
        else:
            empty_ring(self.tokens, self.cache)
            self.evictor.state = Idle(tuple(turns))
        self.number = last.number - 1
        self._count()
        return last.exchange

    def _turns_or_refuse(self, what: str) -> tuple[PlacedTurn, ...]:
        turns = self._settle()
        if not turns:
            gone = self.stats.evicted_exchanges
            said = "all that was said has left attention:" if gone else "nothing was said yet:"
            raise ValueRefused(f"{said} there is nothing that could be {what}")
        return turns

    def _settle(self) -> tuple[PlacedTurn, ...]:
        """End a turn that is going on; return the turns that are attended.

        The stream is led to hold what the template renders of them, and nothing else; what is
        missing is read later. The turn may have been interrupted anywhere, and an interrupt in here
        is made good by the next call: nothing is done twice.
        """
        state = self.evictor.state
        if isinstance(state, Idle):
            return state.turns
        if self.tokens.lookahead:  # guesses that were right, but not asked for: as if never made
            self.tokens.rewind(self.tokens.lookahead)
        turn, kind = state.finish(trim=self.template.trims), ChangeKind.ANSWER
        try:
            exchange = self.prompts.settle(turn.exchange, turn.number == 1)
            turn = replace(turn, exchange=exchange)
            turns, start, wanted = (*state.turns, turn), turn.start, exchange.ids
        except TemplateError as error:
            self._notify(f"the question is taken back, its reply cannot be kept: {one_line(error)}")
            turns, kind, wanted = state.turns, ChangeKind.UNDO, ()
            start = turns[-1].end if turns else turn.start
        if take_back(self.tokens, self.cache, start, wanted):
            idle = Idle(turns, is_unsettled(turns, self.tokens.length))
        elif kind is ChangeKind.UNDO and start < self.cache.geometry.sinks:
            self._begin(self.system, self.stats.window)  # the sinks hold something of it
            idle = Idle()
        else:
            again = (*state.before, *turns[len(state.turns) :])
            idle = Idle(
                place_again(self.tokens, self.cache, again, len(self.prompts.pinned)), settling=True
            )
        said = {turn.number: turn.exchange} if kind is ChangeKind.ANSWER else {}
        self._note(kind, turn.number, said, idle.turns)
        if kind is ChangeKind.UNDO:
            self.number = turn.number - 1
        self.evictor.become_idle(idle)
        try:
            if self.recorder:
                self.recorder.flush()
        finally:
            self._count()
        return self.evictor.state.turns

    def _read_settling(
        self, progress: Callable[[int], None] | None = None, before: int | None = None
    ) -> Coroutine[Piece, None]:
        """Read what is to be read apart from a question; of a place and what follows, nothing."""
        state = self.evictor.state
        if not (isinstance(state, Idle) and state.settling):
            return
        ids = unread_ids(self.prompts.pinned, state.turns, self.tokens.length)
        if before is not None:
            ids = ids[: max(0, before - self.tokens.length)]
        if ids:
            self.evictor.make_room(len(ids), keep=1)
            yield from read_ids(self.tokens, ids, progress=progress)
            self.stats.settled += len(ids)
        if before is None:
            self.evictor.state = replace(self.evictor.state, settling=False)
        self._count()

    # --- the stream, and what is said about it ---

    def _begin(self, system: str | None, window: int | None) -> None:
        """Allocate the stream; read nothing yet."""
        prompts = PromptBuilder(self.model.tokenizer, self.template, system, self.pin)
        pinned = len(prompts.pinned)
        sinks = self.model.sinks_for(pinned, self.sinks, window)
        self.writer = self._writer_factory(sinks, window, self._notify)
        self.tokens, self.cache = self.writer.tokens, self.writer.cache
        self.prompts, geometry = prompts, self.cache.geometry
        self.evictor = TurnEvictor(self.cache, whole=self.evict == "turn")
        self.stats.sinks, self.stats.window = geometry.sinks, geometry.window
        self.stats.pinned, self.stats.cache_bytes = pinned, self.cache.nbytes
        self._count()

    def _last_piece(self, piece: Piece) -> Piece:
        exchanges, tokens = self.evictor.evicted_since_report()
        return Piece(piece.text, piece.finish, self.cache.attended, exchanges, tokens)

    def _count(self, asked: bool = False) -> None:
        """Bring the statistics up to date, and say what has left, unless it was `asked` for."""
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

    def _note(
        self,
        kind: ChangeKind,
        number: int,
        exchanges: Mapping[int, Exchange],
        turns: Sequence[PlacedTurn],
    ) -> None:
        if self.recorder:
            # Of a question no token is attended yet, but it is going to be.
            asked = kind is not ChangeKind.STAND or bool(self.unanswered)
            first = turns[0].number if turns else number + (not asked)
            sampler, window = self.sampler.state(), self.stats.window
            change = Change(kind, number, exchanges, first, sampler, self.system, window)
            self.recorder.record(change)

    def _record(
        self, kind: ChangeKind, number: int, exchanges: Mapping[int, Exchange] | None = None
    ) -> None:
        """Have a change written down that is no turn's end."""
        self._note(kind, number, exchanges or {}, self.evictor.state.turns)
        if self.recorder:
            self.recorder.flush()

    def _notify(self, notice: str) -> None:
        self.stats.add_notices(notice)
        self._on_notice(notice)


def is_unsettled(turns: Sequence[PlacedTurn], length: int) -> bool:
    """Return whether a stream has more to read of turns than the end of an answer as it was."""
    if not turns:
        return False
    last = turns[-1]
    read = last.exchange.settled_ids is None and last.start <= length
    return last.end > length and not read
