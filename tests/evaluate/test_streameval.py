"""A stream asked about its lines: scored as from scratch, and left as one that was not asked."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from mlx_stream import backend
from mlx_stream.cache import StreamCache
from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate import streameval as streams
from mlx_stream.evaluate import streameval_data as texts
from mlx_stream.evaluate.streameval import Answer, EncodedQuery, QueryOutcome, streameval
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import Model, load
from mlx_stream.text.tokenizer import Tokenizer

# A line takes the tiny tokenizer about 45 tokens, a query 60: the line before it is in the window,
# the third is not.
SINKS, WINDOW = 4, 130
DATA = texts.make_data(7, 30, (1, 2, 3, 10))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load(tiny)


@pytest.fixture(scope="module")
def asked(model: Model) -> list[EncodedQuery]:
    return [streams.encode_query(model.tokenizer, query) for query in DATA.queries]


def ids_until(model: Model, after: int) -> list[int]:
    """Return the whole text up to a line, encoded at once."""
    text = texts.OPENING + "".join(line.text for line in DATA.lines[:after])
    return model.tokenizer.encode(text)


def plain_stream(model: Model, after: int) -> TokenStream:
    """Return a stream without spare rows that read up to a line and was asked nothing."""
    stream = TokenStream(model, model.new_cache(SINKS, WINDOW))
    stream.read(ids_until(model, after))
    return stream


def spare_of(asked: Sequence[EncodedQuery]) -> int:
    return max(len(one.ids) + one.longest for one in asked)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": -1}, "--seed must be from 0"),
        ({"seed": 2**64}, "--seed must be from 0"),
        ({"lines": 0}, "--lines must be at least 160 .* not 0"),
        ({"lines": 169, "distances": [161]}, "--lines must be at least 170 .* not 169"),
        ({"distances": []}, "--distances must be at least 1 line back"),
        ({"distances": [5, 0]}, "--distances must be at least 1 line back"),
        ({"distances": [5, 1, 5]}, "--distances 5 is given twice"),
        ({"window": 0}, "--window must be at least 1, not 0"),
        ({"window": 40}, r"--window must be at least \d\d, .* not 40"),
        ({"window": 10_000}, "trained context"),
        ({"sinks": -1}, "--sinks"),
    ],
)
def test_what_is_refused(model: Model, changes: dict, says: str) -> None:
    given: dict[str, Any] = {"sinks": SINKS, "window": WINDOW, "seed": 1, "lines": 200} | changes
    with pytest.raises(ValueRefused, match=says) as refused:
        streameval(model, **given)
    assert "\n" not in str(refused.value)


# --- text to ids ---


def test_lines_encoded_apart_are_the_text_encoded_whole(
    model: Model, asked: list[EncodedQuery]
) -> None:
    tokenizer = model.tokenizer
    apart = tokenizer.encode(texts.OPENING)
    for line in DATA.lines:
        apart += streams.encode_line(tokenizer, line.text)
    assert apart == ids_until(model, 30)
    for one in asked:
        for candidate, ids in zip(one.query.candidates, one.candidates, strict=True):
            whole = tokenizer.encode(DATA.text + one.query.text + candidate)
            assert whole == [*apart, *one.ids, *ids]
    assert {len(ids) for one in asked for ids in one.candidates} >= {3, 4, 5}, "several tokens"


def test_a_tokenizer_that_puts_a_space_before_every_text() -> None:
    """As Llama 2's does: every line but the first must be encoded as what it is, a later one."""
    letters = sorted({*"▁\n", *DATA.text, *DATA.queries[0].text} - {" "})
    backend = tokenizers.Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
    backend.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    tokenizer = Tokenizer(backend, {})
    apart = tokenizer.encode(texts.OPENING)
    for line in DATA.lines:
        apart += streams.encode_line(tokenizer, line.text)
    assert apart == tokenizer.encode(DATA.text)
    one = streams.encode_query(tokenizer, DATA.queries[0])
    assert tokenizer.decode([*apart, *one.ids]) == DATA.text + one.query.text + " "
    assert [tokenizer.decode(ids) for ids in one.candidates] == [*texts.SURNAMES]
    assert streams.says(tokenizer, one, one.candidates[one.right])


# --- one stream ---


