"""Ids -> pieces of text, stop strings, statistics; knows no turns and no templates."""

import time
from collections.abc import Callable, Iterator, Sequence

from mlx_stream.errors import TextError
from mlx_stream.generate.speculative import decode_speculatively, stream_factory
from mlx_stream.generate.stats import Stats, eviction_notice
from mlx_stream.generate.token_stream import TokenStream, check_max_tokens
from mlx_stream.load import Model
from mlx_stream.program.notices import Notify, discard
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder


def stream(
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
) -> Iterator[Piece]:
    """Continue a text of any length, piece by piece.

    Args:
        prompt: encoded as plain text, with the special tokens the tokenizer adds to one.
        stop: strings before which the text ends.
        sinks, window, kv_bits: see `Model.new_cache`.
        stats: filled in as the stream goes.
        progress: called while the prompt is read with the tokens read and those to read.
        speculate: guess tokens and verify several in a step, which changes no text but by the
            rounding of sums. Default: yes, unless `kv_bits` or a seed is given.
        draft: a smaller model of the same vocabulary that guesses too.

    Raises:
        ValueRefused: a number out of range, a draft model of another vocabulary.
        TextError: the prompt has no tokens.
    """
    check_max_tokens(max_tokens)
    stats = Stats() if stats is None else stats

    def tell(notice: str) -> None:
        stats.add_notices(notice)
        notify(notice)

    cache, tokens = stream_factory(model, speculate, draft, kv_bits, sampling)(sinks, window, tell)
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise TextError("the prompt is empty: give at least one character")
    sampler = Sampler(sampling or Sampling())
    stats.seed = sampler.sampling.seed or 0
    stats.sinks, stats.window = cache.geometry.sinks, cache.geometry.window
    stats.cache_bytes = cache.nbytes
    capacity = cache.geometry.sinks + cache.geometry.window
    if len(ids) > capacity:
        tell(
            f"the text of {len(ids):,} tokens is longer than sinks and window, "
            f"{capacity:,}: it is read in full, and only its end stays attended"
        )
    reply = ReplyDecoder(model.tokenizer.decoder(), stop, remember=False)
    yield from stream_pieces(
        decode_speculatively(
            tokens,
            ids,
            sampler,
            max_tokens,
            model.tokenizer.eos_ids,
            cumulative(progress, len(ids)),
        ),
        reply,
        len(ids),
        max_tokens,
        stats,
        tokens,
    )
    if cache.evicted and len(ids) <= capacity:
        tell(eviction_notice(stats.window))


def cumulative(
    progress: Callable[[int, int], None] | None, total: int
) -> Callable[[int], None] | None:
    """Turn steps' token counts into a running total."""
    if progress is None:
        return None
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return step


def stream_pieces(
    ids: Iterator[int | None],
    reply: ReplyDecoder,
    prompt_tokens: int,
    max_tokens: int,
    stats: Stats,
    tokens: TokenStream,
    steps: bool = False,
) -> Iterator[Piece]:
    """Yield a reply's pieces; keep the statistics right at each of them.

    Args:
        ids: those sampled; None after a step that only read.
        steps: yield a piece, which may have no text, after each.
    """
    started = time.perf_counter()
    first = True
    drafted, accepted = tokens.drafted, tokens.accepted

    def tick() -> None:
        nonlocal started, first, drafted, accepted
        now = time.perf_counter()
        if first:
            stats.prompt_tokens += prompt_tokens
            stats.prompt_seconds += now - started
        else:
            stats.reply_seconds += now - started
            stats.decoded_tokens += 1
        started, first = now, False
        stats.attended, stats.evicted = tokens.attended, tokens.evicted
        stats.drafted_tokens += tokens.drafted - drafted
        stats.accepted_tokens += tokens.accepted - accepted
        drafted, accepted = tokens.drafted, tokens.accepted

    finish, unsent = "end", ""
    for token in ids:
        if token is None:
            paused = time.perf_counter()
            stats.attended, stats.evicted = tokens.cache.attended, tokens.cache.evicted
            yield Piece("")
            started += time.perf_counter() - paused
            continue
        tick()
        stats.reply_tokens += 1
        unsent = reply.add(token)
        if reply.stopped or reply.count == max_tokens:
            finish = "length"
            break
        if unsent or steps:
            yield Piece(unsent)
            started = time.perf_counter()  # what the caller did with it is not our time
        unsent = ""
    else:
        if first:
            tick()
    tokens.rollback_lookahead()
    stats.attended, stats.evicted = tokens.attended, tokens.evicted
    rest = unsent + reply.flush()
    reply.finish = "stop" if reply.stopped else finish
    yield Piece(rest, reply.finish)
