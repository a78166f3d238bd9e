"""A stream that listens, as the engine's thread holds it: an open turn, and text on its way to it.

    pinned      <|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\n
    fed         10:02 The train is late.\\n10:07 It has come.\\n ...
    asked       \\n\\nWhen did it come?<|im_end|>\\n<|im_start|>assistant\\n
    (the model) At 10:07.
    reopening   <|im_end|>\\n<|im_start|>user\\n

Between two steps what the stream has read, `ListenerWorker.ids` and the text after them make up
all that was fed, so it can be saved there, and asking may end anywhere.
"""

import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import mlx.core as mx

from mlx_stream.cache import StreamCache
from mlx_stream.cache.geometry import pad_length
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.engine.backlog import Backlog
from mlx_stream.engine.incremental_encoder import IncrementalEncoder
from mlx_stream.engine.listener_snapshot import (
    ListenerState,
    largest_metadata,
    parse_listener_state,
)
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.task import Task, Work, as_engine_error, reraise
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import (
    EngineClosed,
    MlxStreamError,
    SnapshotError,
    TemplateError,
    ValueRefused,
)
from mlx_stream.generate import snapshot
from mlx_stream.generate.completion import stream_pieces
from mlx_stream.generate.stats import Stats, eviction_notice
from mlx_stream.generate.token_stream import TokenStream, generate, read_all_but_last_step
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder
from mlx_stream.window import PREFILL_CHUNK

BUSY_CHUNK = 32  # tokens of a step while others wait for their replies


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


