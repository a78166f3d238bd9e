"""Plans, computes and commits every step of one stream of token ids; independent of text."""

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream import backend
from mlx_stream.cache import Cache
from mlx_stream.errors import TokenizerError, ValueRefused, WeightsError
from mlx_stream.generate.attended_ids import AttendedIds, StreamObserver
from mlx_stream.generate.model import Model, check_process
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.models.compiled import DecodeOutput
from mlx_stream.models.layers import CausalLM
from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.sampling import PenalizedIds, Sampler, as_int

IDS = "ids"  # the key of the token ids in a stream's state
NOT_A_NUMBER = (
    "the model's output is not finite: its weights are damaged, or overflow in this dtype (try "
    "`dtype` float32)"
)
# After these errors, the buffers' contents are unknown, although MLX regards them as evaluated.
STEP_ERRORS = (RuntimeError, MemoryError, WeightsError)


@dataclass(frozen=True)
class PendingStep:
    """A step that was built in advance and has not been submitted yet.

    It is valid for one version of the stream, one token and one draw of one sampler.
    """

    version: object
    token: mx.array
    sampler: Sampler
    key: mx.array
    step: Any
    output: DecodeOutput


@dataclass
class PlannedRead:
    """A request's step, which has not been committed yet.

    Attributes:
        ids: the ids that it reads: all of the request's, or only the first ones.
        step: None once committed, because a step holds references to the buffers.
        penalized: for `Want.TOKEN`, the ids that the sampler's penalty covers, if it has one.
    """

    stream: "TokenStream"
    request: ReadRequest
    ids: Sequence[int]
    step: Any
    penalized: PenalizedIds | None = None

    @property
    def whole(self) -> bool:
        """Whether the step reads all of the request's ids."""
        return len(self.ids) == len(self.request.ids)

    def commit(self) -> None:
        step, self.step = self.step, None
        self.stream.commit(step, self.ids)


