"""Ids -> pieces of text, stop strings, statistics; knows no turns and no templates."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.generate import Sampler, Sampling, TokenStream, limited
from mlx_stream.load import Model, ignore
from mlx_stream.speculate import decode, opener
from mlx_stream.tokenizer import StreamDecoder

NOTICES_KEPT = 8


@dataclass(frozen=True)
class Piece:
    """A piece of text that is final.

    Attributes:
        finish: set on the last one: end, stop or length.
        attended: on the last one of a conversation's reply, the tokens attended now.
        evicted_exchanges, evicted_tokens: on the same, what left attention during the turn.

    One without text and `finish` is a step that made no text final; only `ChatSession.steps` asks
    for these.
    """

    text: str
    finish: str | None = None
    attended: int | None = None
    evicted_exchanges: int = 0
    evicted_tokens: int = 0


@dataclass
class Stats:
    """What a stream has done; times in seconds, memory in bytes."""

    prompt_tokens: int = 0
    reply_tokens: int = 0
    decoded_tokens: int = 0  # of replies, without each one's first, which the prompt's time holds
    prompt_seconds: float = 0.0
    reply_seconds: float = 0.0
    drafted_tokens: int = 0  # guessed and verified...
    accepted_tokens: int = 0  # ...and right
    attended: int = 0
    evicted: int = 0
    evicted_exchanges: int = 0
    pinned: int = 0  # of the attended: a system prompt's, which never leave
    sinks: int = 0
    window: int = 0
    cache_bytes: int = 0
    seed: int = 0
    notices: list[str] = field(default_factory=list)  # the latest

    def note(self, *lines: str) -> None:
        """Keep what the user should know, in a list of its own: copies stay as they are."""
        self.notices = [*self.notices, *lines][-NOTICES_KEPT:]

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.decoded_tokens / self.reply_seconds if self.reply_seconds else 0.0

    def __str__(self) -> str:
        count = self.evicted_exchanges
        guessed = f"{self.accepted_tokens:,} of {self.drafted_tokens:,} guesses right; "
        guessed = guessed if self.drafted_tokens else ""
        exchanges = f" ({count:,} {'exchange' if count == 1 else 'exchanges'})" if count else ""
        return (
            f"{self.attended:,} of {self.sinks + self.window:,} tokens attended, "
            f"{self.evicted:,} evicted{exchanges}; {self.tokens_per_second:.1f} tok/s, reading "
            f"{self.prompt_tokens_per_second:.0f} tok/s; {guessed}cache "
            f"{self.cache_bytes / 1e6:.1f} MB; seed {self.seed}"
        )


class StopFinder:
    """Hold back text in which a stop string may have begun."""

    def __init__(self, stops: str | Sequence[str]):
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(self.stops):
            raise ValueRefused("--stop must not be an empty text")
        self.held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is final, and whether a stop string came right after it.

        Of several that overlap, the one that ends first stops the text, however it came in pieces.
        """
        self.held += text
        found = [(at + len(s), at) for s in self.stops if (at := self.held.find(s)) >= 0]
        if found:
            final, self.held = self.held[: min(found)[1]], ""
            return final, True
        keep = self._begun()
        final = self.held[: len(self.held) - keep]
        self.held = self.held[len(self.held) - keep :]
        return final, False

    def flush(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self.held = self.held, ""
        return held

    def _begun(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(longest, len(self.held)), 0, -1):
            end = self.held[len(self.held) - length :]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0


class Reply:
    """Turn sampled ids into pieces of text.

    With `remember`, also which ids make up the final text: after the last piece (or when it is
    abandoned), `ids[:kept()[0]]` followed by the text `kept()[1]` is exactly what was said: a stop
    string may begin in the middle of a token. Without, nothing grows with the length of the text.
    """

    def __init__(self, decoder: StreamDecoder, stops: str | Sequence[str], remember: bool = True):
        self.decoder, self.finder, self.remember = decoder, StopFinder(stops), remember
        self.count = 0
        self.ids: list[int] = []
        self.text = ""  # all that was decoded
        self.ends: list[int] = []  # length of the text after each id
        self.final = 0  # length of the text handed out
        self.stopped = False
        self.finish = "interrupted"  # until it ends otherwise

    def add(self, token: int) -> str:
        """Take a sampled id; return the text that became final."""
        if self.remember:  # an interrupt between the two leaves an end without an id, never read
            self.ends.append(len(self.text))
            self.ids.append(token)
        self.count += 1
        return self._advance(self.decoder.add(token))

    def flush(self) -> str:
        """Return what was held back, when no more ids come."""
        if self.stopped:
            return ""
        text = self._advance(self.decoder.flush()) if self.count else ""
        if self.stopped:
            return text
        rest = self.finder.flush()
        self.final += len(rest)
        return text + rest

    def kept(self, trim: bool = False) -> tuple[int, str]:
        """Return how many ids lie within the final text, and the text that follows them.

        `trim` leaves out the whitespace at its end, for templates that do.
        """
        final = self.final if self.stopped else len(self.text)
        if trim:
            final = len(self.text[:final].rstrip())
        elif not self.stopped:
            return len(self.ids), ""
        count = self._ids_within(final)
        if self._end(count) == final:
            return count, ""
        # The stop string begins inside an id. It goes, with those before it that hold the first
        # bytes of a character which it completes.
        start = self._end(count - 1)
        return self._ids_within(start), self.text[start:final]

    def said(self, trim: bool = False) -> str:
        """Return the final text."""
        text = self.text[: self.final] if self.stopped else self.text
        return text.rstrip() if trim else text

    def _end(self, count: int) -> int:
        return self.ends[count - 1] if count else 0

    def _ids_within(self, length: int) -> int:
        """Return the fewest ids whose text has at least this length."""
        return next(k for k in range(len(self.ids) + 1) if self._end(k) >= length)

    def _advance(self, text: str) -> str:
        if self.remember:
            self.text += text
            if self.ids:
                self.ends[len(self.ids) - 1] = len(self.text)
        final, self.stopped = self.finder.add(text)
        self.final += len(final)
        return final


def stream(
    model: Model,
    prompt: str,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    sinks: int | None = None,
    window: int | None = None,
    stats: Stats | None = None,
    notify: Callable[[str], None] = ignore,
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
    limited(max_tokens)
    stats = Stats() if stats is None else stats

    def tell(notice: str) -> None:
        stats.note(notice)
        notify(notice)

    cache, tokens = opener(model, speculate, draft, kv_bits, sampling)(sinks, window, tell)
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
    reply = Reply(model.tokenizer.decoder(), stop, remember=False)
    yield from paced(
        decode(
            tokens,
            ids,
            sampler,
            max_tokens,
            model.tokenizer.eos_ids,
            counted(progress, len(ids)),
        ),
        reply,
        len(ids),
        max_tokens,
        stats,
        tokens,
    )
    if cache.evicted and len(ids) <= capacity:
        tell(eviction_notice(stats.window))


def eviction_notice(window: int) -> str:
    return f"the window of {window:,} tokens is full: the oldest have begun to leave attention"


def counted(
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


def paced(
    ids: Iterator[int | None],
    reply: Reply,
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
    tokens.take_back()
    stats.attended, stats.evicted = tokens.attended, tokens.evicted
    rest = unsent + reply.flush()
    reply.finish = "stop" if reply.stopped else finish
    yield Piece(rest, reply.finish)
