"""One stream of token ids through one model: it plans, computes and commits every step; no text."""

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream import backend
from mlx_stream.cache import Cache
from mlx_stream.errors import TokenizerError, ValueRefused, WeightsError
from mlx_stream.generate.attended_ids import AttendedIds, StreamObserver
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.load import Model
from mlx_stream.models.compiled import DecodeOutput
from mlx_stream.sampling import PenalizedIds, Sampler, as_int
from mlx_stream.window import PREFILL_CHUNK

IDS = "ids"  # of the attended tokens, in a stream's state
# A step that raises one may have left anything in the buffers, which pass for evaluated then.
STEP_ERRORS = (RuntimeError, MemoryError, WeightsError)


@dataclass(frozen=True)
class PendingStep:
    """A step that was built while the device worked, not submitted and no part of the stream yet.

    It is for the stream exactly as it was then, for one token, and for one sampler's next draw.
    """

    version: object
    token: mx.array
    sampler: Sampler
    key: mx.array
    step: Any
    output: DecodeOutput


class TokenStream:
    """One stream of token ids through one model: its cache, and the ids that are attended.

    Attributes:
        ids: of the attended tokens; its observers are told how the stream goes, evictions apart.
        lookahead: how many of the newest tokens are what follows, but were read before they were
            asked for, as guesses are.
        failed: whether a step did: its rows are gone, and nothing more can be read.
    """

    def __init__(self, model: Model, cache: Cache, observers: Sequence[StreamObserver] = ()):
        self.ids, self.lookahead, self.failed = AttendedIds(cache, observers), 0, False
        self.network, self.cache, self._compiled = model.network, cache, model.compiled_steps
        self._tracing = backend.tracing()
        self._pending: PendingStep | None = None
        self._vocabulary = model.config.vocab_size
        # What the last step computed; evaluated before the next, so that no graph grows.
        self._computed: list[mx.array] = []

    @property
    def length(self) -> int:
        return self.cache.length

    @property
    def attended(self) -> int:
        """Tokens attended by the newest that was asked for."""
        if not self.lookahead:
            return self.cache.attended
        return len(self.cache.attended_rows(self.lookahead))

    def run(self, request: ReadRequest) -> ReadResult:
        """Read a request's ids, or as many of them as one step takes.

        Raises:
            ValueRefused: no ids, or `chunk` below 1.
            TokenizerError: an id the model has no embedding for; reading on would read past it.
            WeightsError, RuntimeError, MemoryError: the step failed; the stream's rows are let go
                of, of which it may have made anything.
        """
        started, ids, want = time.perf_counter(), request.ids, request.want
        count, logits, token = len(ids), None, -1
        try:
            if want is Want.TOKEN:
                assert request.sampler is not None
                token = self.next(ids[0], request.sampler, request.more)
            elif want is Want.ROWS:
                logits = self.verify(ids)
            else:
                count = self._step_length(ids, request.chunk)
                wanted = want is Want.LOGITS and count == len(ids)
                found = self._read(ids[:count], prefill=not wanted)
                if wanted:
                    logits = self._last_logits(found, check=True)
                else:
                    mx.eval(found)
        except STEP_ERRORS:
            self.fail()
            raise
        return ReadResult(count, time.perf_counter() - started, logits, token)

    def fail(self) -> None:
        """Let go of the rows, of which a step that failed may have made anything."""
        self.failed = True
        self._pending, self._computed = None, []  # they hold the rows, too
        self.cache.release()

    def read(self, ids: Sequence[int], chunk: int = PREFILL_CHUNK) -> mx.array:
        """Read token ids and return the logits (vocabulary,) after the last one.

        The logits of a single token are not evaluated yet: choosing the next one from them is one
        more node of the same graph, and a device is waited for once per token.

        Args:
            ids: at least one.
            chunk: tokens a step at most; 1 decodes token by token.
        """
        done = 0
        while True:
            count = self._step_length(ids[done:], chunk)
            part, done = ids[done : done + count], done + count
            hidden = self._read(part, prefill=done < len(ids))
            if done == len(ids):
                return self._last_logits(hidden, check=len(ids) > 1)

    def steps(self, ids: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[mx.array]:
        """Read token ids step by step; yields each step's hidden states (1, T, hidden size).

        They are evaluated before the next step at the latest.
        """
        while True:
            count = self._step_length(ids, chunk)
            yield self._read(ids[:count])
            ids = ids[count:]
            if not ids:
                return

    def next(self, token: int, sampler: Sampler, more: bool = True) -> int:
        """Read one token and return the one that `sampler` chooses after it.

        Args:
            more: whether another step is likely to follow: it is built, from the token that is not
                known yet, while the device computes this one. Asking for anything else drops it.
        """
        check_ids([token], self._vocabulary)
        self.lookahead = 0
        pending, self._pending = self._pending, None
        if pending and is_next(pending, self.cache.version, token, sampler):
            step, output = pending.step, pending.output
        else:
            mx.eval(self._computed)
            step = self._plan(1)
            output = self._decode(step, mx.array([[token]], mx.uint32), sampler, sampler.key)
        del pending
        self._commit(step, [token])
        del step  # nothing but the update may hold the buffers
        chosen, key = output.token, output.key
        assert chosen is not None and key is not None
        self._computed = [chosen, key]
        mx.async_eval(chosen, key)
        if more and self.cache.is_ready(1):
            version, step = self.cache.version, self.cache.plan(1)
            following = self._decode(step, chosen.reshape(1, 1), sampler, key)
            self._pending = PendingStep(version, chosen, sampler, key, step, following)
        found = as_int(chosen)
        sampler.key = key
        return found

    def verify(self, ids: Sequence[int]) -> mx.array:
        """Read up to the cache's `max_verify` ids and return the logits (T, vocabulary) after each.

        All but the first can be taken back without a loss.
        """
        check_ids(ids, self._vocabulary)
        self.drop_pending()
        mx.eval(self._computed)
        step = self._plan(len(ids), verify=True)
        logits = self.network.logits(self.network(mx.array([[*ids]], mx.int32), step))[0]
        self._commit(step, ids)
        del step
        self._computed = [logits]
        mx.eval(logits)
        return logits

    def rewind(self, count: int) -> None:
        """Take back the newest `count` tokens; see the cache's `rewind`."""
        self.ids.record()
        self.drop_pending()
        self.lookahead = 0  # first: an interrupt must not leave what could be taken back twice
        self.cache.rewind(count)
        self.ids.rewind(count)

    def drop_pending(self) -> None:
        """Let go of a step that was built ahead: it holds the buffers."""
        self._pending = None

    def state(self) -> dict[str, mx.array | int]:
        """Return the whole state: the cache's, and the ids by row; the arrays are the live ones.

        What is not attended is zero in it, keys, values and ids alike.
        """
        self.erase()
        return {**self.cache.state(), IDS: mx.array(self.ids.by_row, mx.uint32)}

    def erase(self) -> None:
        """Keep nothing that is not attended: neither keys and values nor ids."""
        self.ids.record()
        self.drop_pending()
        self.cache.erase()
        self.ids.erase()

    def restore(self, state: dict[str, mx.array | int]) -> None:
        """Continue from a state of a stream of the same model and cache parameters.

        Raises:
            ValueRefused: it is not one.
        """
        cached = dict(state)
        ids = cached.pop(IDS, None)
        if not isinstance(ids, mx.array) or ids.dtype != mx.uint32 or ids.ndim != 1:
            raise ValueRefused("not a state of this stream: its token ids are missing")
        before = self.cache.state()
        self.cache.restore(cached)
        known: list[int] = ids.tolist()  # type: ignore[assignment]
        rows = self.cache.attended_rows()
        if len(known) <= max(rows, default=-1) or max(known, default=0) >= self._vocabulary:
            self.cache.restore(before)
            raise ValueRefused("not a state of this stream: its token ids do not fit")
        self._computed, self._pending, self.lookahead = [], None, 0
        self.ids.restore(known)

    # --- one step ---

    def _step_length(self, ids: Sequence[int], chunk: int) -> int:
        """Return how many of the ids the next step reads; they are checked."""
        if not ids or chunk < 1:
            raise ValueRefused(f"cannot read {len(ids)} tokens in chunks of {chunk}")
        count = self.cache.max_step(min(chunk, len(ids)))
        check_ids(ids[:count], self._vocabulary)
        self.lookahead = 0
        return count

    def _read(self, part: Sequence[int], prefill: bool = False) -> mx.array:
        """Read one step's ids; returns its hidden states, or with `prefill` those it needs."""
        self.drop_pending()
        mx.eval(self._computed)
        step = self._plan(len(part))
        if len(part) == 1:
            found = self._decode(step, mx.array([part], mx.uint32)).hidden
            self._commit(step, part)
            self._computed = [found]
            return found
        # Padded with a real id: whatever its row of the embedding holds has been seen already.
        tokens = mx.array([[*part, *[part[-1]] * (step.rows - step.count)]], mx.int32)
        compute = self.network.prefill if prefill else self.network
        found = compute(tokens, step)[:, : step.count]
        self._commit(step, part)
        del step
        self._computed = [found]
        # A chunk's attention reads the buffers as they were, its new rows come after:
        # evaluated together, Metal would still hold the old ones and copy them all.
        mx.eval(found)
        mx.eval(self.cache.arrays())
        return found

    def _last_logits(self, hidden: mx.array, check: bool) -> mx.array:
        """Return the logits (vocabulary,) after the last row; `check` refuses NaN."""
        logits = self.network.logits(hidden[:, -1])[0]
        if check and not mx.isfinite(logits).all().item():
            raise WeightsError(
                "the model's output is not a number: its weights are damaged, or overflow in this "
                "dtype (try --dtype float32)"
            )
        return logits

    def _plan(self, count: int, verify: bool = False) -> Any:
        """Return the step that reads the next `count` tokens; what is attended stays as it was."""
        self.ids.record()
        self.cache.prepare(count)
        return self.cache.plan(count, verify)

    def _decode(
        self,
        step: Any,
        tokens: mx.array,
        sampler: Sampler | None = None,
        key: mx.array | None = None,
    ) -> DecodeOutput:
        """Build one token's step; nothing is part of the stream yet."""
        penalized = None
        if sampler and sampler.mode.penalizes:
            self.ids.record()
            attended = self.cache.attended_next()
            ids = np.zeros(len(attended), np.int32)
            ids[: len(self.ids.by_row)] = self.ids.by_row[: len(ids)]
            penalized = PenalizedIds(
                mx.concatenate([mx.array(ids), tokens[0].astype(mx.int32)]),
                mx.array(np.append(attended, True)),
            )
        return self._compiled.decode(step, tokens, self._tracing, sampler, key, penalized)

    def _commit(self, step: Any, ids: Sequence[int]) -> None:
        self.ids.record()
        self.ids.expect(ids)
        self.cache.commit(step)


def is_next(pending: PendingStep, version: object, token: int, sampler: Sampler) -> bool:
    """Return whether a step built ahead is the one that is asked for now."""
    same_draw = pending.sampler is sampler and sampler.key is pending.key
    return version is pending.version and same_draw and pending.token.item() == token


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raise TokenizerError for an id that the model has no embedding for."""
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise TokenizerError(
            f"token id {max(ids)} is outside the model's vocabulary of {vocabulary}: the tokenizer "
            "is not the one the model was trained with"
        )


def generate(
    stream: TokenStream,
    prompt: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    ends: Collection[int] = (),
) -> Generator[int, None, None]:
    """Read a prompt and yield the ids chosen after it, up to one of `ends`, which is among them."""
    token = sampler.choose(stream.read(prompt), stream.ids.attended)
    try:
        for left in range(max_tokens - 1, -1, -1):
            yield token
            if token in ends or not left:
                return
            token = stream.next(token, sampler, more=left > 1)
    finally:
        stream.drop_pending()


def check_max_tokens(max_tokens: int) -> int:
    """Return a limit of tokens, or raise ValueRefused if it is below 1."""
    if max_tokens < 1:
        raise ValueRefused(f"--max-tokens must be at least 1, not {max_tokens}")
    return max_tokens
