"""A stream that listens: an open turn of the user's, text on its way to it, and answers from it.

    pinned      <|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n
    fed         10:02 The train is late.\n10:07 It has come.\n ...
    asked       \n\nWhen did it come?<|im_end|>\n<|im_start|>assistant\n
    (the model) At 10:07.
    reopening   <|im_end|>\n<|im_start|>user\n

Between two steps what the stream has read, `ListenerStream.ids` and the text after them make up all
that was fed, so it can be saved there, and asking may end anywhere.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Condition

import mlx.core as mx

from mlx_stream.cache.geometry import pad_length
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.engine.backlog import Backlog
from mlx_stream.engine.incremental_encoder import IncrementalEncoder
from mlx_stream.engine.listener_snapshot import ListenerState
from mlx_stream.errors import TemplateError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import Coroutine, ReadRequest, ReadResult
from mlx_stream.generate.speculative import Writer
from mlx_stream.generate.stats import Stats
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import Model
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder
from mlx_stream.window import PREFILL_CHUNK


@dataclass(frozen=True)
class ListenerOptions:
    """How a stream listens; see `Engine.listen`."""

    system: str | None
    window: int | None
    sinks: int | None
    kv_bits: int | None
    sampling: Sampling
    max_tokens: int
    restore: Path | None


class ListenerStream:
    """One stream that listens.

    Args:
        began: when it began, which its template may name.
        changed: notified when the backlog has room; its lock guards the backlog.
        publish: called after a step, before that.

    Attributes:
        ids: encoded and not read.
    """

    def __init__(
        self,
        model: Model,
        options: ListenerOptions,
        began: datetime,
        backlog: Backlog,
        changed: Condition,
        publish: Callable[[], None],
    ):
        template = model.tokenizer.template
        if template is None:
            raise TemplateError(f"{model.name} has no chat template: it cannot be asked anything")
        self.model, self.options, self.began = model, options, began
        self.backlog, self._changed, self._publish = backlog, changed, publish
        system = options.system or None
        self.prompts = PromptBuilder(model.tokenizer, template.at(began), system, pin=True)
        self.turn = self.prompts.open_turn()
        self.encoder = IncrementalEncoder(self.prompts, self.turn.opening, self.turn.lead)
        self.pinned = self.prompts.encode(self.turn.opening)
        self.ids = [*self.pinned]
        self.sampler = Sampler(options.sampling)
        self.stats = Stats(seed=self.sampler.sampling.seed or 0, pinned=len(self.pinned))
        self.writer = self._writer(model.sinks_for(len(self.pinned), options.sinks, options.window))
        self.tokens, self.cache = self.writer.tokens, self.writer.cache
        geometry = self.cache.geometry
        self.stats.sinks, self.stats.window = geometry.sinks, geometry.window
        self.stats.cache_bytes = self.cache.nbytes
        self._length = 0  # of the last step, padded

    def restore(self, state: snapshot.State, kept: ListenerState) -> None:
        """Stand where a snapshot was made.

        Raises:
            ValueRefused: it is of another window, prompt or model.
        """
        self.tokens.restore(state)
        count = len(self.pinned)
        if [*self.tokens.ids.attended()[:count], *kept.ids][:count] != self.pinned:
            raise ValueRefused("it was made with another system prompt")
        self.sampler.restore(kept.sampler)
        self.ids = [*kept.ids]
        self.encoder = IncrementalEncoder(self.prompts, kept.context, kept.lead, kept.held)
        self.encoder.begun = kept.begun
        with self._changed:
            self.backlog.put_back(kept.backlog)

    def save(self, path: Path, note: dict[str, str | int]) -> Coroutine[Piece, None]:
        """Write the stream and all that was fed; a coroutine."""
        yield from ()
        with self._changed:
            backlog = "".join(self.backlog.pieces)
        kept = ListenerState(
            note=note,
            began=self.began,
            sampler=self.sampler.state(),
            ids=tuple(self.ids),
            context=self.encoder.context,
            lead=self.encoder.lead,
            held=self.encoder.pending,
            begun=self.encoder.begun,
            backlog=backlog,
        )
        snapshot.save_snapshot(path, self.tokens, self.model.fingerprint(), kept.plain())

    # --- listening ---

    def read_step(self, chunk: int) -> None:
        """Read a little more of what was fed."""
        if request := self._next_request(chunk, self.backlog.fed):
            self._record(self.tokens.run(request))

    def read_fed(self, fed: int) -> Coroutine[Piece, None]:
        """Read all of the first `fed` characters but what more may change; a coroutine."""
        while request := self._next_request(PREFILL_CHUNK, fed):
            result = yield request
            assert result
            self._record(result)

    def flush(self, fed: int) -> Coroutine[Piece, None]:
        """Read all that was fed before, its last word too; a coroutine."""
        yield from self.read_fed(fed)
        self.ids += self.encoder.flush()
        yield from self.read_fed(fed)

    def _next_request(self, chunk: int, fed: int) -> ReadRequest | None:
        """Encode what fills a step, if it is among the first `fed` characters; return the step."""
        while len(self.ids) < chunk and self.backlog.taken < fed:
            with self._changed:
                text = self.backlog.take()
                self.backlog.encoded += len(text)
            self.ids += self.encoder.add(text)
        if not self.ids:
            self._make_room(0)
            return None
        count = self.cache.max_step(min(chunk, len(self.ids)))
        self._free_buffers(pad_length(count))
        return ReadRequest(self.tokens, self.ids[:count], chunk=chunk)

    def _record(self, result: ReadResult) -> None:
        """Note what a step has read."""
        self.stats.prompt_tokens += result.count
        self.stats.prompt_seconds += result.seconds
        self._publish()  # first: who sees that nothing waits sees what was read
        self._make_room(result.count)

    def _make_room(self, count: int) -> None:
        """Drop the ids that were read, and their part of the backlog."""
        waiting = len(self.ids)
        del self.ids[:count]
        with self._changed:
            self.backlog.encoded = self.backlog.encoded * len(self.ids) // max(1, waiting)
            self._changed.notify_all()

    def _free_buffers(self, length: int) -> None:
        """Let go of freed buffers if steps change their length: each one's were kept, 50 MB."""
        if length != self._length:
            self._length = length
            mx.clear_cache()

    # --- asking ---

    def ask(
        self, question: str, limit: int | None, fed: int | None, remember: bool
    ) -> Coroutine[Piece, None]:
        """Yield the pieces of an answer; a coroutine.

        Args:
            fed: characters that are read before; None: what is encoded already.
        """
        yield from self.read_fed(0 if fed is None else fed)
        held = "" if fed is None else self.encoder.pending
        prompt = self.encoder.end_turn(held, question, self.turn.closing)
        limit = limit or self.options.max_tokens
        if not remember:
            yield from self._ask_copy(prompt, limit)
            return
        self.encoder.pending = self.encoder.pending[len(held) :]
        reply = ReplyDecoder(self.model.tokenizer.decoder(), ())
        start = self.tokens.length
        try:
            yield from self._answer(self.writer, self.sampler, prompt, limit, reply, self.stats)
        finally:
            self._reopen(start, prompt, reply)

    def _ask_copy(self, prompt: Sequence[int], limit: int) -> Coroutine[Piece, None]:
        """Answer from a copy of the stream, which stays as it is."""
        copy = None
        try:
            copy = self._writer(self.cache.geometry.sinks)
            copy.tokens.restore(self.tokens.state())
            reply = ReplyDecoder(self.model.tokenizer.decoder(), (), remember=False)
            sampler = Sampler(self.options.sampling)
            yield from self._answer(copy, sampler, prompt, limit, reply, Stats())
        except Exception as error:
            # Who is told keeps the error, and its frames, as any closure, would keep the copy.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            copy = None
            mx.clear_cache()  # the next copy may be long in coming

    def _writer(self, sinks: int) -> Writer:
        window, bits = self.options.window, self.options.kv_bits
        cache = self.model.new_cache(sinks, window, notify=self.stats.add_notices, kv_bits=bits)
        return Writer(TokenStream(self.model, cache), cache)

    def _answer(
        self,
        writer: Writer,
        sampler: Sampler,
        prompt: Sequence[int],
        limit: int,
        reply: ReplyDecoder,
        stats: Stats,
    ) -> Coroutine[Piece, None]:
        self._free_buffers(0)
        ends = self.prompts.end_ids
        last = yield from write_reply(writer, prompt, sampler, limit, ends, reply, stats)
        yield replace(last, attended=writer.tokens.attended)

    def _reopen(self, start: int, prompt: Sequence[int], reply: ReplyDecoder) -> None:
        """Leave the stream with the question and the reply, and open a turn behind them.

        Args:
            start: the stream's length before the question.
        """
        reply.flush()
        kept, rest = reply.final_ids(trim=self.prompts.template.trims)
        wanted = (*prompt, *reply.ids[:kept])
        excess = self.tokens.length - start - len(wanted)
        self.tokens.rewind(max(0, min(excess, self.cache.rewindable)))
        unread = wanted[max(0, self.tokens.length - start) :]
        text = (rest if reply.ids else self.prompts.template.lead) + self.turn.reopening
        self.ids += (*unread, *self.prompts.encode(text, behind_text=True))
        self.encoder.restart(self.turn.reopening, self.turn.lead)
