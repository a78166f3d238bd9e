"""`eval streameval`: what a stream still knows about lines further and further back.

One stream reads lines (StreamEval, arXiv 2309.17453, section 4.3). Every 10 lines it is asked about
a line at each distance, and it is rewound after each query. In the paper, questions and answers
stay in the stream; here they would repeat facts that queries at other distances ask for later.

Rewinding costs nothing: the cache has spare rows for a query and its answer, so every candidate
is read in the same state, and the stream continues as if it had never been asked.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_stream.cache import StreamCache
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate.report import Progress, Report, Row, facts, no_progress
from mlx_stream.evaluate.score import losses_of
from mlx_stream.evaluate.streameval_data import (
    CANDIDATES,
    DISTANCES,
    OPENING,
    QUERY_EVERY,
    Query,
    StreamEvalData,
    make_data,
)
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.recall.find import find_hits
from mlx_stream.recall.index import WordIndex
from mlx_stream.sampling import as_int
from mlx_stream.text.tokenizer import Tokenizer

# Every line is encoded after this; some tokenizers treat the beginning of a text differently.
BEFORE_A_LINE = "\n"
# 95% of a normal distribution lies within this many standard deviations.
WILSON_Z = 1.959964


@dataclass(frozen=True)
class EncodedQuery:
    """A query as token ids: the prefix that all ten continuations share, and the rest of each."""

    query: Query
    ids: list[int]
    candidates: list[list[int]]

    @property
    def right(self) -> int:
        """Index of the right candidate."""
        return CANDIDATES.index(self.query.line.answer)

    @property
    def longest(self) -> int:
        """The number of tokens in the longest candidate."""
        return max(map(len, self.candidates))


def streameval(
    model: Model,
    sinks: int = 4,
    window: int = 1_020,
    seed: int = 1,
    lines: int = 600,
    distances: Sequence[int] = DISTANCES,
    progress: Progress = no_progress,
    recall: bool = False,
) -> Report:
    """Read generated lines as one stream and return the accuracy at each distance.

    Rows: `lines_back`; `tokens_back`, the mean; `queries`; `likelihood`, the share of queries
    whose answer is likelier than each of the nine other candidates, with its 95% Wilson interval
    `likelihood_low` to `likelihood_high`; `generation`, the share whose answer the model writes;
    `attended`, the mean share of the line's tokens that were attended; `inside`, whether all of
    them were attended at every query. With `recall`, the lines that have left the window are
    searched for a query's words, and the best match is read again before the query. Lines after
    the last query are not read. Raises ValueRefused if a number is out of range or the window is
    too small for a query.
    """
    data = make_data(seed, lines, distances)
    sinks, window = model.resolve_window(sinks, window)
    asked = [encode_query(model.tokenizer, query) for query in data.queries]
    # After the query, at most one candidate's tokens are read.
    spare = max(len(one.ids) + one.longest for one in asked)
    if recall:
        spare += max(len(encode_line(model.tokenizer, line.text)) for line in data.lines)
    if window < spare:
        raise ValueRefused(
            f"--window must be at least {spare}, the size of a query and its answer, not {window}"
        )
    cache = model.new_cache(sinks, window, spare)
    outcomes = list(run_distances(model, cache, data, asked, progress, recall))
    about = facts(
        model,
        sinks=sinks,
        window=window,
        seed=seed,
        lines=lines,
        query_every=QUERY_EVERY,
        candidates=len(CANDIDATES),
        recall=recall,
    )
    return Report("streameval", about, outcome_rows(outcomes))


# --- text to ids ---


def encode_line(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids that a text gets at the beginning of a line in a longer text."""
    before = tokenizer.encode(BEFORE_A_LINE, special=False)
    ids = tokenizer.encode(BEFORE_A_LINE + text, special=False)
    if ids[: len(before)] == before:
        return ids[len(before) :]
    return tokenizer.encode(text, special=False)


def encode_query(tokenizer: Tokenizer, query: Query, before: str = "") -> EncodedQuery:
    """Return a query and its candidates, each encoded as one text with the query.

    Args:
        before: text to read before the query.

    No candidate is a prefix of another, so each has tokens of its own after the shared ones.
    """
    text = before + query.line.question
    texts = [encode_line(tokenizer, text + candidate) for candidate in CANDIDATES]
    places = zip(*texts, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda place: len(set(place)) == 1, places))
    return EncodedQuery(query, texts[0][:shared], [ids[shared:] for ids in texts])


# --- one query ---


def ask_query(
    model: Model, stream: TokenStream, asked: EncodedQuery
) -> tuple[list[float], list[int]]:
    """Read a query, score each candidate from there, generate an answer, and rewind.

    Returns the log-probability of each candidate, and the ids of the greedy continuation.
    """
    begun = stream.length
    logits = stream.read(asked.ids)
    log_p = logits.astype(mx.float32)
    log_p = log_p - mx.logsumexp(log_p)
    likelihoods = [log_probability(stream, log_p, ids) for ids in asked.candidates]
    # One token more than the longest answer, to see whether the word ends there.
    written = write_on(model, stream, logits, asked.longest + 1)
    stream.rewind(stream.length - begun)
    return likelihoods, written


