"""Guess the next tokens and verify them in one step: the same text in fewer steps.

A guess is kept where it equals what the sampler chose anyway, so the text is that of plain decoding
whatever the sampler and however bad the guesses: with the same seed the same, up to the rounding of
several rows computed at once (for guesses that are not random, sampling and matching is speculative
sampling, arXiv 2211.17192).
"""

from collections.abc import Callable

from mlx_stream.cache import StreamCache
from mlx_stream.cache.verify import spare_rows
from mlx_stream.errors import ValueRefused
from mlx_stream.generate import TokenStream
from mlx_stream.load import Model
from mlx_stream.sampling import Sampling
from mlx_stream.speculate.decode import Speculator, decode
from mlx_stream.speculate.drafter import DraftModel, check_draft
from mlx_stream.speculate.pace import Pace
from mlx_stream.speculate.past import Past

__all__ = ["DraftModel", "Pace", "Past", "Speculator", "decode", "opener"]

# From S and W as they were asked for, and whom to tell, to a stream of ids.
Opener = Callable[[int | None, int | None, Callable[[str], None]], tuple[StreamCache, TokenStream]]


def opener(
    model: Model,
    speculate: bool | None,
    draft: Model | None,
    kv_bits: int | None,
    sampling: Sampling | None = None,
) -> Opener:
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
    pace = Pace()

    def open(
        sinks: int | None, window: int | None, notify: Callable[[str], None]
    ) -> tuple[StreamCache, TokenStream]:
        cache = model.new_cache(sinks, window, spare_rows(kv_bits), notify, kv_bits)
        if not guess:
            return cache, TokenStream(model, cache)
        drafter = DraftModel(draft, cache, pace.clock) if draft else None
        return cache, TokenStream(model, cache, Speculator(pace, drafter))

    return open
