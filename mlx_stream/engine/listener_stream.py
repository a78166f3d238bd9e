"""A listener's stream: an open user turn, the text waiting to be added, and answers from it.

    pinned      <|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n
    fed         10:02 The train is late.\n10:07 It has come.\n ...
    question    \n\nWhen did it come?<|im_end|>\n<|im_start|>assistant\n
    (the model) At 10:07.
    reopening   <|im_end|>\n<|im_start|>user\n

Between two steps, the tokens already read, `ListenerStream.ids` and the text still waiting make up
everything that was fed. The stream can therefore be saved, and an answer stopped, between steps.
"""

import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Condition

import mlx.core as mx

from mlx_stream.cache.geometry import pad_length
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.engine.incremental_encoder import IncrementalEncoder
from mlx_stream.engine.listener_snapshot import ListenerState
from mlx_stream.errors import TemplateError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import Coroutine, ReadRequest, ReadResult
from mlx_stream.generate.speculative import Writer
from mlx_stream.generate.stats import Stats
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder

CHARACTERS_A_STEP = 1_024  # the maximum that is encoded at once


class Backlog:
    """Text that has been fed but not yet encoded; any thread may use it.

    Attributes:
        fed, taken: how many characters have been fed and taken, in total.
        encoded: how many of the characters taken have tokens that have not been read yet.
    """

    def __init__(self, lock: Condition, capacity: int):
        self.lock, self.capacity = lock, capacity
        self.fed = self.taken = self.encoded = 0
        self.pieces: deque[str] = deque()

    @property
    def size(self) -> int:
        with self.lock:
            return self.fed - self.taken + self.encoded

    def add(self, text: str) -> None:
        with self.lock:
            if text:
                self.pieces.append(text)
                self.fed += len(text)
            self.lock.notify_all()

    def put_back(self, text: str) -> None:
        """Put text back before all other text, as if it had been fed but not taken."""
        with self.lock:
            if text:
                self.pieces.appendleft(text)
                self.taken -= len(text)

    def take(self) -> str:
        """Remove and return the oldest text, up to `CHARACTERS_A_STEP` characters of it."""
        with self.lock:
            if not self.pieces:
                return ""
            text = self.pieces.popleft()
            if len(text) > CHARACTERS_A_STEP:
                self.pieces.appendleft(text[CHARACTERS_A_STEP:])
                text = text[:CHARACTERS_A_STEP]
            self.taken += len(text)
            self.encoded += len(text)
            return text

    def make_room(self, before: int, left: int) -> None:
        """Shrink the backlog after a read: `left` of `before` encoded tokens are still unread."""
        with self.lock:
            self.encoded = self.encoded * left // max(1, before)
            self.lock.notify_all()


@dataclass(frozen=True)
class ListenerOptions:
    """A listener's options; see `Engine.listen`."""

    system: str | None
    window: int | None
    sinks: int | None
    kv_bits: int | None
    sampling: Sampling
    max_tokens: int
    restore: Path | None


class ListenerStream:
    """One listening stream.

    Args:
        began: when the stream started, which a chat template may print.

    Attributes:
        ids: ids that have been encoded but not yet read.
    """

    def __init__(self, model: Model, options: ListenerOptions, began: datetime, backlog: Backlog):
        template = model.tokenizer.template
        if template is None:
            raise TemplateError(f"{model.name} has no chat template, so it cannot answer questions")
        self.model, self.options, self.began, self.backlog = model, options, began, backlog
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
        self._length = 0  # the padded length of the last step

    def restore(self, state: snapshot.State, saved: ListenerState) -> None:
        """Continue from a snapshot.

        Raises:
            ValueRefused: the snapshot has a different window, system prompt or model.
        """
        self.tokens.restore(state)
        count = len(self.pinned)
        if [*self.tokens.ids.attended()[:count], *saved.ids][:count] != self.pinned:
            raise ValueRefused("it was made with a different system prompt")
        self.sampler.restore(saved.sampler)
        self.ids = [*saved.ids]
        self.encoder = IncrementalEncoder(self.prompts, saved.context, saved.lead, saved.held)
        self.encoder.begun = saved.begun
        self.backlog.put_back(saved.backlog)

    def save(self, path: Path, note: dict[str, str | int]) -> Coroutine[Piece, None]:
        """Write the stream and all the text that was fed; a coroutine."""
        yield from ()
        with self.backlog.lock:
            backlog = "".join(self.backlog.pieces)
        saved = ListenerState(
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
        snapshot.save_snapshot(path, self.tokens, self.model.fingerprint(), saved.plain())

    # --- listening ---

    def read_step(self, chunk: int) -> None:
        """Read one step of the text that was fed."""
        if request := self._next_request(chunk, self.backlog.fed):
            self._record(self.tokens.run(request))

    def read_fed(self, fed: int) -> Coroutine[Piece, None]:
        """Read the first `fed` characters, except a last word that may still grow; a coroutine."""
        while request := self._next_request(PREFILL_CHUNK, fed):
            result = yield request
            assert result
            self._record(result)

    def flush(self, fed: int) -> Coroutine[Piece, None]:
        """Read the first `fed` characters, including the last word; a coroutine."""
        yield from self.read_fed(fed)
        self.ids += self.encoder.flush()
        yield from self.read_fed(fed)

    def _next_request(self, chunk: int, fed: int) -> ReadRequest | None:
        """Encode enough of the first `fed` characters for one step, and return its request."""
        while len(self.ids) < chunk and self.backlog.taken < fed:
            self.ids += self.encoder.add(self.backlog.take())
        if not self.ids:
            self._drop_read(0)
            return None
        count = self.cache.max_step(min(chunk, len(self.ids)))
        self._free_buffers(pad_length(count))
        return ReadRequest(self.tokens, self.ids[:count], chunk=chunk)

    def _record(self, result: ReadResult) -> None:
        self.stats.prompt_tokens += result.count
        self.stats.prompt_seconds += result.seconds
        self._drop_read(result.count)

    def _drop_read(self, count: int) -> None:
        """Drop the ids that were read, and their part of the backlog."""
        before = len(self.ids)
        del self.ids[:count]
        self.backlog.make_room(before, len(self.ids))

    def _free_buffers(self, length: int) -> None:
        """Free MLX's cached buffers when the step length changes; each length takes 50 MB."""
        if length != self._length:
            self._length = length
            mx.clear_cache()

    # --- answering ---

    def ask(
        self, question: str, limit: int | None, fed: int | None, remember: bool
    ) -> Coroutine[Piece, None]:
        """Yield the pieces of an answer; a coroutine.

        Args:
            fed: how many characters to read before answering; None for those already encoded.
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
        """Answer from a copy of the stream, and leave the stream unchanged."""
        copy = None
        try:
            copy = self._writer(self.cache.geometry.sinks)
            copy.tokens.restore(self.tokens.state())
            reply = ReplyDecoder(self.model.tokenizer.decoder(), (), remember=False)
            sampler = Sampler(self.options.sampling)
            yield from self._answer(copy, sampler, prompt, limit, reply, Stats())
        except Exception as error:
            # The caller keeps the error, whose frames would keep the copy alive.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            copy = None
            mx.clear_cache()  # the next copy may come much later

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
        ends = self.prompts.replies.end_ids
        last = yield from write_reply(writer, prompt, sampler, limit, ends, reply, stats)
        yield replace(last, attended=writer.tokens.attended)

    def _reopen(self, start: int, prompt: Sequence[int], reply: ReplyDecoder) -> None:
        """Keep the question and the reply in the stream, and open a turn after them.

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
