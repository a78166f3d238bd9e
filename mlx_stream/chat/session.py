"""A conversation on one stream that reads only each turn's new tokens; independent of files.

The beginning (a system prompt) is pinned: its tokens are the stream's sinks. To make room, the
oldest turns are evicted whole, so that the stream always attends to a conversation that the model's
template would render. However a reply ends (end token, limit, stop string, Ctrl-C, a closed
generator), the stream then holds its final text and nothing more. Retry, undo and edit roll back
the end of the ring instead of rereading the conversation.
"""

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Unpack

from mlx_stream.chat.eviction import ActiveTurn, Idle, TurnEvictor
from mlx_stream.chat.exchange import (
    ConversationState,
    Exchange,
    PlacedTurn,
    ids_of,
    place_turns,
    plural,
    question_of,
    unread_ids,
)
from mlx_stream.chat.history import exchanges_of, newest_turns
from mlx_stream.chat.messages import Message, Question, answering, turn_of_messages
from mlx_stream.chat.prompts import LONG_HEAD, PromptBuilder, long_head_notice
from mlx_stream.chat.recorder import Change, ChangeKind, Recorder
from mlx_stream.chat.settle import empty_ring, place_again, take_back
from mlx_stream.errors import SessionError, TemplateError, ValueRefused, one_line
from mlx_stream.errors.argument_types import check_arguments
from mlx_stream.generate.model import Model
from mlx_stream.generate.prefix_cache import PrefixCache
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import Coroutine, driven, read_ids, run_coroutine
from mlx_stream.generate.speculative import writer_factory
from mlx_stream.generate.stats import Stats, cumulative, eviction_notice
from mlx_stream.generate.token_stream import check_max_tokens
from mlx_stream.program.notices import Notify, discard
from mlx_stream.recall.quote import Passage, RecallStore, choose_passages, quote
from mlx_stream.sampling import ReplyOptions, Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder, StopMatcher
from mlx_stream.text.template.chat_template import ChatTemplate

DEFAULT_MAX_TOKENS = 512
# The minimum number of tokens that recall keeps free by default.
LEAST_RECALL = 64
Progress = Callable[[int, int], None]
Pieces = Generator[Piece, None, None]
Begin = Callable[[], PlacedTurn]


