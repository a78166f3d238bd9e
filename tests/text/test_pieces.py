"""Sampling, stop strings, and which ids make up a text: on plain numbers and a tiny tokenizer."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_stream.errors import ValueRefused
from mlx_stream.sampling import PenalizedIds, Sampler, Sampling, penalize, truncate
from mlx_stream.text.pieces import ReplyDecoder, StopMatcher

TEXT = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


class Letters:
    """A decoder whose ids are pieces of text in a table; a piece may wait for the next id."""

    def __init__(self, pieces, held=()):
        self.pieces, self.held, self.waiting = pieces, set(held), ""

    def add(self, token):
        text = self.waiting + self.pieces[token]
        self.waiting = ""
        if token in self.held:
            self.waiting, text = text, ""
        return text

    def flush(self):
        text, self.waiting = self.waiting, ""
        return text


def before_a_stop(whole, stops):
    """Return the text before the stop string that ends first."""
    ends = (whole[:end] for end in range(1, len(whole) + 1))
    for text in ends:
        if found := [stop for stop in stops if text.endswith(stop)]:
            return text.removesuffix(max(found, key=len))
    return whole


@example(["a\n", "a"], ["\n", "a\na"])
@example(["a\na"], ["\n", "a\na"])
@given(st.lists(TEXT, max_size=8), STOPS)
def test_stop_finder_gives_the_text_before_the_first_stop(pieces, stops):
    finder, given_out, stopped = StopMatcher(stops), "", False
    for piece in pieces:
        text, stopped = finder.add(piece)
        given_out += text
        if stopped:
            break
        # No text that could still become a stop string has been emitted.
        assert not any(
            given_out.endswith(stop[:n]) and finder.pending == "" and n
            for stop in stops
            for n in range(1, len(stop))
        )
    else:
        given_out += finder.flush()
    whole = "".join(pieces)
    assert stopped == any(stop in whole for stop in stops)
    assert given_out == before_a_stop(whole, stops)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueRefused, match="empty"):
        StopMatcher(["a", ""])


@given(st.lists(TEXT, min_size=1, max_size=8), STOPS, st.data())
def test_kept_ids_and_rest_are_exactly_what_was_said(pieces, stops, data):
    held = data.draw(st.sets(st.integers(0, len(pieces) - 1), max_size=3))
    reply = ReplyDecoder(Letters(pieces, held), stops)  # type: ignore[arg-type]
    said = ""
    for token in range(len(pieces)):
        said += reply.add(token)
        if reply.stopped:
            break
    said += reply.flush()
    whole = "".join(pieces)
    assert said == before_a_stop(whole, stops)
    for trim in (False, True):
        count, rest = reply.final_ids(trim)
        expected = said.rstrip() if trim else said
        assert "".join(pieces[:count]) + rest == expected
        # No id is dropped unnecessarily: the next one with text of its own would go too far.
        following = next((i for i in range(count, len(pieces)) if pieces[i]), count)
        crosses = len("".join(pieces[: following + 1])) > len(expected)
        assert not rest or crosses or held & set(range(count, following + 1))


def reference_filter(logits, top_k, top_p, min_p):
    """Keep what top-k, then top-p, then min-p keep, with float64 and sets."""
    order = np.argsort(-logits, kind="stable")
    kept = list(order[:top_k] if top_k else order)
    p = np.exp(logits[kept] - logits.max())
    p /= p.sum()
    if top_p < 1:
        total, count = 0.0, 0
        for value in p:
            count += 1
            total += value
            if total >= top_p:
                break
        kept = kept[:count]
    if min_p > 0:
        kept = [i for i in kept if math.exp(logits[i] - logits.max()) >= min_p]
    return set(kept)


@given(
    st.integers(0, 10_000),
    st.integers(0, 12),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_truncation_keeps_what_a_plain_reading_keeps(seed, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(scale=2, size=40).astype(np.float32)
    sampling = Sampling(1.0, top_k, top_p, min_p)
    sampler = Sampler(sampling)
    left = truncate(mx.array(logits), sampler.mode, sampler.numbers)
    kept = np.isfinite(np.array(left))
    expected = reference_filter(logits.astype(np.float64), top_k, top_p, min_p)
    # A sum within rounding of p may fall on either side of one token.
    assert len(set(np.flatnonzero(kept)) ^ expected) <= 1
    assert kept[logits.argmax()]
    if top_p == 1.0 or top_p < 0.5:
        assert set(np.flatnonzero(kept)) == expected or top_p < 1


def test_the_repetition_penalty_touches_the_given_ids_once():
    logits = mx.array([2.0, -2.0, 1.0, 0.0])
    ids, two = mx.array([0, 1, 0, 0, 2], mx.int32), mx.array(2.0)
    attended = PenalizedIds(ids, mx.array([True, True, True, False, False]))
    assert penalize(logits, attended, two).tolist() == [1.0, -4.0, 1.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]
    nothing = PenalizedIds(ids, mx.zeros(5, mx.bool_))
    assert penalize(logits, nothing, two).tolist() == logits.tolist()


def test_greedy_takes_the_likeliest_and_the_penalty_sees_only_what_is_attended():
    logits = mx.array([0.0, 3.0, 2.9])
    assert Sampler(Sampling(0.0)).choose(logits, list) == 1
    penalized = Sampler(Sampling(0.0, repetition_penalty=1.2))
    assert penalized.choose(logits, lambda: [1]) == 2
    assert penalized.choose(logits, lambda: [0]) == 1


def test_a_seed_repeats_and_frequencies_are_those_of_the_softmax():
    logits = mx.array([0.0, 1.0, 2.0])
    draws = [
        [sampler.choose(logits, list) for _ in range(600)]
        for sampler in (Sampler(Sampling(1.0, top_p=1.0, seed=seed)) for seed in (1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]
    expected = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    assert np.allclose(np.bincount(draws[0] + draws[2]) / 1200, expected, atol=0.05)


WRONG: list[dict[str, float]] = [
    *({"temperature": number} for number in (-0.1, 5.1, math.nan, math.inf)),
    *({"top_p": number} for number in (0.0, 1.1)),
    *({"min_p": number} for number in (-0.1, 1.5)),
    *({"top_k": -1}, {"repetition_penalty": 0.0}, {"seed": -1}, {"seed": 2**64}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_numbers_out_of_range_are_refused_by_their_name(wrong):
    with pytest.raises(ValueRefused, match=f"^`{next(iter(wrong))}` must be"):
        Sampling(**wrong)