def test_candidates_score_as_they_do_from_scratch(model: Model, asked: list[EncodedQuery]) -> None:
    given: list[Answer] = []

    def listen(model: Model, stream: TokenStream, one: EncodedQuery, generation: bool) -> Answer:
        given.append(streams.ask_queries(model, stream, one, generation))
        return given[-1]

    cache = model.new_cache(SINKS, WINDOW, spare_of(asked))
    assert (
        len([*streams.run_distances(model, cache, DATA, asked, answer=listen)]) == len(asked) == 12
    )
    # The ring has gone round twice before the first query. Some of each point, inside and outside.
    for index in (0, 5, 10):
        one, answer = asked[index], given[index]
        for chosen in (one.right, 9 - one.right):
            ids = one.candidates[chosen]
            stream = plain_stream(model, one.query.after)
            logits = [stream.read(one.ids), *(stream.read([id]) for id in ids[:-1])]
            expected = [
                float((x[id] - mx.logsumexp(x)).item())  # type: ignore[arg-type]
                for x, id in zip(logits, ids, strict=True)
            ]
            assert answer.likelihoods[chosen] == pytest.approx(sum(expected), abs=1e-3)
        stream = plain_stream(model, one.query.after)
        assert stream.cache.evicted > 2 * WINDOW
        logits, said = stream.read(one.ids), []
        for _ in range(one.longest + 1):
            said.append(int(mx.argmax(logits).item()))  # type: ignore[arg-type]
            logits = stream.read(said[-1:])
        assert answer.said == said


def test_a_stream_that_was_asked_goes_on_as_one_that_was_not(
    model: Model, asked: list[EncodedQuery]
) -> None:
    cache = model.new_cache(SINKS, WINDOW, spare_of(asked))
    assert [*streams.run_distances(model, cache, DATA, asked)]
    plain = plain_stream(model, 30)
    assert cache.length == plain.length
    assert cache.attended == plain.cache.attended == SINKS + WINDOW
    stream = TokenStream(model, cache)
    for _ in range(3):
        ids = streams.encode_line(model.tokenizer, DATA.lines[0].text)
        np.testing.assert_allclose(stream.read(ids), plain.read(ids), atol=1e-3)