def log_probability(stream: TokenStream, log_p: mx.array, ids: Sequence[int]) -> float:
    """Return the sum of the ids' log-probabilities; the stream does not change.

    `log_p` is the distribution of the first id, (vocabulary,).
    """
    found = float(log_p[ids[0]].item())  # type: ignore[arg-type]
    if len(ids) > 1:
        begun = stream.length
        found -= math.fsum(losses_of(stream, ids, PREFILL_CHUNK))
        stream.rewind(stream.length - begun)
    return found


def write_on(model: Model, stream: TokenStream, logits: mx.array, count: int) -> list[int]:
    """Return up to `count` ids of the greedy continuation; all but the last are read."""
    ids: list[int] = []
    while len(ids) < count:
        if ids:
            logits = stream.read(ids[-1:])
        token = as_int(mx.argmax(logits))
        if token in model.tokenizer.eos_ids:
            break
        ids.append(token)
    return ids


# --- what counts as right ---


def likeliest(likelihoods: Sequence[float]) -> int | None:
    """Return the index of the highest score, or None for a tie, which is not an answer."""
    highest = max(likelihoods)
    first = likelihoods.index(highest)
    return None if highest in likelihoods[first + 1 :] else first


def says(tokenizer: Tokenizer, asked: EncodedQuery, written: Sequence[int]) -> bool:
    """Return whether the text continues with exactly the answer, as a whole word.

    "Ruth Adams." and "Ruth Adams and" answer Adams; "Ruth Adamson" and "Ruth J. Adams" do not.
    """
    expected = tokenizer.decode([*asked.ids, *asked.candidates[asked.right]])
    text = tokenizer.decode([*asked.ids, *written])
    return text.startswith(expected) and not text[len(expected) :][:1].isalnum()


# --- one stream ---


def run_distances(
    model: Model,
    cache: StreamCache,
    data: StreamEvalData,
    asked: Sequence[EncodedQuery],
    progress: Progress = no_progress,
    recall: bool = False,
) -> Iterator[Row]:
    """Read the lines through a cache up to the last query; yield each query's outcome.

    `tokens_back` is counted from the first token of the line asked about to the start of the
    query. `attended` is the share of that line's tokens that were attended. `likelihood` and
    `generation` say whether the answer was right by the rule of that name.
    """
    stream, index = TokenStream(model, cache), WordIndex.in_memory()
    # Line n is tokens starts[n] to starts[n + 1] - 1.
    opening = model.tokenizer.encode(OPENING)
    starts = [0, len(opening)]
    stream.read(opening)
    for after, queries in itertools.groupby(asked, lambda one: one.query.after):
        new: list[int] = []
        for line in data.lines[len(starts) - 2 : after]:
            ids = encode_line(model.tokenizer, line.text)
            starts.append(starts[-1] + len(ids))
            new += ids
            if recall:
                index.add([(line.number, line.text)], line.number, "")
        stream.read(new)
        for one in queries:
            number = one.query.line.number
            tokens = range(starts[number], starts[number + 1])
            seen = attended(cache, tokens, len(one.ids) + one.longest - 1)
            # The first line that stays attended until the query has been answered.
            first = bisect_left(starts, cache.oldest + len(one.ids) + one.longest, 1)
            hits = find_hits(index, one.query.line.question, "", 1, first) if recall else []
            if hits:
                found = data.lines[hits[0].number - 1].text
                one = encode_query(model.tokenizer, one.query, found)
            likelihoods, written = ask_query(model, stream, one)
            yield {
                "lines_back": one.query.lines_back,
                "tokens_back": stream.length - tokens.start,
                "attended": seen / len(tokens),
                "likelihood": likeliest(likelihoods) == one.right,
                "generation": says(model.tokenizer, one, written),
            }
        progress(after, data.queries[-1].after)


def attended(cache: StreamCache, tokens: range, more: int) -> int:
    """Return how many of `tokens` will be attended to by the last of `more` additional tokens.

    Worked example: with 2 sinks and a window of 10, after 30 tokens and 5 more, token 34 attends to
    0, 1 and 25 to 34, which include three of tokens 20 to 27.
    """
    oldest = cache.geometry.oldest(cache.position, cache.length + more - 1)
    return sum(token < cache.geometry.sinks or token >= oldest for token in tokens)


# --- figures ---


def outcome_rows(outcomes: Sequence[Row]) -> list[Row]:
    """Return one row for each distance, in the order of the first queries."""
    distances = dict.fromkeys(one["lines_back"] for one in outcomes)
    return [outcome_row([one for one in outcomes if one["lines_back"] == d]) for d in distances]


def outcome_row(outcomes: Sequence[Row]) -> Row:
    count = len(outcomes)
    sums = {key: sum(one[key] for one in outcomes) for key in outcomes[0]}
    low, high = wilson(sums["likelihood"], count)
    return {
        "lines_back": outcomes[0]["lines_back"],
        "tokens_back": sums["tokens_back"] / count,
        "queries": count,
        "likelihood": sums["likelihood"] / count,
        "likelihood_low": low,
        "likelihood_high": high,
        "generation": sums["generation"] / count,
        "attended": sums["attended"] / count,
        "inside": all(one["attended"] == 1 for one in outcomes),
    }


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a proportion (E. B. Wilson, JASA 22 (1927) 209).

    Worked example: for 8 of 10 it is 0.490 to 0.943.
    """
    share, z2 = right / count, WILSON_Z**2
    middle = share + z2 / (2 * count)
    half = WILSON_Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    scale = 1 + z2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