class TokenStream:
    """One stream of token ids through one model.

    Args:
        observers: told about ids that are read, rolled back and restored, but not about evictions.

    Attributes:
        ids: the ids of the attended tokens.
        lookahead: how many of the newest tokens are correct guesses that were read before they
            were requested.
        failed: whether a step has failed. The rows are then released, and nothing more can be
            read.
    """

    def __init__(self, model: Model, cache: Cache, observers: Sequence[StreamObserver] = ()):
        self.ids, self.lookahead, self.failed = AttendedIds(cache, observers), 0, False
        self.network, self.cache, self.compiled_steps = model.network, cache, model.compiled_steps
        self._tracing = backend.tracing()
        self._pending: PendingStep | None = None
        self._vocabulary = model.config.vocab_size
        # Results of the last step, evaluated before the next one so that the graph does not grow.
        self._computed: list[mx.array] = []

    @property
    def length(self) -> int:
        return self.cache.length

    @property
    def attended(self) -> int:
        """How many tokens the newest token attends to, ignoring the lookahead."""
        if not self.lookahead:
            return self.cache.attended
        return len(self.cache.attended_rows(self.lookahead))

    def run(self, request: ReadRequest) -> ReadResult:
        """Read a request's ids, or as many of them as fit in one step.

        Raises:
            ValueRefused: there are no ids, `chunk` is below 1, or this process was forked.
            TokenizerError: the model has no embedding for an id.
            WeightsError, RuntimeError, MemoryError: the step failed. The rows are released, because
                their contents are unknown.
        """
        check_process()
        started, ids, want = time.perf_counter(), request.ids, request.want
        count, logits, token = len(ids), None, -1
        try:
            if want is Want.TOKEN:
                assert request.sampler is not None
                token, found = self.next(ids[0], request.sampler, request.more)
                logits = found if request.sampler.logprobs is not None else None
            elif want is Want.ROWS:
                logits = self.verify(ids)
            else:
                count = self._step_length(ids, request.chunk)
                wanted = want is Want.LOGITS and count == len(ids)
                found = self._read(ids[:count], prefill=not wanted)
                if wanted:
                    logits = last_logits(self.network, found, check=True)
                else:
                    mx.eval(found)
        except STEP_ERRORS:
            self.fail()
            raise
        return ReadResult(count, time.perf_counter() - started, logits, token)

    def plan(self, request: ReadRequest) -> PlannedRead:
        """Plan a request's step, to be shared with those of other streams; see `shared_step`.

        Raises:
            ValueRefused, TokenizerError, RuntimeError, MemoryError: as for `run`.
        """
        check_process()
        ids, want, sampler = request.ids, request.want, request.sampler
        self.drop_pending()
        try:
            mx.eval(self._computed)
            if want in (Want.NOTHING, Want.LOGITS):
                ids = ids[: self._step_length(ids, request.chunk)]
            else:
                check_ids(ids, self._vocabulary)
                self.lookahead = 0
            step = self._plan(len(ids), verify=want is Want.ROWS, pad=False)
        except STEP_ERRORS:
            self.fail()
            raise
        penalized = None
        if want is Want.TOKEN and sampler:
            penalized = penalized_next(self, sampler, mx.array([*ids], mx.int32))
        return PlannedRead(self, request, ids, step, penalized)

    def commit(self, step: Any, ids: Sequence[int]) -> None:
        """Commit a step that read `ids`; its arrays are evaluated later."""
        self.ids.record()
        self.ids.expect(ids)
        self._computed = []
        self.cache.commit(step)

    def fail(self) -> None:
        """Release the rows after a failed step, because their contents are unknown."""
        self.failed = True
        self._pending, self._computed = None, []  # both hold references to the rows
        self.cache.release()

    def read(self, ids: Sequence[int], chunk: int = PREFILL_CHUNK) -> mx.array:
        """Read token ids and return the logits (vocabulary,) after the last one.

        The logits of a single token are not evaluated, so that choosing the next token can be part
        of the same graph, and there is only one wait for the device per token.

        Args:
            ids: at least one.
            chunk: the maximum number of tokens per step; 1 decodes token by token.
        """
        *_, hidden = self.steps(ids, chunk, prefill=True)
        return last_logits(self.network, hidden, check=len(ids) > 1)

    def steps(
        self, ids: Sequence[int], chunk: int = PREFILL_CHUNK, prefill: bool = False
    ) -> Iterator[mx.array]:
        """Read token ids and yield each step's hidden states (1, T, hidden size).

        They are evaluated before the next step starts, if not earlier.

        Args:
            prefill: in all steps but the last, compute only what the stream needs.
        """
        done = 0
        while done < len(ids) or not ids:
            count = self._step_length(ids[done:], chunk)
            part, done = ids[done : done + count], done + count
            yield self._read(part, prefill and done < len(ids))

    def next(self, token: int, sampler: Sampler, more: bool = True) -> tuple[int, mx.array]:
        """Read one token; return the next, chosen by `sampler`, and the logits (vocabulary,).

        Args:
            more: whether another step is likely to follow. If so, it is built while the device
                computes this one, before its token is known. Any other read discards it.
        """
        check_ids([token], self._vocabulary)
        self.lookahead = 0
        pending, self._pending = self._pending, None
        if pending and is_next(pending, self.cache.version, token, sampler):
            step, output = pending.step, pending.output
        else:
            mx.eval(self._computed)
            step = self._plan(1)
            output = self._decode(step, mx.array([[token]], mx.uint32), sampler, sampler.random.key)
        del pending
        self.commit(step, [token])
        del step  # only the update may hold references to the buffers
        chosen, key = output.token, output.key
        assert chosen is not None and key is not None
        self._computed = [chosen, key]
        mx.async_eval(chosen, key)
        if more and self.cache.is_ready(1):
            version, step = self.cache.version, self.cache.plan(1)
            following = self._decode(step, chosen.reshape(1, 1), sampler, key)
            self._pending = PendingStep(version, chosen, sampler, key, step, following)
        found = as_int(chosen)
        sampler.random.key = key
        return found, output.logits

    def verify(self, ids: Sequence[int]) -> mx.array:
        """Read up to the cache's `max_verify` ids and return the logits (T, vocabulary) after each.

        All but the first can be rolled back.
        """
        check_ids(ids, self._vocabulary)
        self.drop_pending()
        mx.eval(self._computed)
        step = self._plan(len(ids), verify=True)
        logits = self.network.logits(self.network(mx.array([[*ids]], mx.int32), step))[0]
        self.commit(step, ids)
        del step
        self._computed = [logits]
        mx.eval(logits)
        return logits

    def rewind(self, count: int) -> None:
        """Roll back the newest `count` tokens; see the cache's `rewind`."""
        self.ids.record()
        self.drop_pending()
        self.lookahead = 0  # this comes first, so that an interrupt cannot lead to a second rewind
        self.cache.rewind(count)
        self.ids.rewind(count)

    def drop_pending(self) -> None:
        """Drop the prebuilt step, which holds references to the buffers."""
        self._pending = None

    def state(self) -> dict[str, mx.array | int]:
        """Return the cache's state and the ids by row; the arrays are live, not copies.

        Keys, values and ids that are not attended are zero.
        """
        self.erase()
        return {**self.cache.state(), IDS: mx.array(self.ids.by_row, mx.uint32)}

    def erase(self) -> None:
        """Zero the keys, values and ids that are not attended."""
        self.ids.record()
        self.drop_pending()
        self.cache.erase()
        self.ids.erase()

    def restore(self, state: dict[str, mx.array | int]) -> None:
        """Continue from the state of a stream with the same model and cache parameters.

        Raises:
            ValueRefused: the state does not fit; the stream is unchanged.
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
        """Return how many of the ids the next step reads, after checking them."""
        if not ids or chunk < 1:
            raise ValueRefused(f"cannot read {len(ids)} tokens in chunks of {chunk}")
        count = self.cache.max_step(min(chunk, len(ids)))
        check_ids(ids[:count], self._vocabulary)
        self.lookahead = 0
        return count

    def _read(self, part: Sequence[int], prefill: bool = False) -> mx.array:
        """Read one step's ids and return its hidden states; with `prefill`, skip unneeded work."""
        self.drop_pending()
        mx.eval(self._computed)
        step = self._plan(len(part))
        if len(part) == 1:
            found = self._decode(step, mx.array([part], mx.uint32)).hidden
            self.commit(step, part)
            self._computed = [found]
            return found
        # Padded with one of the step's own ids, so that the padding cannot introduce a new NaN.
        tokens = mx.array([[*part, *[part[-1]] * (step.rows - step.count)]], mx.int32)
        compute = self.network.prefill if prefill else self.network
        found = compute(tokens, step)[:, : step.count]
        self.commit(step, part)
        del step
        self._computed = [found]
        # A chunk attends to the buffers as they were before its own rows were written. If the
        # chunk and the update were evaluated together, the buffers would be copied on Metal.
        mx.eval(found)
        mx.eval(self.cache.arrays())
        return found

    def _plan(self, count: int, verify: bool = False, pad: bool = True) -> Any:
        """Return the step that reads the next `count` tokens; nothing is evicted yet."""
        self.ids.record()
        self.cache.prepare(count)
        return self.cache.plan(count, verify, pad)

    def _decode(
        self,
        step: Any,
        tokens: mx.array,
        sampler: Sampler | None = None,
        key: mx.array | None = None,
    ) -> DecodeOutput:
        """Build one token's step without committing it."""
        penalized = None
        if sampler:
            penalized = penalized_next(self, sampler, tokens[0].astype(mx.int32))
        return self.compiled_steps.decode(step, tokens, self._tracing, sampler, key, penalized)


