"""Chooses the next token from logits; independent of streams and models.

A traced step has a fixed mode. The numbers are arrays, so a new temperature needs no new trace.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, TypedDict, get_type_hints

import mlx.core as mx
import numpy as np

from mlx_stream.errors import TypeRefused, ValueRefused
from mlx_stream.errors.argument_types import refuse_wrong_types

LOWEST_TEMPERATURE = 1e-30  # the lowest above 0; smaller ones are 0 in float32
MOST_LOGPROBS = 20
HIGHEST_BIAS = 1e30  # float32 can hold it, and its sum with a logit

# Takes the ids of a reply so far and returns a bool array (vocabulary,) of the tokens that may come
# next, or None for any.
Mask = Callable[[Sequence[int]], np.ndarray | None]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: from 0 to 5; 0 means greedy: then only the penalty has an effect.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities add up to this; 1 keeps all.
        min_p: keep tokens with at least this fraction of the top probability; 0 keeps all.
        repetition_penalty: divide the logits of attended tokens by it (multiply negative ones;
            arXiv 1909.05858); 1 leaves them unchanged. Evicted tokens are not penalized.
        seed: seed of the random number generator; None picks one at random.

    If several tokens tie for last place, all of them are kept.

    Raises:
        ValueRefused: a number is out of range.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        refuse_wrong_types(vars(self), _field_types())
        penalty = self.repetition_penalty
        for name, value, holds, expected in (
            ("temperature", self.temperature, 0 <= self.temperature <= 5, "from 0 to 5"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", penalty, 0.01 <= penalty <= 100, "from 0.01 to 100"),
            ("seed", self.seed, 0 <= (self.seed or 0) < 2**64, "from 0 to 2^64 - 1"),
        ):
            if not holds:
                raise ValueRefused(f"`{name}` must be {expected}, not {value}")

    def with_seed(self) -> "Sampling":
        """Return the same settings; draw a seed if there is none."""
        if self.seed is not None:
            return self
        return replace(self, seed=int.from_bytes(os.urandom(4), "little"))


@cache
def _field_types() -> dict[str, Any]:
    return get_type_hints(Sampling)


class ReplyOptions(TypedDict, total=False):
    """How the tokens of one reply are chosen.

    Attributes:
        sampling: replaces the session's. Its random numbers continue the session's unless it has a
            seed.
        bias: added to the logits of these ids.
        mask: returns which of the model's `vocab_size` tokens may come next. An engine calls it on
            its own thread. With a mask, no tokens are guessed and no steps are built ahead.
        logprobs: report the log-probability of each token and of this many of the likeliest tokens
            (0 to 20). In that case, no tokens are guessed.
    """

    sampling: Sampling | None
    bias: Mapping[int, float] | None
    mask: Mask | None
    logprobs: int | None


@dataclass(frozen=True)
class SamplingMode:
    """Which sampling steps are active."""

    greedy: bool
    penalizes: bool
    top_k: bool
    top_p: bool
    min_p: bool
    biased: bool = False

    @classmethod
    def of(cls, sampling: Sampling) -> "SamplingMode":
        greedy = sampling.temperature == 0
        return cls(
            greedy,
            sampling.repetition_penalty != 1,
            not greedy and sampling.top_k > 0,
            not greedy and sampling.top_p < 1,
            not greedy and sampling.min_p > 0,
        )


@dataclass(frozen=True)
class PenalizedIds:
    """Ids to penalize: those of `ids` (n,) int32 whose entry in `attended` (n,) bool is true."""

    ids: mx.array
    attended: mx.array

    @classmethod
    def of(cls, arrays: Sequence[mx.array]) -> "PenalizedIds | None":
        return cls(*arrays) if arrays else None


@dataclass
class RandomKey:
    """A generator's state: `key` (2,) uint32, replaced by each draw."""

    key: mx.array


