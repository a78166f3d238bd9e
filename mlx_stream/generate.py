"""Prefill, decode, sample: token ids only, no text."""

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_stream.cache import Cache
from mlx_stream.errors import TokenizerError, ValueRefused, WeightsError
from mlx_stream.load import Model

PREFILL_CHUNK = 128
IDS = "ids"  # of the attended tokens, in a stream's state
LOWEST_TEMPERATURE = 1e-30  # of those above 0; smaller ones are 0 in float32


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy, and the rest but the penalty has no effect.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: divide the logits of attended tokens by it (multiply negative ones;
            arXiv 1909.05858); 1 leaves them. Evicted tokens are not penalized.
        seed: of the random numbers; None draws one.

    Tokens as likely as the last one kept are kept too.

    Raises:
        ValueRefused: a number out of range.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = (
            ("temperature", "--temp", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", "--top-k", self.top_k >= 0, "0 or more"),
            ("top_p", "--top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", "--min-p", 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                "--repetition-penalty",
                0.01 <= self.repetition_penalty <= 100,
                "from 0.01 to 100",
            ),
            ("seed", "--seed", 0 <= (self.seed or 0) < 2**64, "from 0 to 2^64 - 1"),
        )
        for name, option, holds, expected in ranges:
            if not holds:
                raise ValueRefused(f"{option} must be {expected}, not {getattr(self, name)}")

    def seeded(self) -> "Sampling":
        """Return the same with a seed drawn if there was none."""
        if self.seed is not None:
            return self
        return replace(self, seed=int.from_bytes(os.urandom(4), "little"))


class Sampler:
    """Choose tokens one after another; its state is one random key."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling.seeded()
        assert self.sampling.seed is not None
        self.key = mx.random.key(self.sampling.seed)

    def state(self) -> str:
        """Return the random key, hexadecimal."""
        return np.array(self.key).tobytes().hex()

    def restore(self, state: str) -> None:
        """Go on from `state`.

        Raises:
            ValueRefused: it is not one.
        """
        try:
            words = np.frombuffer(bytes.fromhex(state), np.uint32)
        except ValueError:
            words = np.zeros(0, np.uint32)
        if words.shape != self.key.shape:
            raise ValueRefused("not a state of random numbers")
        self.key = mx.array(words)

    def choose(self, logits: mx.array, attended: Callable[[], Sequence[int]]) -> int:
        """Return a token for logits (vocabulary,); `attended` gives the ids that are penalized."""
        logits = logits.astype(mx.float32)
        if self.sampling.repetition_penalty != 1:
            logits = penalize(logits, attended(), self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            return number(mx.argmax(logits))
        self.key, key = mx.random.split(self.key)
        # From the highest down, so that no temperature, however small, divides to infinity.
        cooled = (logits - logits.max()) / max(self.sampling.temperature, LOWEST_TEMPERATURE)
        kept = truncate(cooled, self.sampling)
        return number(mx.random.categorical(kept, key=key))


def number(array: mx.array) -> int:
    value = array.item()
    assert isinstance(value, int)
    return value


def penalize(logits: mx.array, ids: Sequence[int], penalty: float) -> mx.array:
    """Make the tokens in `ids` less likely (arXiv 1909.05858); a token twice counts once."""
    if not ids:
        return logits
    rows = mx.array([*ids], mx.int32)
    chosen = logits[rows]
    logits = mx.array(logits)
    logits[rows] = mx.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def truncate(logits: mx.array, sampling: Sampling) -> mx.array:
    """Set to -inf what top-k, top-p and min-p leave out, by thresholds from one sort."""
    if sampling.top_k or sampling.top_p < 1:
        rising = mx.sort(logits)
        if 0 < sampling.top_k < logits.size:
            logits, rising = (
                mx.where(x < rising[-sampling.top_k], -math.inf, x) for x in (logits, rising)
            )
        if sampling.top_p < 1:
            below = mx.cumsum(mx.softmax(rising, precise=True))
            # The lowest one kept is the first with which the tail exceeds 1 - p.
            first = mx.argmax(below > 1 - sampling.top_p)
            logits = mx.where(logits < rising[first], -math.inf, logits)
    if sampling.min_p > 0:
        logits = mx.where(logits < logits.max() + math.log(sampling.min_p), -math.inf, logits)
    return logits


class TokenStream:
    """One stream of token ids through one model: its cache, and the ids that are attended."""

    def __init__(self, model: Model, cache: Cache):
        self.network, self.cache = model.network, cache
        # By row, like keys and values; and the ids of a step that may not be noted yet.
        self._ids: list[int] = []
        self._step: tuple[int, Sequence[int]] = (0, ())
        self._vocabulary = model.config.vocab_size
        # What the last step computed; evaluated before the next, so that no graph grows.
        self._computed: list[mx.array] = []

    @property
    def length(self) -> int:
        return self.cache.length

    def attended_ids(self) -> list[int]:
        """Return the ids the newest token attends to, in the order of the text."""
        self._note()
        return [self._ids[row] for row in self.cache.attended_rows()]

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
        for hidden in self.steps(ids, chunk):
            if progress:
                progress(hidden.shape[1])
        assert hidden is not None
        logits = self.network.logits(hidden[:, -1])[0]
        if len(ids) > 1 and not mx.isfinite(logits).all().item():
            raise WeightsError(
                "the model's output is not a number: its weights are damaged, or overflow in this "
                "dtype (try --dtype float32)"
            )
        return logits

    def steps(self, ids: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[mx.array]:
        """Read token ids step by step; yields each step's hidden states (1, T, hidden size).

        They are evaluated before the next step at the latest.

        Raises:
            ValueRefused: no ids, or `chunk` below 1.
            TokenizerError: an id the model has no embedding for; reading on would read past it.
        """
        if not ids or chunk < 1:
            raise ValueRefused(f"cannot read {len(ids)} tokens in chunks of {chunk}")
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise TokenizerError(
                f"token id {max(ids)} is outside the model's vocabulary of {self._vocabulary}: the "
                "tokenizer is not the one the model was trained with"
            )
        done = 0
        while done < len(ids):
            mx.eval(self._computed)
            count = self.cache.take(min(chunk, len(ids) - done))
            self._note()
            self._step = (self.length, ids[done : done + count])
            hidden = self.network(ids[done : done + count], self.cache)
            done += count
            self._computed = [hidden]
            if count > 1:
                # A chunk's attention reads the buffers as they were, their new rows come after:
                # evaluated together, Metal would still hold the old ones and copy them all.
                mx.eval(hidden)
                mx.eval(self.cache.arrays())
            yield hidden

    def rewind(self, count: int) -> None:
        """Take back the newest `count` tokens; see the cache's `rewind`."""
        self._note()
        self.cache.rewind(count)

    def evict(self, count: int) -> None:
        """Drop the oldest `count` attended tokens that are not sinks."""
        self.cache.evict(count)

    def state(self) -> dict[str, mx.array | int]:
        """Return the whole state: the cache's, and the ids by row; the arrays are the live ones."""
        self._note()
        return {**self.cache.state(), IDS: mx.array(self._ids, mx.uint32)}

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
        self._ids, self._step, self._computed = known, (0, ()), []

    def _note(self) -> None:
        """Note the last step's ids, if it was not interrupted before it was part of the stream."""
        start, ids = self._step
        if ids and self.length > start:
            self._record(start, ids)
        self._step = (0, ())

    def _record(self, start: int, ids: Sequence[int]) -> None:
        for token, id in enumerate(ids, start):
            row = self.cache.row(token)
            self._ids.extend([0] * (row + 1 - len(self._ids)))
            self._ids[row] = id


def generate(
    stream: TokenStream,
    prompt: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    end_ids: Collection[int] = (),
    progress: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Read a prompt and yield up to `max_tokens` ids, as they are sampled.

    Ends early before an id in `end_ids`, which is neither yielded nor read. A yielded id is read
    when the next one is asked for, so the last one yielded has not been read.
    """
    logits = stream.read(prompt, progress=progress)
    for sampled in range(max_tokens):
        token = sampler.choose(logits, stream.attended_ids)
        if token in end_ids:
            return
        yield token
        if sampled + 1 < max_tokens:
            logits = stream.read([token])