def penalized_next(stream: TokenStream, sampler: Sampler, token: mx.array) -> PenalizedIds | None:
    """Return the ids that a sampler's penalty, if any, covers after `token`, (1,) int32."""
    if not sampler.mode.penalizes:
        return None
    stream.ids.record()
    attended = stream.cache.attended_next()
    ids = np.zeros(len(attended), np.int32)
    ids[: len(stream.ids.by_row)] = stream.ids.by_row[: len(ids)]
    return PenalizedIds(mx.concatenate([mx.array(ids), token]), mx.array(np.append(attended, True)))


def last_logits(network: CausalLM, hidden: mx.array, check: bool) -> mx.array:
    """Return the logits (vocabulary,) after the last row; with `check`, reject NaN."""
    logits = network.logits(hidden[:, -1])[0]
    if check and not mx.isfinite(logits).all().item():
        raise WeightsError(NOT_A_NUMBER)
    return logits


def is_next(pending: PendingStep, version: object, token: int, sampler: Sampler) -> bool:
    """Return whether a step built in advance is the one needed now."""
    same_draw = pending.sampler is sampler and sampler.random.key is pending.key
    return version is pending.version and same_draw and pending.token.item() == token


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raise TokenizerError for an id that the model has no embedding for."""
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise TokenizerError(
            f"token id {max(ids)} is outside the model's vocabulary of {vocabulary}: the tokenizer "
            "does not match this model"
        )


def generate(
    stream: TokenStream,
    prompt: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    ends: Collection[int] = (),
) -> Generator[int, None, None]:
    """Read a prompt and yield the ids chosen after it, up to and including one of `ends`."""
    token = sampler.choose(stream.read(prompt), stream.ids.attended)
    try:
        for left in range(max_tokens - 1, -1, -1):
            yield token
            if token in ends or not left:
                return
            token, _ = stream.next(token, sampler, more=left > 1)
    finally:
        stream.drop_pending()


def check_max_tokens(max_tokens: int) -> int:
    """Return a token limit; raise ValueRefused unless it is an integer of at least 1."""
    if not isinstance(max_tokens, Integral) or max_tokens < 1:
        raise ValueRefused(f"`max_tokens` must be a whole number, at least 1, not {max_tokens!r}")
    return max_tokens