def check_bias(bias: Mapping[int, float], vocabulary: int) -> None:
    """Refuse a bias that is out of range or is for a token that does not exist.

    Raises:
        ValueRefused: the bias cannot be used.
    """
    for id, value in bias.items():
        known = isinstance(id, Integral) and 0 <= id < vocabulary
        if not (known and isinstance(value, Real) and value <= HIGHEST_BIAS):
            raise ValueRefused(
                f"the bias of token {id!r} is {value!r}: use an id below {vocabulary:,}, "
                f"and a number of at most {HIGHEST_BIAS:g}"
            )


class Sampler:
    """Choose tokens one after another; the state is a single random key.

    Args:
        mask, logprobs: see `ReplyOptions`.
        source: a sampler whose random numbers this one continues.

    Attributes:
        mode: the sampling steps that are active.
        numbers: the parameters of these steps: arrays by name, each with one element except `bias`.
        random: the random key; shared with `source`.
        allows_guessing: whether several tokens may be verified at once. False for a reply with its
            own seed: how many tokens are guessed depends on timing, so it would not be
            reproducible.
    """

    def __init__(
        self,
        sampling: Sampling,
        mask: Mask | None = None,
        logprobs: int | None = None,
        source: "Sampler | None" = None,
    ):
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise ValueRefused(f"logprobs must be from 0 to {MOST_LOGPROBS}, not {logprobs}")
        self.sampling, self.mask, self.logprobs = sampling.with_seed(), mask, logprobs
        assert self.sampling.seed is not None
        self.mode = SamplingMode.of(self.sampling)
        self.numbers = {
            "temperature": mx.array(max(self.sampling.temperature, LOWEST_TEMPERATURE)),
            "top_k": mx.array(min(self.sampling.top_k, 2**31 - 1), mx.int32),
            "excess": mx.array(1 - self.sampling.top_p),
            "min_p": mx.array(math.log(self.sampling.min_p) if self.sampling.min_p else -math.inf),
            "penalty": mx.array(self.sampling.repetition_penalty),
        }
        self.random = source.random if source else RandomKey(mx.random.key(self.sampling.seed))
        self._bias: np.ndarray | None = None
        self.allows_guessing = mask is None and logprobs is None
        mx.eval(self.numbers, self.random.key)

    def for_reply(self, vocabulary: int, options: ReplyOptions) -> "Sampler":
        """Return the sampler for one reply: this one, if no option is given.

        Raises:
            ValueRefused: an option is out of range.
        """
        if unknown := sorted(options.keys() - ReplyOptions.__annotations__.keys()):
            raise TypeRefused(f"`{unknown[0]}` is not a reply option")
        refuse_wrong_types(options, get_type_hints(ReplyOptions))
        chosen = {name: value for name, value in options.items() if value is not None}
        if not chosen:
            return self
        given, bias = options.get("sampling"), options.get("bias")
        source = None if given and given.seed is not None else self
        mask, logprobs = options.get("mask"), options.get("logprobs")
        sampler = Sampler(given or self.sampling, mask, logprobs, source)
        sampler.allows_guessing &= source is not None
        if bias or mask:
            sampler._set_bias(bias or {}, vocabulary)
        return sampler

    def _set_bias(self, bias: Mapping[int, float], vocabulary: int) -> None:
        check_bias(bias, vocabulary)
        self._bias = np.zeros(vocabulary, np.float32)
        for id, value in bias.items():
            self._bias[id] = max(float(value), -math.inf if value == -math.inf else -HIGHEST_BIAS)
        if not np.isfinite(self._bias).any():
            raise ValueRefused("a bias must leave at least one token that can be chosen")
        self.mode = replace(self.mode, biased=True)
        self.numbers["bias"] = mx.array(self._bias)

    def restrict(self, ids: Sequence[int]) -> None:
        """Ask the mask, if there is one, which tokens may follow these ids of a reply.

        Raises:
            ValueRefused: the mask allows no token, or has the wrong size.
        """
        if self.mask is None or self._bias is None:
            return
        bias = self._bias
        try:
            allowed = self.mask(tuple(ids))
            fits = allowed is None or np.shape(allowed) == bias.shape
        except Exception as error:
            raise ValueRefused(f"the mask failed: {type(error).__name__}: {error}") from error
        if allowed is not None:
            if fits:
                bias = np.where(allowed, bias, -math.inf).astype(np.float32)
            if not (fits and np.isfinite(bias).any()):
                raise ValueRefused(
                    f"a mask must have {len(bias):,} entries and allow at least one token"
                )
        self.numbers = {**self.numbers, "bias": mx.array(bias)}

    def state(self) -> str:
        """Return the random key, in hexadecimal."""
        return np.array(self.random.key).tobytes().hex()

    def restore(self, state: str) -> None:
        """Continue from `state`.

        Raises:
            ValueRefused: `state` is not a valid state.
        """
        try:
            words = np.frombuffer(bytes.fromhex(state), np.uint32)
        except ValueError:
            words = np.zeros(0, np.uint32)
        if words.shape != self.random.key.shape:
            raise ValueRefused("not a random number generator's state")
        self.random.key = mx.array(words)

    def choose(self, logits: mx.array, attended: Callable[[], Sequence[int]]) -> int:
        """Return a token for logits (vocabulary,); `attended` returns the ids to penalize."""
        penalized = None
        if self.mode.penalizes and (ids := attended()):
            penalized = PenalizedIds(mx.array([*ids], mx.int32), mx.ones(len(ids), mx.bool_))
        key = self.random.key
        token, self.random.key = choose_token(self.mode, self.numbers, logits, key, penalized)
        return as_int(token)