def test_a_written_answer_ends_before_an_end_token(
    model: Model, asked: list[EncodedQuery], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> list[int] | None:
        stream = TokenStream(model, model.new_cache(SINKS, WINDOW, spare_of(asked)))
        return streams.ask_queries(model, stream, asked[0], True).said

    written = said()
    assert written and len(written) == asked[0].longest + 1
    monkeypatch.setattr(model.tokenizer, "eos_ids", frozenset(written[1:]) - {written[0]})
    assert said() == written[: len([*itertools.takewhile(lambda x: x == written[0], written)])]


def test_inside_is_what_the_cache_attends_to(model: Model, asked: list[EncodedQuery]) -> None:
    """The last token that a candidate is scored by is read, and the stream says what it attends."""
    found: list[float] = []

    def listen(model: Model, stream: TokenStream, one: EncodedQuery, generation: bool) -> Answer:
        longest = max(one.candidates, key=len)
        begun = stream.length
        stream.read([*one.ids, *longest[:-1]])
        whole = [*ids_until(model, one.query.after), *one.ids, *longest[:-1]]
        start = len(ids_until(model, one.query.about - 1))
        stop = len(ids_until(model, one.query.about))
        kept = {*range(SINKS), *range(len(whole) - WINDOW, len(whole))}
        assert stream.ids.attended() == [whole[t] for t in sorted(kept)]
        found.append(len(kept & {*range(start, stop)}) / (stop - start))
        stream.rewind(stream.length - begun)
        return Answer([0.0] * 10, None)

    cache = model.new_cache(SINKS, WINDOW, spare_of(asked))
    outcomes = [*streams.run_distances(model, cache, DATA, asked, answer=listen)]
    assert [one.attended for one in outcomes] == found
    assert [one.tokens_back for one in outcomes] == [
        len(ids_until(model, one.query.after)) - len(ids_until(model, one.query.about - 1))
        for one in asked
    ]
    by_distance = {row["lines_back"]: row for row in streams.outcome_rows(outcomes)}
    assert {d: row["inside"] for d, row in by_distance.items()} == {
        1: True, 2: False, 3: False, 10: False,
    }  # fmt: skip
    assert 0 < by_distance[2]["attended"] < 1, "partly: at the border"
    assert by_distance[10]["attended"] == 0


def test_attended_counts_as_in_its_example(model: Model) -> None:
    cache = model.new_cache(2, 10, 5)
    TokenStream(model, cache).read([3] * 30)
    assert streams.attended(cache, range(20, 28), 5) == 3
    assert streams.attended(cache, range(0, 4), 5) == 2, "sinks"
    assert streams.attended(cache, range(20, 28), 0) == 8


# --- what counts as right ---


def knowing(right: Sequence[bool], ties: bool = False):
    """Return one that answers queries right or wrong as told, by either rule."""
    told = iter(right)

    def answer(model: Model, stream: TokenStream, one: EncodedQuery, generation: bool) -> Answer:
        chosen = one.right if next(told) else (one.right + 1) % 10
        likelihoods = [-1.0 if i == chosen else -2.0 - i for i in range(10)]
        if ties:
            likelihoods[(chosen + 3) % 10] = -1.0
        return Answer(likelihoods, one.candidates[chosen] if generation else None)

    return answer


def test_accuracy_is_counted_for_each_distance(model: Model, asked: list[EncodedQuery]) -> None:
    # Three queries of four distances: none, one, two and all three right.
    right = [False, False, True, True, False, True, True, True, False, False, False, True]
    cache = model.new_cache(SINKS, WINDOW, spare_of(asked))
    outcomes = [*streams.run_distances(model, cache, DATA, asked, answer=knowing(right))]
    rows = streams.outcome_rows(outcomes)
    assert [row["lines_back"] for row in rows] == [1, 2, 3, 10]
    assert [row["queries"] for row in rows] == [3] * 4
    for rule in ("likelihood", "generation"):
        assert [row[rule] for row in rows] == [0, 1 / 3, 2 / 3, 1]
    assert all(row["likelihood_low"] <= row["likelihood"] <= row["likelihood_high"] for row in rows)


def test_a_tie_is_no_answer(model: Model, asked: list[EncodedQuery]) -> None:
    cache = model.new_cache(SINKS, WINDOW, spare_of(asked))
    given = knowing([True] * 12, ties=True)
    outcomes = [*streams.run_distances(model, cache, DATA, asked, generation=False, answer=given)]
    assert [row["likelihood"] for row in streams.outcome_rows(outcomes)] == [0] * 4
    assert [row["generation"] for row in streams.outcome_rows(outcomes)] == [None] * 4
    assert streams.likeliest([-3.0, -1.0, -2.0]) == 1
    assert streams.likeliest([-1.0, -1.0]) is None
    assert streams.likeliest([-math.inf, -5.0]) == 1


def test_a_written_answer_is_a_whole_word(model: Model, asked: list[EncodedQuery]) -> None:
    one, tokenizer = asked[0], model.tokenizer

    def says(text: str) -> bool:
        whole = streams.encode_line(tokenizer, one.query.text + text)
        return streams.says(tokenizer, one, whole[len(one.ids) :])

    answer = one.query.answer
    assert all(says(answer + more) for more in ("", ".", " and", ".\nLine 3", "'s"))
    assert not any(says(answer + more) for more in ("s", "on", "2", answer[1:]))
    others = [one.query.candidates[(one.right + 1) % 10], "", answer[:-1], f" J.{answer}"]
    others.append("." * len(answer) + answer)  # later, and where a word ends
    assert not any(says(other) for other in others)


def test_wilsons_interval() -> None:
    # As R's prop.test(8, 10, correct = FALSE) gives it, and the edges.
    assert streams.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert streams.wilson(0, 20) == pytest.approx((0, 0.1611252), abs=1e-6)
    assert streams.wilson(20, 20) == pytest.approx((0.8388748, 1), abs=1e-6)


def test_rows_say_at_worst_partly_inside() -> None:
    outcomes = [QueryOutcome(5, 100, 1.0, True, None), QueryOutcome(5, 110, 0.5, False, None)]
    (row,) = streams.outcome_rows(outcomes)
    assert (row["inside"], row["attended"], row["tokens_back"]) == (False, 0.75, 105)
    (row,) = streams.outcome_rows(outcomes[:1])
    assert row["inside"] is True


# --- the whole ---


def test_the_report(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    caches: list[StreamCache] = []

    def listen(model: Model, cache: StreamCache, *more: Any) -> Iterator[QueryOutcome]:
        caches.append(cache)
        return run(model, cache, *more)

    run = streams.run_distances
    monkeypatch.setattr(streams, "run_distances", listen)
    report = streameval(
        model, SINKS, WINDOW, 7, 25, (1, 10), lambda *lines: told.append(lines), generation=False
    )
    assert told == [(10, 20), (20, 20)]
    queries = texts.make_data(7, 25, (1, 10)).queries
    spare = spare_of([streams.encode_query(model.tokenizer, query) for query in queries])
    assert caches[0].geometry.spare == spare, "no query costs the stream an attended token"
    assert report.experiment == "streameval"
    assert report.about == {
        "model": "tiny",
        "dtype": "float32",
        "quantized": False,
        "trained_context": 512,
        "sinks": SINKS,
        "window": WINDOW,
        "seed": 7,
        "lines": 25,
        "query_every": 10,
        "candidates": 10,
        "machine": backend.describe(),
    }
    assert [[row["lines_back"], row["queries"], row["generation"]] for row in report.rows] == [
        [1, 2, None],
        [10, 2, None],
    ]
    json.dumps(report.as_json(), allow_nan=False)
    again = streameval(model, SINKS, WINDOW, 7, 25, (1, 10))
    assert [row["likelihood"] for row in again.rows] == [row["likelihood"] for row in report.rows]
    assert all(0 <= row["generation"] <= 1 for row in again.rows)
