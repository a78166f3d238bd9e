"""A conversation on one stream, which reads only the new tokens of a turn; independent of files.

The beginning (a system prompt) is pinned: it is the stream's sinks. To make room, the oldest turns
are evicted whole, so that the stream always attends to a conversation that the model's template
would render. However a reply ends (end token, limit, stop string, Ctrl-C, a closed generator), the
stream then holds its final text and nothing else. Retry, undo and edit move the end of the ring
back instead of reading it again.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from typing import ParamSpec

from mlx_stream.chat.eviction import ActiveTurn, Idle, TurnEvictor
from mlx_stream.chat.exchange import ConversationState, Exchange, PlacedTurn, ids_of, unread_ids
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
from mlx_stream.text.template.chat_template import ChatTemplate

DEFAULT_MAX_TOKENS = 512
Progress = Callable[[int, int], None]
Pieces = Generator[Piece, None, None]
Begin = Callable[[], PlacedTurn]
P = ParamSpec("P")


def driven(steps: Callable[P, Coroutine[Piece, None]]) -> Callable[P, Pieces]:
    """Return a method that drives the coroutine of another method."""

    @wraps(steps)
    def drive_steps(*args: P.args, **kwargs: P.kwargs) -> Pieces:
        return drive(steps(*args, **kwargs))

    drive_steps.__name__ = steps.__name__.removesuffix("_steps")
    return drive_steps


class ChatSession:
    """Talk with a model for any length of time in the memory of one window.

    `reply`, `retry` and `edit` are generators of pieces; closing one stops the reply. Each has a
    coroutine (`reply_steps`, ...) with the same arguments, for programs that run several
    conversations and drive the requests themselves.

    Args:
        model: from `mlx_stream.load`.
        system: the system prompt. It is always attended and comes on top of the window: its tokens
            are the stream's sinks, at least `sinks` of them.
        window, sinks, kv_bits: see `Model.new_cache`.
        sampling: how tokens are chosen.
        max_tokens: default limit of a reply.
        stop: strings that end a reply.
        notify: called with notices for the user, one line each, such as a reduced window or a turn
            longer than the window. `stats.notices` has them too.
        evict: what to evict to make room: the oldest turns, each whole ("turn"), or the oldest
            tokens, one by one ("token").
        pin: False lets the system prompt be evicted like other text, for comparison.
        on_evict: called after a turn with the numbers of turns and tokens evicted during it.
        template: replaces the model's own template.
        speculate, draft: see `mlx_stream.stream`.
        think: whether a model that can is to think before it answers. Default: as its template has
            it.
        reasoning_effort: how long to think, as a level that the template knows, such as "low".

    Attributes:
        recorder: saves the conversation, if set.
        number: number of the last turn, from 1.
        unanswered: the last question, if the program that asked it ended before the reply did;
            `retry` answers it.

    Raises:
        TemplateError: the model has no chat template, or one that cannot be used on a stream.
        ValueRefused: a value is out of range, or system prompt and window together exceed what the
            model allows.
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
        think: bool | None = None,
        reasoning_effort: str | None = None,
    ):
        template = template or model.tokenizer.template
        if template is None:
            raise TemplateError(f"{model.name} has no chat template: use generate, or a chat model")
        if think is not None or reasoning_effort is not None:
            template = template.thinking_as(think, reasoning_effort)
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
        """The attended exchanges, oldest first. Reading this ends a reply in progress."""
        return [turn.exchange for turn in self._settle()]

    def reply_steps(
        self,
        question: str,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Coroutine[Piece, None]:
        """Read a question and yield the pieces of the reply. The next request closes it.

        Args:
            progress: called while the question is read, with the tokens read and the total.

        Raises:
            ValueRefused: `max_tokens` is below 1, or a stop string is empty.
            TextError: the question is empty.
            SessionError: the recorder could not write the turn; it tries again at the next turn.
        """
        if not question:
            raise TextError("the question is empty")
        limit, reply = self._new_reply(max_tokens, stop)
        return self._turn_steps(lambda: self._ask(question, limit), reply, limit, progress)

    def retry_steps(
        self,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Coroutine[Piece, None]:
        """Answer the last question again; the part of it that is still attended is not read again.

        Raises:
            ValueRefused: as in `reply`, or there is no question.
        """
        limit, reply = self._new_reply(max_tokens, stop)
        if not self.unanswered:
            self._turns_or_refuse("answer again")
        return self._turn_steps(lambda: self._ask_again(limit), reply, limit, progress)

    def edit_steps(
        self,
        question: str,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Coroutine[Piece, None]:
        """Replace the last question and answer the new one; otherwise as `reply`.

        Raises:
            ValueRefused: as in `reply`, or there is no question.
        """
        if not question:
            raise TextError("the question is empty")
        limit, reply = self._new_reply(max_tokens, stop)
        if not self.unanswered:
            self._turns_or_refuse("edit")

        def ask() -> PlacedTurn:
            # Refused before anything is taken back, if the template refuses it.
            self.prompts.question(question, None, self.number == 1)
            self._take_back_last()
            return self._ask(question, limit)

        return self._turn_steps(ask, reply, limit, progress)

    reply, retry, edit = driven(reply_steps), driven(retry_steps), driven(edit_steps)

    def undo(self) -> Exchange:
        """Take the last exchange back and return it; nothing is read again.

        Raises:
            ValueRefused: no exchange is attended.
        """
        self._settle()
        taken = self._take_back_last()
        self._record(ChangeKind.UNDO, self.number + 1)
        return taken

    def clear(self, first: int | None = None) -> None:
        """Evict every turn, or those before number `first`; the pinned beginning stays."""
        self._settle()
        self.unanswered = ""
        while (turns := self.evictor.state.turns) and (first is None or turns[0].number < first):
            self.evictor.evict_oldest()
        self.tokens.ids.restart_observers()
        self._count(silent=True)
        self._record(ChangeKind.STAND, self.number)

    def restart(
        self, system: str | None, window: int | None, progress: Progress | None = None
    ) -> None:
        """Change the system prompt or the window, and read the attended turns again.

        Args:
            progress: called while they are read, with the tokens read and the total.

        Raises:
            TemplateError, ValueRefused, MemoryRefused: as in the constructor; nothing has changed.
        """
        run_coroutine(self.restart_steps(system, window, progress))

    def restart_steps(
        self, system: str | None, window: int | None, progress: Progress | None = None
    ) -> Coroutine[Piece, None]:
        """Restart as a coroutine. If it is closed before its end, nothing has changed."""
        turns, before = self._settle(), dict(vars(self))
        self.stats = replace(self.stats)
        try:
            self._begin(system, window)
            exchanges = self.prompts.encode_again({t.number: t.exchange for t in turns})
            turns = tuple(PlacedTurn(e, number, 0) for number, e in exchanges.items())
            self.evictor.state = Idle(turns)
            self.evictor.become_idle(self._place_again(turns))
            unread = unread_ids(self.prompts.pinned, self.evictor.state.turns, self.tokens.length)
            yield from self._read_settling(cumulative(progress, len(unread)))
        except BaseException:
            vars(self).update(before)
            raise
        self.record_turns()

    def replay_steps(
        self, exchanges: Mapping[int, Exchange], progress: Progress | None = None
    ) -> Coroutine[Piece, None]:
        """Read earlier turns as if they were asked and answered now; a coroutine.

        Args:
            exchanges: in order, by number of the turn.
        """
        turns = self._settle()
        yield from self._read_settling()
        before = self.prompts.rest_of(turns[-1].exchange) if turns else None
        encoded = self.prompts.encode_again(exchanges, before, self._notify)
        sizes = (len(e.closing_ids) + len(e.ids) for e in encoded.values())
        report = cumulative(progress, len(self.prompts.pinned) + sum(sizes))
        for number, exchange in encoded.items():
            turn = self._place(exchange, number, len(exchange.ids))
            self.number = number
            self.evictor.state = Idle((*self.evictor.state.turns, turn))
            yield from self._read_settling(report)

    def renumber(self) -> None:
        """Number the attended turns from 1, as if they were the whole conversation."""
        turns = tuple(replace(turn, number=n) for n, turn in enumerate(self._settle(), 1))
        self.evictor.state, self.number = Idle(turns), len(turns)
        self.unanswered = ""

    def record_turns(self) -> None:
        """Write every attended turn to the recorder, with its present ids."""
        exchanges = {turn.number: turn.exchange for turn in self._settle()}
        self._record(ChangeKind.STAND, self.number, exchanges)

    def conversation_state(self) -> ConversationState:
        """Return the state that `resume` needs, apart from the exchanges and the stream."""
        places = tuple((turn.number, turn.start) for turn in self._settle())
        count = self.number - bool(self.unanswered)
        return ConversationState(count, places, self.sampler.state())

    def resume(self, state: ConversationState, exchanges: Mapping[int, Exchange]) -> None:
        """Continue from a saved state after the stream was restored.

        Args:
            exchanges: the exchanges of `state.places`, by number.

        Raises:
            ValueRefused: the stream does not attend to these exchanges.
        """
        turns = tuple(PlacedTurn(exchanges[number], number, at) for number, at in state.places)
        self.evictor.check(turns, self.prompts.pinned, self.tokens.ids.attended())
        if not all(self.prompts.replies.accepts(turn.exchange.reply_ids) for turn in turns):
            raise ValueRefused("a reply contains a special token")
        self.sampler.restore(state.sampler)
        self.number = state.turns
        self.evictor.state = Idle(turns)
        self.evictor.mark_reported()
        self._count()

    # --- one turn ---

    def _new_reply(
        self, max_tokens: int | None, stop: Sequence[str] | None
    ) -> tuple[int, ReplyDecoder]:
        limit = self.max_tokens if max_tokens is None else check_max_tokens(max_tokens)
        stops = self.stop if stop is None else stop
        thinking = max(1, self.cache.geometry.window // 2)
        return limit, self.prompts.replies.decoder(stops, thinking)

    def _turn_steps(
        self, begin: Begin, reply: ReplyDecoder, limit: int, progress: Progress | None
    ) -> Coroutine[Piece, None]:
        if self.tokens.failed:
            self._notify("the attended turns are read again: a step of the previous reply failed")
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
            self.prompts.replies.end_ids,
            reply,
            self.stats,
            self.evictor.make_room,
            cumulative(progress, len(prompt)),
        )
        result = None
        try:
            while self.evictor.state.reply is reply:  # until the next turn settles this one
                result = yield writer.send(result)
            return
        except StopIteration as end:
            counts = (self.cache.attended, *self.evictor.evicted_since_report())
            yield Piece(end.value.text, end.value.finish, *counts)
        finally:
            writer.close()
            if self.evictor.state.reply is reply:
                self._settle()
        yield from self._read_settling()
        if self.recorder and isinstance(self.evictor.state, Idle):
            self.recorder.checkpoint()

    def _ask(self, question: str, limit: int, number: int | None = None) -> PlacedTurn:
        """Make room for a question and its reply; return the turn at its place."""
        number, turns = number or self.number + 1, self.evictor.state.turns
        rest = self.prompts.rest_of(turns[-1].exchange) if turns else None
        closing, ids = self.prompts.question(question, rest, number == 1)
        if len(ids) > self.cache.geometry.window:
            self._notify(
                f"this turn of {len(ids):,} tokens is longer than the window of "
                f"{self.cache.geometry.window:,}: all of it is read, but only its end is attended"
            )
        exchange = Exchange(question, "", closing, ids, ())
        turn = self._place(exchange, number, len(ids) + min(limit, self.cache.geometry.window // 4))
        self.number, self.unanswered = number, question
        with suppress(SessionError):  # written, or reported, when the turn has ended
            self._record(ChangeKind.ASK, number, {number: turn.exchange})
        return turn

    def _ask_again(self, limit: int) -> PlacedTurn:
        """Take back the last reply, and at least one token of its question; return the turn."""
        if self.unanswered:
            return self._ask(self.unanswered, limit, self.number)
        turns = self._turns_or_refuse("answer again")
        if self.template.settles_late:
            last = self._take_back_last()
            return self._ask(last.question, limit, self.number + 1)
        question = turns[-1].exchange.question_ids
        if not take_back(self.writer, turns[-1].start, question, left=1):
            turns = self._place_again(turns)
            # In this order an interrupt in between loses no turn: `forget` evicts the rest.
            self.evictor.become_idle(turns)
            empty_ring(self.writer)
        asked = turns[-1].exchange
        blank = Exchange(asked.question, "", asked.closing_ids, asked.question_ids, ())
        return replace(turns[-1], exchange=blank)

    def _place(self, exchange: Exchange, number: int, count: int) -> PlacedTurn:
        """Make room for `count` tokens of the next turn; return the turn at its place."""
        pinned, turns = self.prompts.pinned, self.evictor.state.turns
        waiting = len(unread_ids(pinned, turns, self.tokens.length)) + len(exchange.closing_ids)
        self.evictor.make_room(waiting + count)
        if turns := self.evictor.state.turns:
            return PlacedTurn(exchange, number, turns[-1].end + len(exchange.closing_ids))
        # No previous turn is attended, so there is nothing to close.
        return PlacedTurn(replace(exchange, closing_ids=()), number, self._first_place())

    def _place_again(self, turns: Sequence[PlacedTurn]) -> tuple[PlacedTurn, ...]:
        return place_again(turns, self._first_place(), self.cache.geometry.window)

    def _first_place(self) -> int:
        """Return the place of the next turn if no turn is attended before it."""
        return max(self.tokens.length, len(self.prompts.pinned))

    def _take_back_last(self) -> Exchange:
        """Take the last turn back and return it, without recording that."""
        if self.unanswered:
            taken = Exchange(self.unanswered, "", (), (), (), finish="interrupted")
            self.number, self.unanswered = self.number - 1, ""
            return taken
        *turns, last = self._turns_or_refuse("take back")
        start, wanted = turns[-1].end if turns else last.start, ()
        if self.template.settles_late and turns:
            turns[-1] = self._resettled(turns[-1], later=False)
            start, wanted = turns[-1].start, turns[-1].exchange.ids
            self._record(ChangeKind.STAND, last.number, {turns[-1].number: turns[-1].exchange})
        if take_back(self.writer, start, wanted):
            self.evictor.state = Idle(tuple(turns))
        elif last.start < self.cache.geometry.sinks:  # some of it is in the sinks
            self._begin(self.system, self.stats.window)
        else:
            empty_ring(self.writer)
            self.evictor.state = Idle(tuple(turns))
        self.number = last.number - 1
        self._count()
        return last.exchange

    def _resettled(self, turn: PlacedTurn, later: bool) -> PlacedTurn:
        """Return a turn as it is rendered with another one behind it, or as the last one."""
        exchange = self.prompts.settle(turn.exchange, turn.number == 1, later)
        return replace(turn, exchange=exchange)

    def _turns_or_refuse(self, what: str) -> tuple[PlacedTurn, ...]:
        turns = self._settle()
        if not turns:
            reason = "no question has been asked yet"
            if self.stats.evicted_exchanges:
                reason = "all exchanges have been evicted"
            raise ValueRefused(f"there is nothing to {what}: {reason}")
        return turns

    def _settle(self) -> tuple[PlacedTurn, ...]:
        """End a turn in progress and return the attended turns.

        The stream is taken back to what it has in common with the template's text; the rest is read
        later. The turn may have been interrupted anywhere, and so may this method: the next call
        finishes the work, and nothing is done twice.
        """
        state = self.evictor.state
        if isinstance(state, Idle):
            return state.turns
        if self.tokens.lookahead:  # these are right guesses that were not asked for
            self.tokens.rewind(self.tokens.lookahead)
        turn, turns, refusal = state.finish(trim=self.template.trims), state.turns, ""
        before = state.before
        try:
            exchange = self.prompts.settle(turn.exchange, turn.number == 1)
            changed = {turn.number: exchange}
            if self.template.settles_late and before:
                before = (*before[:-1], self._resettled(before[-1], later=True))
                turns = before[len(before) - len(turns) :]
                older = before[-1]
                rest = self.prompts.rest_of(older.exchange)
                closing, asked = self.prompts.question(exchange.question, rest, first=False)
                exchange = replace(exchange, question_ids=asked)
                if turns:
                    exchange = replace(exchange, closing_ids=closing)
                    turn = replace(turn, start=older.end + len(closing))
                changed = {older.number: older.exchange, turn.number: exchange}
            kind, settled = ChangeKind.ANSWER, replace(turn, exchange=exchange)
            start, wanted = settled.start, exchange.ids
            if turns and before[-1] != state.before[-1]:
                start, wanted = turns[-1].start, ids_of((turns[-1], settled))
            turns = (*turns, settled)
        except TemplateError as error:
            refusal = f"the last question is taken back with its reply: {one_line(error)}"
            kind, changed = ChangeKind.UNDO, {}
            start, wanted = turns[-1].end if turns else turn.start, ()
        if not take_back(self.writer, start, wanted):
            if refusal and start < self.cache.geometry.sinks:  # some of it is in the sinks
                self._begin(self.system, self.stats.window)
                turns = ()
            else:
                empty_ring(self.writer)
                turns = self._place_again((*before, *turns[len(state.turns) :]))
        self._record(kind, turn.number, changed, turns)
        if refusal:
            self.number = turn.number - 1
        self.evictor.become_idle(turns)
        try:
            if self.recorder:
                self.recorder.flush()
        finally:
            if refusal:  # only now, because a notice may raise
                self._notify(refusal)
            self._count()
        return self.evictor.state.turns

    def _read_settling(
        self, progress: Callable[[int], None] | None = None, before: int | None = None
    ) -> Coroutine[Piece, None]:
        """Read what the stream is missing of its turns, up to the place `before`."""
        state = self.evictor.state
        if not (isinstance(state, Idle) and is_unsettled(state.turns, self.tokens.length)):
            return
        ids = unread_ids(self.prompts.pinned, state.turns, self.tokens.length)
        if before is not None:
            ids = ids[: max(0, before - self.tokens.length)]
        if ids:
            self.evictor.make_room(len(ids), keep=1)
            yield from read_ids(self.tokens, ids, progress=progress)
            self.stats.settled += len(ids)
        self._count()

    # --- the stream, its statistics and the recorder ---

    def _begin(self, system: str | None, window: int | None) -> None:
        """Allocate the stream without reading anything."""
        prompts = PromptBuilder(self.model.tokenizer, self.template, system, self.pin)
        pinned = len(prompts.pinned)
        if window is None and self.template.style:
            window = self.model.thinking_window(max(self.sinks, pinned), self.kv_bits)
        sinks = self.model.sinks_for(pinned, self.sinks, window)
        self.writer = self._writer_factory(sinks, window, self._notify)
        self.tokens, self.cache = self.writer.tokens, self.writer.cache
        self.prompts, geometry = prompts, self.cache.geometry
        self.evictor = TurnEvictor(self.cache, whole=self.evict == "turn")
        self.stats.sinks, self.stats.window = geometry.sinks, geometry.window
        self.stats.pinned, self.stats.cache_bytes = pinned, self.cache.nbytes
        if pinned > geometry.window:
            self._notify(
                f"the system prompt of {pinned:,} tokens is longer than the window of "
                f"{geometry.window:,}, and is attended in addition to it"
            )
        self._count()

    def _count(self, silent: bool = False) -> None:
        """Update the statistics and report evictions, without a notice if `silent`."""
        self.stats.attended, self.stats.evicted = self.cache.attended, self.cache.evicted
        self.evictor.forget()
        exchanges, tokens = self.evictor.evicted_since_report()
        self.evictor.mark_reported()
        self.stats.evicted_exchanges += exchanges
        if tokens > 0 and not silent and not self._eviction_reported:
            self._eviction_reported = True
            self._notify(eviction_notice(self.stats.window))
        if self.on_evict and (exchanges or tokens > 0):
            self.on_evict(exchanges, tokens)

    def _record(
        self,
        kind: ChangeKind,
        number: int,
        exchanges: Mapping[int, Exchange] | None = None,
        turns: Sequence[PlacedTurn] | None = None,
    ) -> None:
        """Report a change to the recorder.

        Args:
            turns: the turns that will be attended after it; the caller then flushes the recorder
                when they are. Default: those attended now, and the change is written at once.
        """
        if not self.recorder:
            return
        attended = self.evictor.state.turns if turns is None else turns
        # A question counts as attended as soon as it is asked.
        counts = kind is not ChangeKind.STAND or bool(self.unanswered)
        first = attended[0].number if attended else number + (not counts)
        sampler, window = self.sampler.state(), self.stats.window
        change = Change(kind, number, exchanges or {}, first, sampler, self.system, window)
        self.recorder.record(change)
        if turns is None:
            self.recorder.flush()

    def _notify(self, notice: str) -> None:
        self.stats.add_notices(notice)
        self._on_notice(notice)


def is_unsettled(turns: Sequence[PlacedTurn], length: int) -> bool:
    """Return whether a stream must read some of its turns before the next question.

    The end of a reply that the template leaves as it was is read with the next question.

    Args:
        length: how many tokens the stream has read.
    """
    if not turns:
        return False
    last = turns[-1]
    waits = last.exchange.settled_ids is None and last.start < length
    return last.end > length and not waits
