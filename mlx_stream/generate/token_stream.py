"""Prefill, decode, sample: token ids only, no text."""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

from mlx_stream import backend
from mlx_stream.cache import Cache, StreamCache
from mlx_stream.cache.steps.verify import Verifying
from mlx_stream.errors import TokenizerError, ValueRefused, WeightsError
from mlx_stream.load import Model
from mlx_stream.models.compiled import DecodeOutput, decode_eagerly, worth_tracing
from mlx_stream.sampling import PenalizedIds, Sampler, Sampling, as_int
from mlx_stream.window import PREFILL_CHUNK

__all__ = ["PREFILL_CHUNK", "Sampler", "Sampling", "TokenStream", "as_int", "generate"]

IDS = "ids"  # of the attended tokens, in a stream's state


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

    def fits(self, held: object, token: int, sampler: Sampler) -> bool:
        same_draw = self.sampler is sampler and sampler.key is self.key
        return held is self.version and same_draw and self.token.item() == token


class StreamObserver(Protocol):
    """What is told how a stream goes, to guess how it goes on."""

    def read(self, ids: Sequence[int]) -> None:
        """Ids have been read."""

    def rewind(self, count: int) -> None:
        """The newest have been taken back."""

    def restart(self, ids: Sequence[int]) -> None:
        """The stream is another one, of which these ids are attended."""

    def erase(self) -> None:
        """Keep nothing of what was taken back: the stream's state is given out."""


