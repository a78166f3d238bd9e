"""Decode with guesses: token ids only; the text is that of `generate`."""

from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx

from mlx_stream.cache import StreamCache
from mlx_stream.cache.steps.verify import longest_verified, spare_rows
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.draft_length import DraftLengthController
from mlx_stream.generate.draft_model import Drafter, DraftModel, check_draft
from mlx_stream.generate.ngram import NgramLookup
from mlx_stream.generate.token_stream import StreamObserver, TokenStream, generate
from mlx_stream.load import Model
from mlx_stream.program.notices import Notify
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.window import PREFILL_CHUNK


class Speculator:
    """Guess from a stream's own past, and with a draft model if there is one.

    It follows one stream, whose `follower` it is.

    Args:
        pace: decides how many tokens are guessed; it has the clock.
        drafter: asked where the past has no guess that pays.
    """

    def __init__(self, pace: DraftLengthController | None = None, drafter: Drafter | None = None):
        self.length, self.ngram, self.drafter = (
            pace or DraftLengthController(),
            NgramLookup(),
            drafter,
        )
        self._observers: list[StreamObserver] = [self.ngram, drafter] if drafter else [self.ngram]

    def read(self, ids: Sequence[int]) -> None:
        for follower in self._observers:
            follower.read(ids)

    def rewind(self, count: int) -> None:
        for follower in self._observers:
            follower.rewind(count)

    def restart(self, ids: Sequence[int]) -> None:
        for follower in self._observers:
            follower.restart(ids)

    def erase(self) -> None:
        for follower in self._observers:
            follower.erase()

    def step(
        self, stream: TokenStream, sampler: Sampler, token: int, most: int, ends: Collection[int]
    ) -> tuple[list[int], list[mx.array]]:
        """Read `token`, and what is guessed to follow; return the ids chosen, at least one.

        All but the last of them have been read. With them comes the sampler's key after each.

        Args:
            most: how many ids may be returned.
            ends: ids that are not read.
        """
        stream.record()  # for those who guess
        more = most > 1
        most = min(longest_verified(stream.cache), most) - 1
        found = self.ngram.draft(token, most)
        likely = [self.length.chance(found.matched + i) for i in range(len(found.ids))]
        count = self.length.choose(likely)
        guessed, modelled = ids_before(ends, found.ids[:count]), ()
        if not guessed and self.drafter and most > 0:
            each = self.length.in_steps(self.drafter.seconds)
            count = self.length.choose([self.drafter.chance] * most, each)
            modelled = self.drafter.draft(token, count) if count else ()
            guessed = ids_before(ends, modelled)
        chosen, keys = self._read(stream, sampler, [token, *guessed], more)
        self.length.judge(found.matched, found.ids, chosen)
        if self.drafter and modelled:
            self.drafter.judge(modelled, chosen)
        return chosen, keys

    def _read(
        self, stream: TokenStream, sampler: Sampler, ids: list[int], more: bool
    ) -> tuple[list[int], list[mx.array]]:
        """Read an id and guesses of those after it; keep the guesses that are chosen anyway."""
        started, most = self.length.clock(), len(ids) - 1
        if not most:
            chosen = [stream.next(ids[0], sampler, more)]
            self.length.record_step(1, self.length.clock() - started)
            return chosen, [sampler.key]
        rows = stream.verify(ids)
        chosen = [sampler.choose(rows[0], lambda: stream.attended_ids(most))]
        self.length.record_step(len(ids), self.length.clock() - started)
        keys = [sampler.key]
        while len(chosen) <= most and chosen[-1] == ids[len(chosen)]:
            row = len(chosen)
            later = most - row
            chosen.append(sampler.choose(rows[row], lambda: stream.attended_ids(later)))  # noqa: B023
            keys.append(sampler.key)
        stream.rewind(len(ids) - len(chosen))
        stream.drafted += most
        stream.accepted += len(chosen) - 1
        return chosen, keys


def ids_before(ends: Collection[int], ids: Sequence[int]) -> Sequence[int]:
    """Return the ids before the first that is in `ends`."""
    return next((ids[:at] for at, id in enumerate(ids) if id in ends), ids)


def decode_speculatively(
    stream: TokenStream,
    prompt: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    end_ids: Collection[int] = (),
    progress: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Do as `generate` does, in fewer steps if the stream's follower is a `Speculator`.

    A yielded id may have been read before the next one is asked for, and others after it: the
    stream's `lookahead` says how many. A caller that stops calls its `rollback_lookahead`; then
    stream and sampler are as `generate` leaves them.
    """
    speculator = stream.observer
    if not isinstance(speculator, Speculator):
        yield from generate(stream, prompt, sampler, max_tokens, end_ids, progress)
        return
    logits = stream.read(prompt, PREFILL_CHUNK, progress)
    chosen, left = [sampler.choose(logits, stream.attended_ids)], max_tokens
    keys = [sampler.key]
    try:
        while True:
            for at, (token, key) in enumerate(zip(chosen, keys, strict=True), 1):
                stream.lookahead, sampler.key = len(chosen) - at, key
                if token in end_ids:
                    return
                yield token
            left -= len(chosen)
            if not left:
                return
            chosen, keys = speculator.step(stream, sampler, chosen[-1], left, end_ids)
    finally:
        stream.drop_pending()


# From S and W as they were asked for, and whom to tell, to a stream of ids.
StreamFactory = Callable[
    [int | None, int | None, Callable[[str], None]], tuple[StreamCache, TokenStream]
]


def stream_factory(
    model: Model,
    speculate: bool | None,
    draft: Model | None,
    kv_bits: int | None,
    sampling: Sampling | None = None,
) -> StreamFactory:
    """Return what makes streams that text is written on; they are decoded by `decode`.

    A stream has its spare rows even where nothing is guessed, so that its state can be continued
    with and without. What was measured of the machine is shared by all.

    Args:
        speculate: None is yes, unless the ring is quantized, whose rows are not written ahead...
        draft: a model that guesses too.
        sampling: ...or has a seed: the text shall be had again, to the bit, but which guesses pay
            is timed, and several rows at once are summed in another order than one.

    Raises:
        ValueRefused: options that exclude each other; a draft model of another vocabulary.
    """
    if draft and speculate is False:
        raise ValueRefused("--draft and --no-speculate: leave one out")
    if kv_bits is not None and (speculate or draft):
        option = "--draft" if draft else "--speculate"
        raise ValueRefused(f"{option} does not work with --kv-bits: leave one out")
    if draft:
        check_draft(model, draft)
    seeded = sampling is not None and sampling.seed is not None
    guess = speculate or (speculate is None and kv_bits is None and (draft or not seeded))
    pace = DraftLengthController()

    def open(
        sinks: int | None, window: int | None, notify: Notify
    ) -> tuple[StreamCache, TokenStream]:
        cache = model.new_cache(sinks, window, spare_rows(kv_bits), notify, kv_bits)
        if not guess:
            return cache, TokenStream(model, cache)
        drafter = DraftModel(draft, cache, pace.clock) if draft else None
        return cache, TokenStream(model, cache, Speculator(pace, drafter))

    return open
