"""Writes one reply as a coroutine of read requests and pieces of text; independent of turns.

The driver runs each request and sends its result back (see `requests`), so it decides what is
computed when.
"""

from collections.abc import Callable, Collection, Generator, Sequence

import mlx.core as mx
import numpy as np

from mlx_stream.generate.requests import Coroutine, ReadRequest, ReadResult, Want, read_ids
from mlx_stream.generate.speculative import Writer, choose_verified
from mlx_stream.generate.stats import Stats
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import Sampler
from mlx_stream.text.pieces import Piece, ReplyDecoder, TokenLogprob


def write_reply(
    writer: Writer,
    prompt: Sequence[int],
    sampler: Sampler,
    limit: int,
    ends: Collection[int],
    reply: ReplyDecoder,
    stats: Stats,
    make_room: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Coroutine[Piece, Piece]:
    """Read a prompt and write an answer of up to `limit` tokens; return the last piece.

    The last token written is not read, nor is the id that ended the reply. Thinking has its own
    limit, at which it is cut off.

    Args:
        make_room: called with 1 before a token is read, as soon as the token is known.
        progress: called after each step of the prompt with the number of tokens it read.
        stats: up to date whenever a piece is yielded.
    """
    tokens, speculator = writer.tokens, writer.speculator
    if not sampler.allows_guessing:
        speculator = None
    result = yield from read_ids(tokens, prompt, Want.LOGITS, progress)
    chosen, keys = choose_first(sampler, tokens, result, reply)
    logprobs: list[TokenLogprob] = []
    stats.prompt_tokens += len(prompt)
    stats.prompt_seconds += result.seconds
    finish, unsent, token = "", "", -1
    try:
        while True:
            for at, token in enumerate(chosen, 1):
                tokens.lookahead = len(chosen) - at
                sampler.random.key = keys[at - 1]
                if token in ends or reply.is_end(token):
                    finish = "end"
                    break
                stats.reply_tokens += 1
                stats.decoded_tokens += reply.count > 0
                if sampler.logprobs is not None and result.logits is not None:
                    logprobs.append(logprob_of(result.logits, token, sampler.logprobs))
                unsent = reply.add(token)
                if reply.stopped or reply.answer_count == limit:
                    finish = "length"
                    break
                if make_room and not tokens.lookahead:  # a lookahead token has been read already
                    make_room(1)
                if (thought := reply.take_thinking()) or unsent:
                    count_attended(stats, writer)
                    yield Piece(unsent, thinking=thought, logprobs=tuple(logprobs))
                    unsent, logprobs = "", []
                if reply.left(limit) < 1:  # its thinking is too long
                    break
            if finish:
                break
            left = reply.left(limit)
            if left < 1:
                result = yield from end_thinking(tokens, token, reply, make_room)
                chosen, keys = choose_first(sampler, tokens, result, reply)
                stats.reply_seconds += result.seconds
                continue
            token = chosen[-1]
            guess = speculator.guess(tokens, token, left - 1, ends) if speculator else None
            if guess and guess.ids:
                result = yield ReadRequest(tokens, [token, *guess.ids], Want.ROWS)
                assert result is not None and result.logits is not None
                chosen, keys = choose_verified(tokens, sampler, guess.ids, result.logits)
                stats.drafted_tokens += len(guess.ids)
                stats.accepted_tokens += len(chosen) - 1
            else:
                if sampler.mask:
                    sampler.restrict(reply.ids)
                more = left > 1 and not sampler.mask
                result = yield ReadRequest(tokens, (token,), Want.TOKEN, sampler=sampler, more=more)
                assert result is not None
                chosen, keys = [result.token], [sampler.random.key]
            stats.reply_seconds += result.seconds
            if speculator and guess:
                speculator.learn(guess, chosen, None if result.shared else result.seconds)
    finally:
        tokens.drop_pending()
    if tokens.lookahead:
        tokens.rewind(tokens.lookahead)
    count_attended(stats, writer)
    rest = unsent + reply.flush()
    reply.finish = "stop" if reply.stopped else finish
    thought = reply.take_thinking()
    return Piece(rest, reply.finish, thinking=thought, logprobs=tuple(logprobs))


def choose_first(
    sampler: Sampler, tokens: TokenStream, result: ReadResult, reply: ReplyDecoder
) -> tuple[list[int], list[mx.array]]:
    """Choose the token after the ids just read; return it and the sampler's key after it."""
    assert result.logits is not None
    sampler.restrict(reply.ids)
    return [sampler.choose(result.logits, tokens.ids.attended)], [sampler.random.key]


def logprob_of(logits: mx.array, token: int, count: int) -> TokenLogprob:
    """Return the log-probabilities of a token and of the `count` likeliest tokens."""
    logits = logits.astype(mx.float32)
    values = np.array(logits - mx.logsumexp(logits))
    top = np.argpartition(-values, count)[:count] if count else np.zeros(0, int)
    top = top[np.argsort(-values[top], kind="stable")].tolist()
    return TokenLogprob(token, float(values[token]), tuple((id, float(values[id])) for id in top))


def end_thinking(
    tokens: TokenStream,
    token: int,
    reply: ReplyDecoder,
    make_room: Callable[[int], None] | None,
) -> Generator[ReadRequest, ReadResult | None, ReadResult]:
    """After thinking's last token, read the ids that end it, as if the model had written them."""
    if tokens.lookahead:
        tokens.rewind(tokens.lookahead)
    cut = reply.cut_thinking()
    if make_room:
        make_room(1 + len(cut))
    return (yield from read_ids(tokens, (token, *cut), Want.LOGITS))


def count_attended(stats: Stats, writer: Writer) -> None:
    """Count the tokens attended and evicted, leaving out the lookahead."""
    tokens = writer.tokens
    stats.attended = tokens.attended
    stats.evicted = tokens.length - tokens.lookahead - stats.attended