class TokenStream:
    """One stream of token ids through one model: its cache, and the ids that are attended.

    Attributes:
        follower: told how the stream goes, evictions apart; None if there is none.
        lookahead: how many of the newest tokens are what follows, but were read before they were
            asked for, as `speculate` does.
        drafted, accepted: tokens that were guessed and verified, and those that were right.
    """

    def __init__(self, model: Model, cache: Cache, follower: StreamObserver | None = None):
        self.observer, self.lookahead = follower, 0
        self.drafted = self.accepted = 0
        self.network, self.cache, self._traces = model.network, cache, model.compiled_steps
        self._tracing = backend.tracing()
        self._pending: PendingStep | None = None
        # By row, like keys and values; and the ids of a step that may not be noted yet.
        self._ids: list[int] = []
        self._step: tuple[int, Sequence[int]] = (0, ())
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
        assert isinstance(self.cache, StreamCache)
        geometry = self.cache.geometry
        return geometry.sinks + geometry.ring_count(
            geometry.rewind(self.cache.position, self.lookahead)
        )

    @property
    def evicted(self) -> int:
        return self.length - self.lookahead - self.attended

    def attended_ids(self, before: int = 0) -> list[int]:
        """Return the ids the newest token attends to, in the order of the text.

        Args:
            before: of the token that many before the newest, to which its successors do not.
        """
        self.record()
        return [self._ids[row] for row in self.cache.attended_rows(before)]

    def read(
        self,
        ids: Sequence[int],
        chunk: int = PREFILL_CHUNK,
        progress: Callable[[int], None] | None = None,
    ) -> mx.array:
        """Read token ids and return the logits (vocabulary,) after the last one.

        The logits of a single token are not evaluated yet: choosing the next one from them is one
        more node of the same graph, and a device is waited for once per token.

        Args:
            ids: at least one.
            chunk: tokens a step at most; 1 decodes token by token.
            progress: called after each step with the number of tokens it read.
        """
        hidden = None
        for part, last in self._parts(ids, chunk):
            hidden = self._read(part, prefill=not last)
            if progress:
                progress(len(part))
        assert hidden is not None
        logits = self.network.logits(hidden[:, -1])[0]
        if len(ids) > 1 and not mx.isfinite(logits).all().item():
            raise WeightsError(
                "the model's output is not a number: its weights are damaged, or overflow in this "
                "dtype (try --dtype float32)"
            )
        return logits

    def next(self, token: int, sampler: Sampler, more: bool = True) -> int:
        """Read one token and return the one that `sampler` chooses after it.

        Args:
            more: whether another step is likely to follow: it is built, from the token that is not
                known yet, while the device computes this one. Asking for anything else drops it.
        """
        self._check([token])
        self.lookahead = 0
        ahead, self._pending = self._pending, None
        if ahead and ahead.fits(self.cache.version(), token, sampler):
            step, decoded = ahead.step, ahead.output
        else:
            mx.eval(self._computed)
            step = self.cache.begin(1)
            decoded = self._decode(step, mx.array([[token]], mx.uint32), sampler, sampler.key)
        del ahead
        self._commit(step, [token])
        del step  # nothing but the update may hold the buffers
        chosen, key = decoded.token, decoded.key
        assert chosen is not None and key is not None
        self._computed = [chosen, key]
        mx.async_eval(chosen, key)
        held = self.cache.version() if more else None
        if held is not None:
            step = self.cache.begin(1)
            following = self._decode(step, chosen.reshape(1, 1), sampler, key)
            self._pending = PendingStep(held, chosen, sampler, key, step, following)
        found = as_int(chosen)
        sampler.key = key
        return found

    def synchronize(self) -> None:
        """Compute what was read last, which else waits for the next step: for other threads."""
        mx.eval(self._computed)

    def drop_pending(self) -> None:
        """Let go of a step that was built ahead: it holds the buffers."""
        self._pending = None

    def steps(self, ids: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[mx.array]:
        """Read token ids step by step; yields each step's hidden states (1, T, hidden size).

        They are evaluated before the next step at the latest.

        Raises:
            ValueRefused: no ids, or `chunk` below 1.
            TokenizerError: an id the model has no embedding for; reading on would read past it.
        """
        for part, _ in self._parts(ids, chunk):
            yield self._read(part)

    def prefill(self, ids: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[int]:
        """Read token ids of which no prediction is asked; yields how many each step read.

        The last layer only stores its keys and values: of `steps`, nothing else is attended to.

        Raises:
            ValueRefused, TokenizerError: as of `steps`.
        """
        for part, _ in self._parts(ids, chunk):
            self._read(part, prefill=True)
            yield len(part)

    def _parts(self, ids: Sequence[int], chunk: int) -> Iterator[tuple[Sequence[int], bool]]:
        """Return the ids of each step, which is read before the next is asked for, and if last."""
        if not ids or chunk < 1:
            raise ValueRefused(f"cannot read {len(ids)} tokens in chunks of {chunk}")
        self._check(ids)
        done, self.lookahead = 0, 0
        while done < len(ids):
            part = ids[done : done + self.cache.max_step(min(chunk, len(ids) - done))]
            done += len(part)
            yield part, done == len(ids)

    def _read(self, part: Sequence[int], prefill: bool = False) -> mx.array:
        """Read one step's ids; returns its hidden states, or what `prefill` of the network does."""
        self.drop_pending()
        mx.eval(self._computed)
        if len(part) == 1:
            step = self.cache.begin(1)
            found = self._decode(step, mx.array([part], mx.uint32)).hidden
            self._commit(step, part)
            self._computed = [found]
            return found
        self.record()
        self._step = (self.length, part)
        found = self.network(part, self.cache, prefill)
        self._computed = [found]
        # A chunk's attention reads the buffers as they were, their new rows come after:
        # evaluated together, Metal would still hold the old ones and copy them all.
        mx.eval(found)
        mx.eval(self.cache.arrays())
        return found

    def _check(self, ids: Sequence[int]) -> None:
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise TokenizerError(
                f"token id {max(ids)} is outside the model's vocabulary of {self._vocabulary}: the "
                "tokenizer is not the one the model was trained with"
            )

    def _decode(
        self,
        step: Any,
        tokens: mx.array,
        sampler: Sampler | None = None,
        key: mx.array | None = None,
    ) -> DecodeOutput:
        """Build one token's step, traced if it is worth it; nothing is part of the stream yet."""
        penalized = None
        if sampler and sampler.mode.penalizes:
            penalized = self._penalized(tokens)
        if worth_tracing(step, self._tracing):
            return self._traces.run(step, tokens, sampler, key, penalized)
        decoded = decode_eagerly(self.network, step, tokens, sampler, key, penalized)
        step.finish(step.keys, step.values)
        return decoded

    def _penalized(self, tokens: mx.array) -> PenalizedIds:
        """Return the ids attended once the next token, (1, 1), has been read, itself among them."""
        self.record()
        attended = self.cache.attended_next()
        ids = np.zeros(len(attended), np.int32)
        ids[: len(self._ids)] = self._ids[: len(ids)]
        return PenalizedIds(
            mx.concatenate([mx.array(ids), tokens[0].astype(mx.int32)]),
            mx.array(np.append(attended, True)),
        )

    def _commit(self, step: Any, ids: Sequence[int]) -> None:
        self.record()
        self._step = (self.length, ids)
        self.cache.commit(step)

    def verify(self, ids: Sequence[int]) -> mx.array:
        """Read up to `longest_verified` ids and return the logits (T, vocabulary) after each.

        All but the first can be taken back without a loss.
        """
        self.drop_pending()
        mx.eval(self._computed)
        self.record()
        assert isinstance(self.cache, StreamCache)
        self._step = (self.length, ids)
        logits = self.network.logits(self.network(ids, cast(Cache, Verifying(self.cache))))[0]
        self._computed = [logits]
        mx.eval(logits)
        return logits

    def rewind(self, count: int) -> None:
        """Take back the newest `count` tokens; see the cache's `rewind`."""
        self.record()
        self.drop_pending()
        self.lookahead = 0  # first: an interrupt must not leave what could be taken back twice
        self.cache.rewind(count)
        if self.observer and count:
            self.observer.rewind(count)

    def rollback_lookahead(self) -> None:
        """Take back what was read before it was asked for."""
        if self.lookahead:
            self.rewind(self.lookahead)

    def evict(self, count: int) -> None:
        """Drop the oldest `count` attended tokens that are not sinks."""
        self.drop_pending()
        self.cache.evict(count)

    def state(self) -> dict[str, mx.array | int]:
        """Return the whole state: the cache's, and the ids by row; the arrays are the live ones.

        What is not attended is zero in it, keys, values and ids alike.
        """
        self.erase()
        return {**self.cache.state(), IDS: mx.array(self._ids, mx.uint32)}

    def erase(self) -> None:
        """Keep nothing that is not attended: neither keys and values nor ids."""
        self.record()
        self.drop_pending()
        self.cache.erase()
        attended = {row: self._ids[row] for row in self.cache.attended_rows()}
        self._ids = [attended.get(row, 0) for row in range(max(attended, default=-1) + 1)]
        if self.observer:
            self.observer.erase()

    def restart_observer(self) -> None:
        """Have the follower know no more than what is attended: the rest is not to be kept."""
        if self.observer:
            self.observer.restart(self.attended_ids())

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
        self._ids, self._step, self._computed, self._pending = known, (0, ()), [], None
        self.lookahead = 0
        if self.observer:
            self.observer.restart(self.attended_ids())

    def record(self) -> None:
        """Take down the last step's ids, unless it was interrupted before it was committed."""
        start, ids = self._step
        if ids and self.length > start:
            self._record(start, ids)
        self._step = (0, ())

    def _record(self, start: int, ids: Sequence[int]) -> None:
        for token, id in enumerate(ids, start):
            row = self.cache.row(token)
            self._ids.extend([0] * (row + 1 - len(self._ids)))
            self._ids[row] = id
        if self.observer:
            self.observer.read(ids)


def check_max_tokens(max_tokens: int) -> int:
    """Return a limit of tokens, or raise ValueRefused if it is below 1."""
    if max_tokens < 1:
        raise ValueRefused(f"--max-tokens must be at least 1, not {max_tokens}")
    return max_tokens


def read_in_steps(
    tokens: TokenStream, ids: Sequence[int], progress: Callable[[int], None] | None
) -> Iterator[None]:
    """Read ids and yield after each step."""
    for count in tokens.prefill(ids):
        if progress:
            progress(count)
        yield


def read_all_but_last_step(
    tokens: TokenStream, prompt: Sequence[int], progress: Callable[[int], None] | None
) -> Generator[None, None, Sequence[int]]:
    """Read a prompt but for its last step, and return what is left; yields after each step.

    The steps are those of a prompt that is read at once, so the numbers are the same, to the bit.
    """
    while (count := tokens.cache.max_step(min(PREFILL_CHUNK, len(prompt)))) < len(prompt):
        yield from read_in_steps(tokens, prompt[:count], progress)
        prompt = prompt[count:]
    return prompt


def generate(
    stream: TokenStream,
    prompt: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    end_ids: Collection[int] = (),
    progress: Callable[[int], None] | None = None,
) -> Generator[int, None, None]:
    """Read a prompt and yield up to `max_tokens` ids, as they are sampled.

    Ends early before an id in `end_ids`, which is neither yielded nor read. A yielded id is read
    when the next one is asked for, so the last one yielded has not been read.
    """
    token = sampler.choose(stream.read(prompt, progress=progress), stream.attended_ids)
    try:
        for sampled in range(1, max_tokens + 1):
            if token in end_ids:
                return
            yield token
            if sampled < max_tokens:
                token = stream.next(token, sampler, more=sampled + 1 < max_tokens)
    finally:
        stream.drop_pending()
