"""Ranks earlier exchanges by the words they share with a question; independent of their texts.

A word's weight is its idf, log(1 + N / (n + 3)), if n of N exchanges contain it. An exchange's
score is the share of the question's total weight that it contains; a word that only an adjacent
exchange contains counts half. (This is BM25 with k1 = 0; on LoCoMo it finds as much as with
k1 = 1.2.)
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from mlx_stream.recall.index import WordIndex
from mlx_stream.recall.words import all_words, content_words, is_greeting

MOST_HITS = 5
# For a long question, only this many of its rarest words are searched for.
MOST_WORDS = 6
LEAST_SHARE = 0.4
# A word is rare if at most one exchange in this many contains it.
RARE = 20
# The weight of words from the previous question, and of words only in an adjacent exchange.
PREVIOUS = BESIDE = 0.5
ROUNDING = 1e-9


@dataclass(frozen=True)
class Hit:
    """An exchange that may answer a question.

    Attributes:
        share: the share of the question's total weight that it contains.
        words: the words of the question that it or an adjacent exchange contains.
    """

    number: int
    share: float
    words: tuple[str, ...]


def find_hits(
    index: WordIndex, question: str, previous: str, first: int, end: int, gate: bool = True
) -> list[Hit]:
    """Return the exchanges that are likely to answer a question, likeliest first; often none.

    Args:
        previous: the previous question; used if `question` has fewer than two content words and is
            not a greeting.
        first, end: the range of numbers to search; `end` is excluded.
        gate: if False, one word in common with the question is enough, and a question without
            content words is searched for as it is.
    """
    factors = query(question, previous)
    if not (factors or gate):
        factors = dict.fromkeys(all_words(question), 1.0)
    counts = {word: index.number_of_texts(word, first, end) for word in factors}
    weights = {
        word: factor * math.log(1 + index.count / (counts[word] + 3))
        for word, factor in factors.items()
    }
    total = math.fsum(weights.values())
    found = sorted(filter(counts.get, counts), key=counts.__getitem__)[:MOST_WORDS]
    having = {word: set(index.numbers(word, first, end)) for word in found}
    beside = {word: {n + step for n in having[word] for step in (-1, 1)} for word in found}
    # A single word is enough if it is the question's only content word and is rare.
    few = all(counts[word] <= max(3, index.count // RARE) for word in found)
    single = [*factors.values()] == [1.0] and few
    least, fewest = (LEAST_SHARE, 2 - single) if gate else (0.0, 1)
    shares: dict[int, float] = defaultdict(float)
    rest = math.fsum(weights[word] for word in found) / total if found else 0.0
    for word in found:
        share, own, near = weights[word] / total, having[word], beside[word] - having[word]
        if rest < least - ROUNDING:  # this word and the later ones alone are not enough
            own, near = own & shares.keys(), near & shares.keys()
        for number in own:
            shares[number] += share
        for number in near:
            shares[number] += share * BESIDE
        rest -= share
    hits = []
    for number, share in shares.items():
        if share >= least and first <= number < end:
            words = [word for word in found if number in having[word] or number in beside[word]]
            if len(words) >= fewest and any(number in having[word] for word in words):
                hits.append(Hit(number, share, tuple(words)))
    # In a tie the newest comes first, because it may supersede the others.
    return sorted(hits, key=lambda hit: (-round(hit.share, 2), -hit.number))[:MOST_HITS]


def query(question: str, previous: str) -> dict[str, float]:
    """Return the words to search for, each with the factor to apply to its weight."""
    factors = dict.fromkeys(content_words(question), 1.0)
    if len(factors) < 2 and not is_greeting(question):
        factors = dict.fromkeys(content_words(previous), PREVIOUS) | factors
    return factors