class ListenerWorker:
    """One stream that listens.

    Attributes:
        error: what keeps it from being used, if anything does.
        restored: the note of the snapshot it went on with.
        seen: statistics, exchanged whole, so any thread may look.
        evicted: tokens that left and nobody was told of.
    """

    def __init__(self, owner: Worker, core: ModelHost, options: ListenerOptions, backlog: Backlog):
        self.worker, self.host, self.options, self.backlog = owner, core, options, backlog
        self.key = core.new_key()
        self.error: MlxStreamError | None = None
        self.restored: dict[str, str | int] | None = None
        self.stats = Stats()
        self.published = self.stats
        self.is_open = False
        self.evicted = 0
        self.ids: list[int] = []  # encoded and not read
        self._length = 0  # of the last step, padded
        self._reported_evicted = 0

    # --- beginning ---

    def open(self) -> Work:
        """Begin, or go on with a snapshot."""
        yield from ()
        try:
            self._open()
        except Exception as error:
            self._fail(error)
            self.host.budget.set_stream(self.key, 0)
            raise
        finally:
            mx.clear_cache()  # of what a snapshot was loaded into

    def _open(self) -> None:
        path, found, reason = self.options.restore, None, ""
        if path and path.exists():
            try:
                found = self._load(path)
            except SnapshotError as error:
                reason = str(error)
        self.sampling = self.options.sampling.with_seed()
        self._begin(found[1].began if found else datetime.now().astimezone())
        if found:
            try:
                self._restore(*found)
            except ValueRefused as error:
                reason = f"{path} does not fit this window and system prompt ({error})"
                self._begin(datetime.now().astimezone())
        if reason:
            self._notify(f"begins anew, without what was heard before: {reason}")
        self.host.budget.set_stream(self.key, self.cache.nbytes)
        self.is_open = True

    def _begin(self, began: datetime) -> None:
        """Allocate the stream; read nothing yet."""
        options, model = self.options, self.host.model_for(self.key)
        template = model.tokenizer.template
        if template is None:
            raise TemplateError(f"{model.name} has no chat template: it cannot be asked anything")
        self.host.budget.set_stream(self.key, 0)
        self.model, self.began = model, began
        self.prompts = PromptBuilder(
            model.tokenizer, template.at(began), options.system or None, pin=True
        )
        self.turn = self.prompts.open_turn()
        self.pinned = self.prompts.encode(self.turn.opening)
        sinks = model.sinks_for(len(self.pinned), options.sinks, options.window)
        self.cache = self._new_cache(sinks)
        self.tokens, self.sampler = TokenStream(model, self.cache), Sampler(self.sampling)
        self.encoder, self.ids = (
            IncrementalEncoder(self.prompts, self.turn.opening, self.turn.lead),
            [*self.pinned],
        )
        geometry = self.cache.geometry
        self.stats = Stats(
            seed=self.sampling.seed or 0,
            pinned=len(self.pinned),
            sinks=geometry.sinks,
            window=geometry.window,
            cache_bytes=self.cache.nbytes,
            notices=self.stats.notices,
        )

    def _new_cache(self, sinks: int) -> StreamCache:
        return self.model.new_cache(
            sinks, self.options.window, notify=self._notify, kv_bits=self.options.kv_bits
        )

    def _load(self, path: Path) -> tuple[snapshot.Snapshot, ListenerState]:
        found = snapshot.load_snapshot(path, longest=largest_metadata(self.backlog.capacity))
        if found.model != self.host.fingerprint:
            raise SnapshotError(f"{path} belongs to another model, or one loaded another way")
        return found, parse_listener_state(found.about, self.host.model.config.vocab_size)

    def _restore(self, found: snapshot.Snapshot, kept: ListenerState) -> None:
        """Stand where the snapshot was made.

        Raises:
            ValueRefused: it is of another window, prompt or model.
        """
        self.tokens.restore(found.state)
        said = [*self.tokens.attended_ids()[: len(self.pinned)], *kept.ids]
        if said[: len(self.pinned)] != self.pinned:
            raise ValueRefused("it was made with another system prompt")
        self.sampler.restore(kept.sampler)
        self.ids, self.restored = [*kept.ids], kept.note
        self.encoder = IncrementalEncoder(self.prompts, kept.context, kept.lead, kept.held)
        self.encoder.begun = kept.begun
        with self.worker.lock:
            self.backlog.put_back(kept.backlog)
        self._reported_evicted = self.cache.evicted
        self._count()

    def check_open(self) -> None:
        """Raise what keeps it from being used."""
        if self.error:
            raise reraise(self.error)
        if not self.is_open:
            raise EngineClosed("this listener is closed: begin another one")

    # --- listening ---

    def waiting(self) -> bool:
        return self.is_open and not self.error and bool(self.ids or self.backlog.pieces)

    def step(self) -> None:
        """Read a little more of what was fed."""
        try:
            chunk = BUSY_CHUNK if self.worker.busy() else PREFILL_CHUNK
            self._encode(chunk, self.backlog.fed)
            self._read(chunk)
        except Exception as error:  # whoever uses it next is told
            self._fail(error)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Let nobody use the stream after a step that failed: who knows what it left there."""
        try:
            yield
        except Exception as error:
            self._fail(error)
            raise

    def _fail(self, error: Exception) -> None:
        """Have nobody use it any more; who waits for room hears of it."""
        with self.worker.lock:
            self.error = as_engine_error(error)
            self.worker.changed.notify_all()

    def _encode(self, count: int, fed: int) -> None:
        """Have so many ids to be read, if there is text among the first `fed` characters."""
        while len(self.ids) < count and self.backlog.taken < fed:
            with self.worker.lock:
                text = self.backlog.take()
                self.backlog.encoded += len(text)
            self.ids += self.encoder.add(text)

    def _read(self, chunk: int) -> None:
        """Read ids, as many as one step takes."""
        started, waiting = time.perf_counter(), len(self.ids)
        if waiting:
            count = self.cache.max_step(min(chunk, waiting))
            self._work_in(pad_length(count))
            for _ in self.tokens.prefill(self.ids[:count]):
                del self.ids[:count]
            self.tokens.synchronize()
            self.stats.prompt_tokens += count
            self.stats.prompt_seconds += time.perf_counter() - started
        self.after(None)  # first: who sees that nothing waits sees what was read
        with self.worker.lock:
            self.backlog.encoded = self.backlog.encoded * len(self.ids) // max(1, waiting)
            self.worker.changed.notify_all()

    def _work_in(self, length: int) -> None:
        """Let go of freed buffers if steps change their length: each one's were kept, 50 MB."""
        if length != self._length:
            self._length = length
            mx.clear_cache()

    def _read_steps(self, fed: int) -> Iterator[None]:
        """Read all of the first `fed` characters; yields between the steps."""
        self.check_open()
        while self.ids or self.backlog.taken < fed:
            with self._failing():
                self._encode(PREFILL_CHUNK, fed)
                self._read(PREFILL_CHUNK)
            yield

    def flush(self, fed: int) -> Work:
        """Read all that was fed before, its last word too."""
        yield from self._read_steps(fed)
        self.ids += self.encoder.flush()
        yield from self._read_steps(fed)

    # --- asking ---

    def ask(self, question: str, limit: int | None, fed: int | None, remember: bool) -> Work:
        """Yield the pieces of an answer, and None after other steps.

        Args:
            fed: characters that are read before; None: what is encoded already.
        """
        yield from self._read_steps(0 if fed is None else fed)
        held = "" if fed is None else self.encoder.pending
        prompt = self.encoder.end_turn(held, question, self.turn.closing)
        limit = limit or self.options.max_tokens
        if not remember:
            yield from self._aside(prompt, limit)
            return
        self.encoder.pending = self.encoder.pending[len(held) :]
        reply = ReplyDecoder(self.model.tokenizer.decoder(), ())
        base = self.tokens.length
        try:
            with self._failing():
                yield from self._answer(self.tokens, self.sampler, prompt, limit, reply, self.stats)
        finally:
            self._settle(base, prompt, reply)

    def _aside(self, prompt: Sequence[int], limit: int) -> Work:
        """Answer from a copy of the stream, which is charged to the budget while it is there."""
        tokens = None
        try:
            tokens = TokenStream(self.model, self._new_cache(self.cache.geometry.sinks))
            tokens.restore(self.tokens.state())
            reply = ReplyDecoder(self.model.tokenizer.decoder(), (), remember=False)
            sampler = Sampler(self.options.sampling)
            yield from self._answer(tokens, sampler, prompt, limit, reply, Stats())
        except Exception as error:
            # Who is told keeps the error, and its frames, as any closure, would keep the copy.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            tokens = None
            mx.clear_cache()  # the next copy may be long in coming
            self.host.budget.set_stream(self.key, self.cache.nbytes)

    def _answer(
        self,
        tokens: TokenStream,
        sampler: Sampler,
        prompt: Sequence[int],
        limit: int,
        reply: ReplyDecoder,
        stats: Stats,
    ) -> Work:
        tokenizer = self.model.tokenizer
        ends = tokenizer.eos_ids | tokenizer.special_ids
        self._work_in(0)
        sampled = _sampled(tokens, sampler, prompt, limit, ends)
        for piece in stream_pieces(sampled, reply, len(prompt), limit, stats, tokens, steps=True):
            if piece.finish:
                yield Piece(piece.text, piece.finish, tokens.cache.attended)
            else:
                yield piece if piece.text else None

    def _settle(self, base: int, prompt: Sequence[int], reply: ReplyDecoder) -> None:
        """Leave the stream with the question and what was said, and open a turn behind it."""
        reply.flush()
        kept, rest = reply.final_ids(trim=self.prompts.template.trims)
        wanted = (*prompt, *reply.ids[:kept])
        excess = self.tokens.length - base - len(wanted)
        if excess > 0:
            self.tokens.rewind(min(excess, self.cache.rewindable))
        said = rest if reply.ids else self.prompts.template.lead
        unread = wanted[max(0, self.tokens.length - base) :]
        self.ids += (*unread, *self.prompts.encode(said + self.turn.reopening, behind_text=True))
        self.encoder.restart(self.turn.reopening, self.turn.lead)
        self._count()

    # --- keeping ---

    def save(self, path: Path, note: dict[str, str | int]) -> Work:
        """Write the stream and all that was fed."""
        yield from ()
        self.check_open()
        with self.worker.lock:
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
        snapshot.save_snapshot(path, self.tokens, self.host.fingerprint, kept.plain())

    def close(self) -> None:
        """Let go of the ring."""
        self.is_open, self.ids = False, []
        for name in ("tokens", "cache", "model", "sampler"):
            vars(self).pop(name, None)
        self.host.budget.set_stream(self.key, 0)

    # --- what is said about it ---

    def after(self, job: Task | None) -> None:
        """Publish how things are."""
        if self.is_open:
            if job and job.cancelled and job.error:  # nobody else hears of it
                self._notify(str(job.error))
            self._count()
            self.published = replace(self.stats, notices=[*self.stats.notices])

    def _count(self) -> None:
        stats, cache = self.stats, self.cache
        stats.attended, stats.evicted = cache.attended, cache.evicted
        if stats.evicted and not self._reported_evicted and not self.restored:
            self._notify(eviction_notice(stats.window))
        left, self._reported_evicted = stats.evicted - self._reported_evicted, stats.evicted
        with self.worker.lock:
            self.evicted += left

    def _notify(self, line: str) -> None:
        self.stats.add_notices(line)


def _sampled(
    tokens: TokenStream, sampler: Sampler, prompt: Sequence[int], limit: int, ends: Collection[int]
) -> Iterator[int | None]:
    """Yield the ids of an answer, and None after the steps that read its prompt."""
    rest = yield from read_all_but_last_step(tokens, prompt, None)
    yield from generate(tokens, rest, sampler, limit, ends)
