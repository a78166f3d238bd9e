"""Continues one text with a model; independent of turns and chat templates."""

from collections.abc import Callable, Mapping, Sequence

from mlx_stream.errors import TextError
from mlx_stream.errors.argument_types import check_arguments
from mlx_stream.generate.model import Model
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import Coroutine, driven
from mlx_stream.generate.speculative import writer_factory
from mlx_stream.generate.stats import Stats, cumulative, eviction_notice
from mlx_stream.generate.token_stream import check_max_tokens
from mlx_stream.program.notices import Notify, discard
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder


def stream_steps(
    model: Model,
    prompt: str,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    sinks: int | None = None,
    window: int | None = None,
    stats: Stats | None = None,
    notify: Notify = discard,
    progress: Callable[[int, int], None] | None = None,
    kv_bits: int | None = None,
    speculate: bool | None = None,
    draft: Model | None = None,
    bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
) -> Coroutine[Piece, None]:
    """Continue a text of any length, piece by piece; a coroutine.

    Args:
        prompt: plain text; the tokenizer adds its usual special tokens.
        stop: strings that end the text; they are not part of it.
        sinks, window, kv_bits: see `Model.new_cache`.
        stats: updated as the text is written.
        progress: called while the prompt is read, with the number of tokens read and the total.
        speculate: guess tokens and verify several per step. The text is the same apart from
            rounding. Default: yes, unless `kv_bits` or a seed is given.
        draft: a smaller model with the same vocabulary that also guesses.
        bias, logprobs: see `ReplyOptions`.

    Raises:
        ValueRefused: a number is out of range, or the draft model has a different vocabulary.
        TextError: the prompt has no tokens.
    """
    check_max_tokens(max_tokens)
    stats = Stats() if stats is None else stats

    def report_notice(notice: str) -> None:
        stats.add_notices(notice)
        notify(notice)

    writer = writer_factory(model, speculate, draft, kv_bits, sampling)(
        sinks, window, report_notice
    )
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise TextError("the prompt is empty: some text is required")
    sampler = Sampler(sampling or Sampling())
    sampler = sampler.for_reply(model.config.vocab_size, {"bias": bias, "logprobs": logprobs})
    cache = writer.cache
    stats.seed = sampler.sampling.seed or 0
    stats.sinks, stats.window = cache.geometry.sinks, cache.geometry.window
    stats.cache_bytes = cache.nbytes
    capacity = cache.geometry.sinks + cache.geometry.window
    if len(ids) > capacity:
        report_notice(
            f"the text of {len(ids):,} tokens is longer than sinks and window together "
            f"({capacity:,} tokens): all of it is read, but only its end is attended to"
        )
    reply = ReplyDecoder(model.tokenizer.decoder(), stop, remember=False)
    total, ends = cumulative(progress, len(ids)), model.tokenizer.eos_ids
    steps = write_reply(writer, ids, sampler, max_tokens, ends, reply, stats, progress=total)
    yield (yield from steps)
    if cache.evicted and len(ids) <= capacity:
        report_notice(eviction_notice(stats.window))


stream = check_arguments(driven(stream_steps))
stream.__doc__ = (stream_steps.__doc__ or "").replace("; a coroutine", "")