class ChatSession:
    """Chat with a model for any length of time, using the memory of a single window.

    `reply`, `retry` and `edit` are generators of pieces; closing one stops the reply. Each has a
    coroutine (`reply_steps`, ...) with the same arguments, for programs that run several
    conversations and drive the requests themselves.

    It has more methods than other classes because each of them keeps turns, stream and recorder
    consistent, wherever it is interrupted; no other object may change any of the three.

    Args:
        model: from `mlx_stream.load`.
        system: the system prompt. It is always attended to and does not take up space in the
            window: its tokens are the stream's sinks, of which there are at least `sinks`.
        window, sinks, kv_bits: see `Model.new_cache`.
        sampling: how tokens are chosen.
        max_tokens: default limit on the length of a reply.
        stop: strings that end a reply.
        notify: called with notices for the user, one line each, for example about a reduced window
            or a turn longer than the window. They are also in `stats.notices`.
        evict: what to evict to make room: whole turns ("turn") or single tokens ("token"), oldest
            first.
        pin: False lets the system prompt be evicted like other text, for comparison.
        on_evict: called after a turn with the numbers of turns and tokens evicted during it.
        template: replaces the model's own template.
        speculate, draft: see `mlx_stream.stream`.
        think: whether the model should think before it answers, if it can. Default: as the
            template decides.
        reasoning_effort: how much to think: a level that the template supports, such as "low".
        tools: functions that the model may call, each a JSON schema in the format of OpenAI's API.
            They are pinned with the system prompt. An exchange whose reply calls tools has `calls`;
            the next turn is a `Message` of role `tool` with the result of each.
        history: earlier messages, ending with a reply. The newest turns that fit the window are
            read with the next question. Older ones are not read and count as evicted.
        prefixes: stores the rows of the pinned beginning, for sessions that share it.
        recall: finds exchanges that have left the window. Those that are likely to answer a
            question are quoted before it, and the quotation is rolled back after the reply.
        recall_tokens: how many tokens of the window are kept free for a quotation; 0 for none.
            Default: an eighth of the window, but at least 64; 0 if that is more than a quarter of
            it.

    Attributes:
        recorder: saves the conversation, if set.
        number: number of the last turn, counting from 1.
        recall_from: number of the oldest turn that may be recalled.
        recalled: the exchanges quoted before the last question.
        pending: the last question, if the program that asked it exited before the reply was
            complete; `retry` answers it.

    Raises:
        TemplateError: the model has no chat template, or one that cannot be used with a stream.
        ValueRefused: a value is out of range, or the system prompt and window together exceed what
            the model allows.
    """

    @check_arguments
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
        tools: Sequence[Mapping[str, Any]] = (),
        history: Sequence[Message] = (),
        prefixes: PrefixCache | None = None,
        recall: RecallStore | None = None,
        recall_tokens: int | None = None,
    ):
        template = template or model.tokenizer.template
        if template is None:
            raise TemplateError(f"{model.name} has no chat template: use generate, or a chat model")
        if think is not None or reasoning_effort is not None:
            template = template.with_options(think, reasoning_effort)
        if evict not in ("turn", "token"):
            raise ValueRefused(f"`evict` must be turn or token, not {evict!r}")
        self.model, self.template, self.tools = model, template, tools
        self.max_tokens, self.stop = check_max_tokens(max_tokens), StopMatcher(stop).stops
        self.evict, self.pin, self.on_evict = evict, pin, on_evict
        self.sinks, self.kv_bits = model.resolve_window(sinks, None)[0], kv_bits
        self._prefixes = prefixes
        self.recorder: Recorder | None = None
        self.number = 0
        self.pending: Exchange | None = None
        self.recall, self._recall_asked = recall, recall_tokens
        self.recall_from, self.recalled, self._recalled_for = 1, (), (0, "")
        self._writer_factory = writer_factory(model, speculate, draft, kv_bits, sampling)
        self.sampler = Sampler(sampling or Sampling())
        self.stats = Stats(seed=self.sampler.sampling.seed or 0)
        self._on_notice, self._eviction_reported = notify, False
        self._guessing, self._settled_before = (speculate, draft), 0
        self._begin(system, window)
        if history:
            self.follow(history)

    def __repr__(self) -> str:
        attended = len(self.evictor.state.turns)
        return f"ChatSession({self.model.name!r}: {plural(attended)} attended; {self.stats})"

    @property
    def system(self) -> str | None:
        return self.prompts.system

    @property
    def unanswered(self) -> str:
        """The text of the pending question; "" if there is none."""
        return self.pending.question if self.pending else ""

    @property
    def exchanges(self) -> list[Exchange]:
        """The attended exchanges, oldest first. Accessing this ends a reply in progress."""
        return [turn.exchange for turn in self._settle()]

    def reply_steps(
        self,
        question: Question,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
        **options: Unpack[ReplyOptions],
    ) -> Coroutine[Piece, None]:
        """Read a question and yield the pieces of the reply. The next request ends the reply.

        Args:
            question: a text, or the messages of a turn: user messages, further system messages, or
                the results of the tools that the last reply called. A final assistant message is
                the beginning of the reply; the pieces continue it.
            progress: called with the tokens read and the total, first while earlier turns are being
                read, if necessary, and then while the question is.
            options: see `ReplyOptions`.

        Raises:
            ValueRefused: `max_tokens` is below 1, a stop string is empty, or an option is out of
                range.
            TextError: the question is empty, or a text is not valid Unicode.
            TemplateError: the template does not allow these messages.
            SessionError: the recorder could not write the turn; it will try again on the next turn.
        """
        messages, begin = turn_of_messages(question)
        limit, reply = self._new_reply(max_tokens, stop, begin)
        room = limit + reply.count
        sampler = self.sampler.for_reply(self.model.config.vocab_size, options)
        return self._turn_steps(lambda: self._ask(messages, room), reply, limit, progress, sampler)

    def retry_steps(
        self,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
        **options: Unpack[ReplyOptions],
    ) -> Coroutine[Piece, None]:
        """Answer the last question again without rereading the part of it still in the window.

        Raises:
            ValueRefused: as in `reply`, or there is no question to answer.
        """
        limit, reply = self._new_reply(max_tokens, stop)
        sampler = self.sampler.for_reply(self.model.config.vocab_size, options)
        if not self.pending:
            self._turns_or_refuse("answer again")
        return self._turn_steps(lambda: self._ask_again(limit), reply, limit, progress, sampler)

    def edit_steps(
        self,
        question: Question,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        progress: Progress | None = None,
        **options: Unpack[ReplyOptions],
    ) -> Coroutine[Piece, None]:
        """Replace the last question and answer the new one; otherwise like `reply`.

        Raises:
            ValueRefused: as in `reply`, or there is no question to replace.
        """
        messages, begin = turn_of_messages(question)
        limit, reply = self._new_reply(max_tokens, stop, begin)
        sampler = self.sampler.for_reply(self.model.config.vocab_size, options)
        if not self.pending:
            self._turns_or_refuse("edit")

        def ask() -> PlacedTurn:
            # If the template refuses the question, it does so before anything is rolled back.
            turns = self.evictor.state.turns[: None if self.pending else -1]
            found = self._answering(messages, turns)
            self.prompts.question(found, None, self.number == 1)
            self._take_back_last()
            return self._ask(messages, limit + reply.count)

        return self._turn_steps(ask, reply, limit, progress, sampler)

    reply, retry, edit = driven(reply_steps), driven(retry_steps), driven(edit_steps)

    def undo(self) -> Exchange:
        """Undo the last exchange and return it; nothing is reread.

        Raises:
            ValueRefused: there is no exchange in the window.
        """
        self._settle()
        taken = self._take_back_last()
        self.forget_recalled()
        self._record(ChangeKind.UNDO, self.number + 1)
        return taken

    def fork(
        self, back: int = 0, model: Model | None = None, notify: Notify = discard
    ) -> "ChatSession":
        """Return a new session that continues from a copy of this one's state; nothing is read.

        It has its own ring, is not saved and recalls nothing. Tokens that have left this window are
        not copied, so undoing in the copy does not bring them back.

        Args:
            back: how many of the last exchanges to undo in the new session.
            model: the same model, with a different check on the memory of its streams.

        Raises:
            ValueRefused: fewer than `back` exchanges are in the window.
            MemoryRefused: the second ring exceeds the budget.
        """
        turns = self._settle()
        if not 0 <= back <= len(turns) + bool(self.pending):
            raise ValueRefused(f"cannot undo {plural(back)}: the window holds {len(turns):,}")
        found = copy.copy(self)
        found.model, found.recorder = model or self.model, None
        # The copy may evict different turns from those that this session evicts.
        found.recall, found.recalled, found._recalled_for = None, (), (0, "")
        found.stats, found.on_evict, found._on_notice = replace(self.stats), None, notify
        found.sampler = Sampler(self.sampler.sampling)
        found.sampler.restore(self.sampler.state())
        guessing = *self._guessing, self.kv_bits, self.sampler.sampling
        found._writer_factory = writer_factory(found.model, *guessing)
        found._begin(self.system, self.stats.window)
        if self.tokens.failed:
            found.evictor.state = Idle(found._place_again(turns))
        else:
            found.tokens.restore(self.tokens.state())
            found.evictor.state = Idle(turns)
        found.evictor.mark_reported()
        for _ in range(back):
            found._take_back_last()
        found._count(silent=True)
        return found

    def clear(self, first: int | None = None) -> None:
        """Evict every turn, or those before number `first`; the pinned beginning stays.

        Without `first`, none of the turns so far will be recalled later.
        """
        self._settle()
        self.pending = None
        if first is None:
            self.recall_from = self.number + 1
            self.forget_recalled()
        while (turns := self.evictor.state.turns) and (first is None or turns[0].number < first):
            self.evictor.evict_oldest()
        self.tokens.ids.restart_observers()
        self._count(silent=True)
        self._record(ChangeKind.STAND, self.number)

    def start_recall(self, make: Callable[[Notify], RecallStore]) -> None:
        """Recall exchanges that leave the window from now on, unless `recall_tokens` was 0.

        Args:
            make: returns the store; it is given a function for notices.
        """
        if self.recall or self._recall_asked == 0:
            return
        self._settle()
        self._report_left()  # evicted before there is a store, so these turns are not recalled
        self.recall = make(self._notify)
        self._reserved = self.evictor.reserved = self._reserve(self.cache.geometry.window)

    def follow(self, history: Sequence[Message], unread: int = 0, room: int = 0) -> None:
        """Add earlier turns after the attended ones; they are read with the next question.

        If they do not all fit the window, only the newest that fit are added, and every attended
        turn is evicted. Those left out count as evicted.

        Args:
            history: as in the constructor.
            unread: how many turns before the history are not read at all.
            room: how many tokens of the window are kept free for what follows.

        Raises:
            ValueRefused, TemplateError: as in the constructor.
        """
        turns, after = self._settle(), self.number + unread
        before = turns[-1].exchange if turns else None
        exchanges = exchanges_of(history, after, before.calls if before else ())
        fitting = newest_turns(self.prompts, exchanges, self.cache.geometry.window - room)
        left_out = unread + len(exchanges) - len(fitting)
        if left_out and turns:
            self.clear(after + 1)
            turns = ()
        if turns:
            encoded = self.prompts.encode_again(exchanges, before)
            start = turns[-1].end + len(encoded[after + 1].closing_ids)
            placed = [PlacedTurn(exchange, number, 0) for number, exchange in encoded.items()]
            turns = (*turns, *place_turns(placed, start))
        else:
            turns = place_turns(fitting, self._first_place())
        self.evictor.state, self.number = Idle(turns), after + len(exchanges)
        self.stats.evicted_exchanges += left_out

    def forget_recalled(self) -> None:
        """Forget the last quotation and every id that has left the window."""
        self.recalled, self._recalled_for, self.stats.recalled = (), (0, ""), 0
        self.tokens.ids.restart_observers()

    def restart(
        self, system: str | None, window: int | None, progress: Progress | None = None
    ) -> None:
        """Change the system prompt or the window, and reread the attended turns.

        Args:
            progress: called while the turns are being read, with the tokens read and the total.

        Raises:
            TemplateError, ValueRefused, MemoryRefused: as in the constructor; the session is then
                unchanged.
        """
        run_coroutine(self.restart_steps(system, window, progress))

    def restart_steps(
        self, system: str | None, window: int | None, progress: Progress | None = None
    ) -> Coroutine[Piece, None]:
        """Restart, as a coroutine. If it is closed early, the session is unchanged."""
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
        """Read earlier turns as if they were being asked and answered now; a coroutine.

        Args:
            exchanges: by turn number, in order.
        """
        turns = self._settle()
        yield from self._read_settling()
        before = turns[-1].exchange if turns else None
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
        self.pending, self.recall_from = None, 1

    def record_turns(self) -> None:
        """Write every attended turn to the recorder, with its current ids."""
        exchanges = {turn.number: turn.exchange for turn in self._settle()}
        self._record(ChangeKind.STAND, self.number, exchanges)

    def conversation_state(self) -> ConversationState:
        """Return the state that `resume` needs, apart from the exchanges and the stream."""
        places = tuple((turn.number, turn.start) for turn in self._settle())
        count = self.number - bool(self.pending)
        return ConversationState(count, places, self.sampler.state())

    def resume(self, state: ConversationState, exchanges: Mapping[int, Exchange]) -> None:
        """Continue from a saved state once the stream has been restored.

        Args:
            exchanges: the exchanges of `state.places`, by turn number.

        Raises:
            ValueRefused: the stream attends to something other than these exchanges.
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
        self, max_tokens: int | None, stop: Sequence[str] | None, begin: Message | None = None
    ) -> tuple[int, ReplyDecoder]:
        limit = self.max_tokens if max_tokens is None else check_max_tokens(max_tokens)
        stops = self.stop if stop is None else stop
        thinking = max(1, self._room_for_turns // 2)
        reply = self.prompts.replies.decoder(stops, thinking)
        if begin:
            reply.begin_with(self.prompts.beginning(begin.text, begin.thinking))
        return limit, reply

    def _turn_steps(
        self,
        begin: Begin,
        reply: ReplyDecoder,
        limit: int,
        progress: Progress | None,
        sampler: Sampler,
    ) -> Coroutine[Piece, None]:
        if self.tokens.failed:
            self._notify(
                "the attended turns are being read again: a step of the previous reply failed"
            )
            yield from self.restart_steps(self.system, self.stats.window)
        turns = self._settle()
        unread = len(unread_ids(self.prompts.pinned, turns, self.tokens.length))
        yield from self._read_settling(cumulative(progress, unread))
        turn = begin()
        yield from self._read_settling(before=turn.start)
        turns = tuple(t for t in self.evictor.state.turns if t.number != turn.number)
        asked = self._recall(turn, turns)
        self.number, self.pending = turn.number, None
        state = ActiveTurn(turns, asked, reply, turns, turn.exchange.question_ids)
        self.evictor.state = state
        pinned = self.prompts.pinned
        unread = unread_ids(pinned, (*turns, asked), self.tokens.length)
        report, given = cumulative(progress, len(unread) + reply.count), reply.count
        read_before = self.stats.prompt_tokens
        writer, result = None, None
        try:
            self.stats.prompt_tokens += yield from self._read_pinned(report)
            writer = write_reply(
                self.writer,
                (*unread_ids(pinned, (*turns, asked), self.tokens.length), *reply.ids),
                sampler,
                limit,
                self.prompts.replies.end_ids,
                reply,
                self.stats,
                self.evictor.make_room,
                report,
            )
            while self.evictor.state.reply is reply:  # until the next turn settles this one
                result = yield writer.send(result)
            yield Piece("", "superseded")
            return
        except StopIteration as end:
            exchanges, evicted = self.evictor.evicted_since_report()
            settled, self._settled_before = self._settled_before, self.stats.settled
            yield replace(
                end.value,
                attended=self.cache.attended,
                evicted_exchanges=exchanges,
                evicted_tokens=evicted,
                read=self.stats.prompt_tokens - read_before,
                written=reply.count - given,
                thinking_tokens=reply.count - given - reply.answer_count,
                settled=self.stats.settled - settled,
                recalled=self.recalled,
                recalled_tokens=state.quoted,
            )
        finally:
            if writer:
                writer.close()
            if self.evictor.state.reply is reply:
                self._settle()
        yield from self._read_settling(settling=True)
        if self.recorder and isinstance(self.evictor.state, Idle):
            self.recorder.checkpoint()

    def _ask(
        self, messages: Sequence[Message], limit: int, number: int | None = None
    ) -> PlacedTurn:
        """Make room for a turn's messages and the reply; return the turn with its position."""
        number, turns = number or self.number + 1, self.evictor.state.turns
        messages = self._answering(messages, turns)
        previous = turns[-1].exchange if turns else None
        closing, ids = self.prompts.question(messages, previous, number == 1)
        if len(ids) > self.cache.geometry.window:
            self._notify(
                f"this turn of {len(ids):,} tokens is longer than the window of "
                f"{self.cache.geometry.window:,}: all of it is read, but only its end is kept"
            )
        asked = question_of(messages)
        exchange = replace(asked, finish="end", closing_ids=closing, question_ids=ids)
        turn = self._place(exchange, number, len(ids) + min(limit, self._room_for_turns // 4))
        self.number, self.pending = number, asked
        with suppress(SessionError):  # written or reported when the turn ends
            self._record(ChangeKind.ASK, number, {number: turn.exchange})
        return turn

    @staticmethod
    def _answering(messages: Sequence[Message], turns: Sequence[PlacedTurn]) -> tuple[Message, ...]:
        """Return messages that follow the given turns, matched to the last reply's tool calls."""
        return answering(messages, turns[-1].exchange.calls if turns else ())

    def _ask_again(self, limit: int) -> PlacedTurn:
        """Roll back the last reply and at least one token of its question; return the turn."""
        if self.pending:
            return self._ask(self.pending.asked, limit, self.number)
        turns = self._turns_or_refuse("answer again")
        last = turns[-1].exchange
        if self._first_rewritten(turns[:-1], last) < len(turns) - 1:
            self._take_back_last()
            return self._ask(last.asked, limit, self.number + 1)
        if not take_back(self.writer, turns[-1].start, last.question_ids, left=1):
            turns = self._place_again(turns)
            # In this order, an interrupt between the two loses no turn: `forget` evicts the rest.
            self.evictor.become_idle(turns)
            empty_ring(self.writer)
        last = turns[-1].exchange
        blank = replace(last.unread, closing_ids=last.closing_ids, question_ids=last.question_ids)
        return replace(turns[-1], exchange=replace(blank, finish="end"))

    def _place(self, exchange: Exchange, number: int, count: int) -> PlacedTurn:
        """Make room for `count` tokens of the next turn; return the turn with its position."""
        pinned, turns = self.prompts.pinned, self.evictor.state.turns
        waiting = len(unread_ids(pinned, turns, self.tokens.length)) + len(exchange.closing_ids)
        self.evictor.make_room(waiting + count)
        if turns := self.evictor.state.turns:
            return PlacedTurn(exchange, number, turns[-1].end + len(exchange.closing_ids))
        # No previous turn is in the window, so there is nothing to close.
        return PlacedTurn(replace(exchange, closing_ids=()), number, self._first_place())

    def _recall(self, turn: PlacedTurn, before: Sequence[PlacedTurn]) -> PlacedTurn:
        """Return a turn with a quotation of earlier exchanges that answer its question, if any.

        A question that is answered again gets the same quotation.
        """
        self._report_left()
        question, ids, first = turn.exchange.question, turn.exchange.question_ids, turn.number
        if before:
            first = before[0].number
        passages: Sequence[Passage] = self.recalled
        if self._recalled_for != (turn.number, question):
            passages = ()
            # A turn that begins in the sinks cannot be rolled back, and a turn that fills the
            # window would lose its quotation.
            fits = turn.start >= self.cache.geometry.sinks and len(ids) <= self._room_for_turns
            fits = fits and not turn.exchange.messages  # a plain question
            if self.recall and self._reserved and fits and self.recall_from < first:
                previous = before[-1].exchange.question if before else ""
                found = self.recall.find(question, previous, self.recall_from, first)
                passages = choose_passages(found, self._reserved, self._count_quoted(turn, before))
        self.recalled, self._recalled_for = tuple(passages), (turn.number, question)
        self.stats.recalled = len(passages)
        if not passages:
            return turn
        quoted = self._question_ids(quote(passages, question), before)
        # If this question was read before, it was read without the quotation.
        if not take_back(self.writer, turn.start, quoted, left=1):
            self.recalled, self.stats.recalled = (), 0
            return turn
        return replace(turn, exchange=replace(turn.exchange, question_ids=quoted))

    def _question_ids(self, question: str, before: Sequence[PlacedTurn]) -> tuple[int, ...]:
        """Return the ids of a question that follows the given turns."""
        previous = before[-1].exchange if before else None
        return self.prompts.question(question, previous, first=False)[1]

    def _count_quoted(self, turn: PlacedTurn, before: Sequence[PlacedTurn]) -> Callable[[str], int]:
        """Return a function that counts the tokens that a text adds before a turn's question."""
        plain = len(turn.exchange.question_ids)

        def count(text: str) -> int:
            return len(self._question_ids(text + turn.exchange.question, before)) - plain

        return count

    def _report_left(self) -> None:
        """Pass the turns that have left the window to the recall store."""
        left, self.evictor.left = self.evictor.left, []
        if store := self.recall:
            for turn in left:
                store.leave(turn.number, turn.exchange.question, turn.exchange.reply)

    def _place_again(self, turns: Sequence[PlacedTurn]) -> tuple[PlacedTurn, ...]:
        return place_again(turns, self._first_place(), self._room_for_turns)

    @property
    def _room_for_turns(self) -> int:
        """The tokens of the window, minus those that are kept free for a quotation."""
        return self.cache.geometry.window - self._reserved

    def _first_place(self) -> int:
        """Return the position of the next turn if no earlier turn is in the window."""
        return max(self.tokens.length, len(self.prompts.pinned))

    def _take_back_last(self) -> Exchange:
        """Remove the last turn and return it, without recording the change."""
        if taken := self.pending:
            self.number, self.pending = self.number - 1, None
            return taken
        *turns, last = self._turns_or_refuse("take back")
        start, wanted = turns[-1].end if turns else last.start, ()
        if (first := self._first_rewritten(turns, last.exchange)) < len(turns):
            turns[first:] = place_turns(self._rewritten(turns[first:], False), turns[first].start)
            start, wanted = turns[first].start, ids_of(turns[first:])
            changed = {turn.number: turn.exchange for turn in turns[first:]}
            self._record(ChangeKind.STAND, last.number, changed)
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

    def _first_rewritten(self, turns: Sequence[PlacedTurn], last: Exchange) -> int:
        """Return the index of the first turn that is rendered differently once `last` follows.

        From there on, the turns belong to a chain of tool calls that `last` ends; for some
        templates, the turn before the chain is included.
        """
        first, follows = len(turns), last
        while first and follows.answers_calls and not last.calls:
            first -= 1
            follows = turns[first].exchange
        return max(0, first - 1) if self.prompts.template.settles_late else first

    def _rewritten(self, turns: Sequence[PlacedTurn], later: bool) -> list[PlacedTurn]:
        """Return consecutive turns as rendered when another turn follows them, or when none does.

        The positions of all but the first may be wrong.
        """
        found: list[PlacedTurn] = []
        for turn in turns:
            exchange = turn.exchange
            if found:
                previous = found[-1].exchange
                closing, asked = self.prompts.question(exchange.asked, previous, first=False)
                exchange = replace(exchange, closing_ids=closing, question_ids=asked)
            is_later = later or (turn is not turns[-1] and not exchange.calls)
            exchange = self.prompts.settle(exchange, turn.number == 1, is_later)
            found.append(replace(turn, exchange=exchange))
        return found

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

        The stream is rolled back to the prefix it shares with the template's rendering; the rest is
        read later. The turn may have been interrupted anywhere, and so may this method: the next
        call finishes the work, and nothing is done twice.
        """
        state = self.evictor.state
        if isinstance(state, Idle):
            return state.turns
        if self.tokens.lookahead:  # correct guesses that were not requested
            self.tokens.rewind(self.tokens.lookahead)
        turn, turns, refusal = state.finish(trim=self.prompts.template.trims), state.turns, ""
        before = state.before
        try:
            exchange = self.prompts.settle(turn.exchange, turn.number == 1)
            settled, changed, start = replace(turn, exchange=exchange), {}, turn.start
            wanted, first = exchange.ids, self._first_rewritten(before, exchange)
            if first < len(before):
                older = self._rewritten(before[first:], True)
                changed = {each.number: each.exchange for each in older}
                closing, asked = self.prompts.question(
                    exchange.asked, older[-1].exchange, first=False
                )
                exchange = replace(exchange, question_ids=asked)
                if turns:
                    exchange = replace(exchange, closing_ids=closing)
                settled = replace(turn, exchange=exchange)
                before = (*before[:first], *older)
                turns = before[len(before) - len(turns) :]
                attended = turns[-len(older) :]
                if attended != state.turns[-len(older) :]:
                    start = state.turns[-len(attended)].start
                    *attended, settled = place_turns((*attended, settled), start)
                    turns = (*turns[: len(turns) - len(attended)], *attended)
                    wanted = ids_of((*attended, settled))
            kind, changed = ChangeKind.ANSWER, {**changed, turn.number: settled.exchange}
            turns = (*turns, settled)
        except TemplateError as error:
            refusal = f"the last question and its reply were removed: {one_line(error)}"
            kind, changed = ChangeKind.UNDO, {}
            start, wanted = turns[-1].end if turns else turn.start, ()
        # With recall, a turn that outgrew its room is reread, with or without a quotation.
        read = self.tokens.length - turn.start - state.quoted
        outgrown = bool(self._reserved) and read > self._room_for_turns
        if outgrown or not take_back(self.writer, start, wanted):
            if refusal and start < self.cache.geometry.sinks:  # some of it is in the sinks
                self._begin(self.system, self.stats.window)
                turns = ()
            else:
                empty_ring(self.writer)
                turns = self._place_again((*before, *turns[len(state.turns) :]))
                if outgrown and len(turns) == 1:  # only the part that will be attended to
                    unattended = turns[0].end - turns[0].start - self.cache.geometry.window
                    start = max(turn.start, turns[0].start - max(0, unattended))
                    turns = (replace(turns[0], start=start),)
        self._record(kind, turn.number, changed, turns)
        if refusal:
            self.number = turn.number - 1
        self.evictor.become_idle(turns)
        try:
            if self.recorder:
                self.recorder.flush()
        finally:
            if refusal:  # only now, because `_notify` may raise
                self._notify(refusal)
            self._count()
        return self.evictor.state.turns

    def _read_settling(
        self,
        progress: Callable[[int], None] | None = None,
        before: int | None = None,
        settling: bool = False,
    ) -> Coroutine[Piece, None]:
        """Read the part of its turns that the stream is still missing, up to position `before`.

        Args:
            settling: whether no caller is waiting for this.
        """
        state = self.evictor.state
        waits = not self._reserved
        if not (isinstance(state, Idle) and is_unsettled(state.turns, self.tokens.length, waits)):
            return
        self.stats.settled += yield from self._read_pinned(progress)
        ids = unread_ids(self.prompts.pinned, state.turns, self.tokens.length)
        if before is not None:
            ids = ids[: max(0, before - self.tokens.length)]
        if ids:
            self.evictor.make_room(len(ids), keep=1)
            yield from read_ids(self.tokens, ids, progress=progress, settling=settling)
            self.stats.settled += len(ids)
        self._count()

    def _read_pinned(self, progress: Callable[[int], None] | None) -> Coroutine[Piece, int]:
        """Read the pinned prefix in separate steps, or copy its rows from an earlier read.

        Returns:
            How many tokens were read.
        """
        pinned, started = self.prompts.pinned, self.tokens.length
        if started >= len(pinned):
            return 0
        if not started and self._prefixes and self._prefixes.restore(self.writer, pinned):
            if progress:
                progress(len(pinned))
            return 0
        result = yield from read_ids(self.tokens, pinned[started:], progress=progress)
        self.stats.prompt_seconds += result.seconds
        if not started and self._prefixes:
            self._prefixes.add(self.writer, pinned)
        return result.count

    # --- the stream, its statistics and the recorder ---

    def _begin(self, system: str | None, window: int | None) -> None:
        """Allocate the stream without reading anything."""
        prompts = PromptBuilder(self.model.tokenizer, self.template, system, self.pin, self.tools)
        pinned = len(prompts.pinned)
        if window is None and self.template.style:
            window = self.model.thinking_window(max(self.sinks, pinned), self.kv_bits)
        sinks = self.model.sinks_for(pinned, self.sinks, window)
        self.writer = self._writer_factory(sinks, window, self._notify)
        self.tokens, self.cache = self.writer.tokens, self.writer.cache
        self.prompts, geometry = prompts, self.cache.geometry
        self._reserved = self._reserve(geometry.window)
        self.evictor = TurnEvictor(self.cache, self.evict == "turn", self._reserved)
        self.stats.sinks, self.stats.window = geometry.sinks, geometry.window
        self.stats.pinned, self.stats.cache_bytes = pinned, self.cache.nbytes
        if prompts.system_place == "exchange":
            self._notify(
                "this model's template has no fixed place for a system prompt, so the prompt "
                "becomes an opening exchange"
            )
        if system is None and not self.tools and pinned >= LONG_HEAD:
            self._notify(long_head_notice(pinned))
        if pinned > geometry.window:
            self._notify(
                f"the system prompt of {pinned:,} tokens is longer than the window of "
                f"{geometry.window:,}, and is attended to in addition to it"
            )
        self._count()

    def _reserve(self, window: int) -> int:
        """Return how many tokens of the window to keep free for a quotation.

        Raises:
            ValueRefused: more than half of the window was requested.
        """
        asked = self._recall_asked
        if not self.recall or asked == 0:
            return 0
        if asked is not None and not 0 < asked <= window // 2:
            raise ValueRefused(f"--recall must be from 0 to {window // 2:,}, not {asked:,}")
        reserved = max(LEAST_RECALL, window // 8) if asked is None else asked
        if self.evict == "token":
            reason = "single tokens are evicted"
        elif asked is None and reserved > window // 4:
            reason = f"the window of {window:,} tokens is too small"
        else:
            return reserved
        self._notify(f"recall is off: {reason}")
        return 0

    def _count(self, silent: bool = False) -> None:
        """Update the statistics and report evictions, without a notice if `silent`."""
        self.stats.attended, self.stats.evicted = self.cache.attended, self.cache.evicted
        self.evictor.forget()
        exchanges, tokens = self.evictor.evicted_since_report()
        self.evictor.mark_reported()
        self.stats.evicted_exchanges += exchanges
        self._report_left()
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
            turns: the turns that will be in the window afterwards; the caller flushes the recorder
                once they are. Default: the turns in the window now; the change is then written
                immediately.
        """
        if not self.recorder:
            return
        attended = self.evictor.state.turns if turns is None else turns
        # A question counts as attended as soon as it is asked.
        counts = kind is not ChangeKind.STAND or bool(self.pending)
        first = attended[0].number if attended else number + (not counts)
        sampler, window = self.sampler.state(), self.stats.window
        known = exchanges or {}
        change = Change(kind, number, known, first, sampler, self.system, window, self.recall_from)
        self.recorder.record(change)
        if turns is None:
            self.recorder.flush()

    def _notify(self, notice: str) -> None:
        self.stats.add_notices(notice)
        self._on_notice(notice)


def is_unsettled(turns: Sequence[PlacedTurn], length: int, waits: bool = True) -> bool:
    """Return whether a stream must read some of its turns before the next question.

    Args:
        length: how many tokens the stream has read.
        waits: whether the end of a reply may stay unread until the next question is read, if the
            template does not change the reply.
    """
    if not turns:
        return False
    last = turns[-1]
    waits = waits and last.exchange.settled_ids is None and last.start < length
    return last.end > length and not waits