def as_int(array: mx.array) -> int:
    value = array.item()
    assert isinstance(value, int)
    return value


def choose_token(
    mode: SamplingMode,
    numbers: dict[str, mx.array],
    logits: mx.array,
    key: mx.array,
    penalized: PenalizedIds | None,
) -> tuple[mx.array, mx.array]:
    """Return a token for logits (vocabulary,), as a uint32 scalar, and the next random key."""
    logits = logits.astype(mx.float32)
    if mode.biased:
        logits = logits + numbers["bias"]
    if mode.penalizes and penalized is not None:
        logits = penalize(logits, penalized, numbers["penalty"])
    if mode.greedy:
        return mx.argmax(logits), key
    following, drawn = mx.random.split(key)
    # The highest logit becomes 0, so that it stays finite however small the temperature is.
    cooled = (logits - logits.max()) / numbers["temperature"]
    return mx.random.categorical(truncate(cooled, mode, numbers), key=drawn), following


def penalize(logits: mx.array, penalized: PenalizedIds, penalty: mx.array) -> mx.array:
    """Make attended tokens less likely (arXiv 1909.05858); a repeated token counts once."""
    counts = mx.zeros(logits.shape, mx.int32)
    chosen = counts.at[penalized.ids].maximum(penalized.attended.astype(mx.int32)) > 0
    lowered = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(chosen, lowered, logits)


def truncate(logits: mx.array, mode: SamplingMode, numbers: dict[str, mx.array]) -> mx.array:
    """Set logits that top-k, top-p or min-p exclude to -inf, using thresholds from one sort."""
    if mode.top_k or mode.top_p:
        rising = mx.sort(logits)
        if mode.top_k:
            lowest = rising[mx.maximum(logits.size - numbers["top_k"], 0)]
            logits, rising = (mx.where(x < lowest, -math.inf, x) for x in (logits, rising))
        if mode.top_p:
            below = mx.cumsum(mx.softmax(rising, precise=True))
            # The lowest logit kept is the first one where the tail's sum exceeds 1 - p.
            first = mx.argmax(below > numbers["excess"])
            logits = mx.where(logits < rising[first], -math.inf, logits)
    if mode.min_p:
        logits = mx.where(logits < logits.max() + numbers["min_p"], -math.inf, logits)
    return logits
