"""A stream asked about its lines: scores equal those from scratch, and the stream is unchanged."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from mlx_stream.errors import ValueRefused
from mlx_stream.evaluate import streameval as streams
from mlx_stream.evaluate import streameval_data as texts
from mlx_stream.evaluate.streameval import EncodedQuery, streameval
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import load
from mlx_stream.text.tokenizer import Tokenizer

# With the tiny tokenizer a line has about 45 tokens and a query 60: the line before a query is in
# the window, and the third one back is not.
SINKS, WINDOW = 4, 130
DATA = texts.make_data(7, 30, (1, 2, 3, 10))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load(tiny)


@pytest.fixture(scope="module")
def asked(model: Model) -> list[EncodedQuery]:
    return [streams.encode_query(model.tokenizer, query) for query in DATA.queries]


def ids_until(model: Model, after: int) -> list[int]:
    """Return the ids of the text up to a line, encoded as a whole."""
    text = texts.OPENING + "".join(line.text for line in DATA.lines[:after])
    return model.tokenizer.encode(text)


def plain_stream(model: Model, after: int) -> TokenStream:
    """Return a stream without spare rows that has read up to a line and has been asked nothing."""
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
        ({"window": 0}, "`window` must be at least 1, not 0"),
        ({"window": 40}, r"--window must be at least \d\d, .* not 40"),
        ({"window": 10_000}, "trained context"),
        ({"sinks": -1}, "`sinks`"),
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
        for candidate, ids in zip(texts.CANDIDATES, one.candidates, strict=True):
            whole = tokenizer.encode(DATA.text + one.query.line.question + candidate)
            assert whole == [*apart, *one.ids, *ids]
    assert {len(ids) for one in asked for ids in one.candidates} >= {3, 4, 5}, "several tokens"


def test_a_tokenizer_that_puts_a_space_before_every_text() -> None:
    """As with Llama 2's, every line but the first must be encoded as the continuation of a text."""
    letters = sorted({*"▁\n", *DATA.text, *DATA.queries[0].line.question} - {" "})
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
    assert tokenizer.decode([*apart, *one.ids]) == DATA.text + one.query.line.question + " "
    assert [tokenizer.decode(ids) for ids in one.candidates] == [*texts.SURNAMES]
    assert streams.says(tokenizer, one, one.candidates[one.right])


# --- one stream ---


def test_candidates_score_as_they_do_from_scratch(
    model: Model, asked: list[EncodedQuery], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[list[float], list[int]]] = []
    ask = streams.ask_query
    monkeypatch.setattr(
        streams, "ask_query", lambda *args: (given.append(ask(*args)), given[-1])[1]
    )
    cache = model.new_cache(SINKS, WINDOW, spare_of(asked))
    assert len([*streams.run_distances(model, cache, DATA, asked)]) == len(asked) == 12
    # The ring has wrapped twice before the first query. At each distance, some lines are inside
    # and some outside.
    for index in (0, 5, 10):
        one, (likelihoods, written) = asked[index], given[index]
        for chosen in (one.right, 9 - one.right):
            ids = one.candidates[chosen]
            stream = plain_stream(model, one.query.after)
            logits = [stream.read(one.ids), *(stream.read([id]) for id in ids[:-1])]
            expected = [
                float((x[id] - mx.logsumexp(x)).item())  # type: ignore[arg-type]
                for x, id in zip(logits, ids, strict=True)
            ]
            assert likelihoods[chosen] == pytest.approx(sum(expected), abs=1e-3)
        stream = plain_stream(model, one.query.after)
        assert stream.cache.evicted > 2 * WINDOW
        logits, said = stream.read(one.ids), []
        for _ in range(one.longest + 1):
            said.append(int(mx.argmax(logits).item()))  # type: ignore[arg-type]
            logits = stream.read(said[-1:])
        assert written == said


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
    def said() -> list[int]:
        stream = TokenStream(model, model.new_cache(SINKS, WINDOW, spare_of(asked)))
        return streams.ask_query(model, stream, asked[0])[1]

    written = said()
    assert written and len(written) == asked[0].longest + 1
    monkeypatch.setattr(model.tokenizer, "eos_ids", frozenset(written[1:]) - {written[0]})
    assert said() == written[: len([*itertools.takewhile(lambda x: x == written[0], written)])]


