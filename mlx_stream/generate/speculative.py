"""Guesses the next tokens and verifies them in one step: the same ids in fewer steps.

A guess is kept only where it equals the id that the sampler chooses anyway. So the ids are those of
plain decoding with the same seed, except that several rows computed at once round differently.
(For guesses that are not random, this is speculative sampling, arXiv 2211.17192.)
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_stream.cache import StreamCache
from mlx_stream.cache.steps.verify import spare_rows
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.attended_ids import StreamObserver
from mlx_stream.generate.draft_length import DraftLengthController
from mlx_stream.generate.draft_model import DraftModel, check_draft
from mlx_stream.generate.model import Model
from mlx_stream.generate.ngram import NgramDraft, NgramLookup
from mlx_stream.generate.token_stream import STEP_ERRORS, TokenStream
from mlx_stream.program.notices import Notify
from mlx_stream.sampling import Sampler, Sampling


@dataclass(frozen=True)
class Guess:
    """Ids that may come next.

    Attributes:
        ids: the ids worth verifying.
        ngram: the guess from the stream's own past.
        modelled: the draft model's guess, if it was asked.
    """

    ids: Sequence[int]
    ngram: NgramDraft
    modelled: Sequence[int] = ()


class Speculator:
    """Guess from a stream's own past, and with a draft model if there is one.

    Args:
        length: decides how many tokens to guess.
        drafter: asked when the past offers no guess worth verifying.

    Attributes:
        observers: must observe the stream.
    """

    def __init__(
        self, length: DraftLengthController | None = None, drafter: DraftModel | None = None
    ):
        self.length, self.drafter = length or DraftLengthController(), drafter
        self.ngram = NgramLookup()
        self.observers: list[StreamObserver] = [self.ngram, drafter] if drafter else [self.ngram]

    def guess(self, stream: TokenStream, token: int, most: int, ends: Collection[int]) -> Guess:
        """Guess up to `most` ids after `token`, which has not been read yet.

        Args:
            ends: a guess stops before the first of these ids.
        """
        stream.ids.record()  # brings the observers up to date
        most = min(stream.cache.max_verify - 1, most)
        found = self.ngram.draft(token, most)
        likely = [self.length.chance(found.matched + i) for i in range(len(found.ids))]
        ids = ids_before(ends, found.ids[: self.length.choose(likely)])
        if ids or not self.drafter or most < 1:
            return Guess(ids, found)
        each = self.length.in_steps(self.drafter.seconds)
        count = self.length.choose([self.drafter.chance] * most, each)
        try:
            modelled = self.drafter.draft(token, count) if count else ()
        except STEP_ERRORS:
            stream.fail()  # the state of the draft model is unknown
            raise
        return Guess(ids_before(ends, modelled), found, modelled)

    def learn(self, guess: Guess, chosen: Sequence[int], seconds: float | None) -> None:
        """Learn from the chosen ids and, if the step was not shared, from its duration."""
        if seconds is not None:
            self.length.record_step(1 + len(guess.ids), seconds)
        self.length.judge(guess.ngram.matched, guess.ngram.ids, chosen)
        if self.drafter and guess.modelled:
            self.drafter.judge(guess.modelled, chosen)


def choose_verified(
    stream: TokenStream, sampler: Sampler, guessed: Sequence[int], rows: mx.array
) -> tuple[list[int], list[mx.array]]:
    """Return one or more ids chosen after a verified guess, and the sampler's key after each.

    All but the last of them have been read. Wrong guesses are rolled back.

    Args:
        rows: logits (T, vocabulary) after the token before the guess and after each guessed id.
    """
    chosen: list[int] = []
    keys: list[mx.array] = []
    for row, logits in enumerate(rows):
        later = len(guessed) - row
        chosen.append(sampler.choose(logits, lambda: stream.ids.attended(later)))  # noqa: B023
        keys.append(sampler.random.key)
        if row == len(guessed) or chosen[-1] != guessed[row]:
            break
    stream.rewind(1 + len(guessed) - len(chosen))
    return chosen, keys


def ids_before(ends: Collection[int], ids: Sequence[int]) -> Sequence[int]:
    """Return the ids before the first one in `ends`."""
    return next((ids[:at] for at, id in enumerate(ids) if id in ends), ids)


@dataclass(frozen=True)
class Writer:
    """A stream to generate text with, its cache, and its speculator if it guesses."""

    tokens: TokenStream
    cache: StreamCache
    speculator: Speculator | None = None


# Makes a writer from the sinks, the window (None for the default) and a notice callback.
WriterFactory = Callable[[int | None, int | None, Notify], Writer]


def writer_factory(
    model: Model,
    speculate: bool | None,
    draft: Model | None,
    kv_bits: int | None,
    sampling: Sampling | None = None,
) -> WriterFactory:
    """Return a function that makes writers, which share the measured cost of steps.

    Every stream has spare rows, so that its state can be continued with or without guessing.

    Args:
        speculate: whether to guess. None: yes, unless the ring is quantized, because quantized
            rows are written only once their tokens are certain, or `sampling` has a seed and
            there is no draft model.
        draft: a model that also guesses.
        sampling: a seed promises exactly the same text. Guessing would break that, because
            timing decides how much is guessed, and several rows are summed in a different order.

    Raises:
        ValueRefused: two options conflict, or the draft model has a different vocabulary.
    """
    if draft and speculate is False:
        raise ValueRefused("`draft` and `speculate=False` cannot be used together")
    if kv_bits is not None and (speculate or draft):
        name = "draft" if draft else "speculate"
        raise ValueRefused(f"`{name}` does not work with `kv_bits`: use only one of them")
    if draft:
        check_draft(model, draft)
    seeded = sampling is not None and sampling.seed is not None
    guess = speculate or (speculate is None and kv_bits is None and (draft or not seeded))
    length = DraftLengthController()

    def make(sinks: int | None, window: int | None, notify: Notify) -> Writer:
        cache = model.new_cache(sinks, window, spare_rows(kv_bits), notify, kv_bits)
        if not guess:
            return Writer(TokenStream(model, cache), cache)
        drafter = DraftModel(draft, cache) if draft else None
        speculator = Speculator(length, drafter)
        return Writer(TokenStream(model, cache, speculator.observers), cache, speculator)

    return make