def test_inside_is_what_the_cache_attends_to(
    model: Model, asked: list[EncodedQuery], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inside` is what is attended to once the last token that scores a candidate is read."""
    found: list[float] = []

    def listen(
        model: Model, stream: TokenStream, one: EncodedQuery
    ) -> tuple[list[float], list[int]]:
        longest = max(one.candidates, key=len)
        begun = stream.length
        stream.read([*one.ids, *longest[:-1]])
        whole = [*ids_until(model, one.query.after), *one.ids, *longest[:-1]]
        start = len(ids_until(model, one.query.line.number - 1))
        stop = len(ids_until(model, one.query.line.number))
        kept = {*range(SINKS), *range(len(whole) - WINDOW, len(whole))}
        assert stream.ids.attended() == [whole[t] for t in sorted(kept)]
        found.append(len(kept & {*range(start, stop)}) / (stop - start))
        stream.rewind(stream.length - begun)
        return [0.0] * 10, []

    monkeypatch.setattr(streams, "ask_query", listen)
    cache = model.new_cache(SINKS, WINDOW, spare_of(asked))
    outcomes = [*streams.run_distances(model, cache, DATA, asked)]
    assert [one["attended"] for one in outcomes] == found
    assert [one["tokens_back"] for one in outcomes] == [
        len(ids_until(model, one.query.after)) - len(ids_until(model, one.query.line.number - 1))
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


def test_accuracy_is_counted_for_each_distance(
    model: Model, asked: list[EncodedQuery], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three queries at each of four distances: none, one, two and all three are right.
    right = iter([*(0, 0, 1, 1), *(0, 1, 1, 1), *(0, 0, 0, 1)])

    def answer(
        model: Model, stream: TokenStream, one: EncodedQuery
    ) -> tuple[list[float], list[int]]:
        chosen = one.right if next(right) else (one.right + 1) % 10
        return [-1.0 if i == chosen else -2.0 - i for i in range(10)], one.candidates[chosen]

    monkeypatch.setattr(streams, "ask_query", answer)
    cache = model.new_cache(SINKS, WINDOW, spare_of(asked))
    rows = streams.outcome_rows([*streams.run_distances(model, cache, DATA, asked)])
    assert [(row["lines_back"], row["queries"]) for row in rows] == [(d, 3) for d in (1, 2, 3, 10)]
    for rule in ("likelihood", "generation"):
        assert [row[rule] for row in rows] == [0, 1 / 3, 2 / 3, 1]
    assert all(row["likelihood_low"] <= row["likelihood"] <= row["likelihood_high"] for row in rows)


def test_a_tie_is_not_an_answer() -> None:
    assert streams.likeliest([-3.0, -1.0, -2.0]) == 1
    assert streams.likeliest([-1.0, -1.0]) is None
    assert streams.likeliest([-math.inf, -5.0]) == 1


def test_a_written_answer_is_a_whole_word(model: Model, asked: list[EncodedQuery]) -> None:
    one, tokenizer = asked[0], model.tokenizer

    def says(text: str) -> bool:
        whole = streams.encode_line(tokenizer, one.query.line.question + text)
        return streams.says(tokenizer, one, whole[len(one.ids) :])

    answer = one.query.line.answer
    assert all(says(answer + more) for more in ("", ".", " and", ".\nLine 3", "'s"))
    assert not any(says(answer + more) for more in ("s", "on", "2", answer[1:]))
    others = [texts.CANDIDATES[(one.right + 1) % 10], "", answer[:-1], f" J.{answer}"]
    others.append("." * len(answer) + answer)  # the answer comes later, although at a word boundary
    assert not any(says(other) for other in others)


def test_wilsons_interval() -> None:
    # The result of R's prop.test(8, 10, correct = FALSE), and then the extremes.
    assert streams.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert streams.wilson(0, 20) == pytest.approx((0, 0.1611252), abs=1e-6)
    assert streams.wilson(20, 20) == pytest.approx((0.8388748, 1), abs=1e-6)


# --- end to end ---


def test_the_report(model: Model) -> None:
    told: list[tuple[int, int]] = []
    report = streameval(model, SINKS, WINDOW, 7, 25, (1, 10), lambda *lines: told.append(lines))
    assert told == [(10, 20), (20, 20)]
    assert report.experiment == "streameval"
    about = {"sinks": SINKS, "window": WINDOW, "seed": 7, "lines": 25, "query_every": 10}
    assert report.about.items() >= (about | {"candidates": 10, "model": "tiny"}).items()
    assert [(row["lines_back"], row["queries"]) for row in report.rows] == [(1, 2), (10, 2)]
    assert all(0 <= row["generation"] <= 1 for row in report.rows)
    assert streameval(model, SINKS, WINDOW, 7, 25, (1, 10)).rows == report.rows


def test_with_recall_a_line_that_has_left_is_read_again_before_its_query(
    model: Model, asked: list[EncodedQuery], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ask = [], streams.ask_query

    def spy(model: Model, stream: TokenStream, one: EncodedQuery) -> Any:
        read.append((one.query, model.tokenizer.decode(one.ids)))
        return ask(model, stream, one)

    monkeypatch.setattr(streams, "ask_query", spy)
    cache = model.new_cache(SINKS, WINDOW, 2 * spare_of(asked))
    rows = list(streams.run_distances(model, cache, DATA, asked, recall=True))
    assert len(rows) == len(read) == len(asked)
    for query, text in read:
        assert (query.line.text in text) == (query.lines_back > 1)
