"""Generated lines and queries: the same bytes everywhere, each answer in the line asked about."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

from mlx_stream.errors import TextError
from mlx_stream.evaluate import streameval_data as texts

# The hash of the data file for seed 1, 200 lines and the default distances. If it changes, the
# version must change.
GOLDEN = "6999d81f8170f730e5e2cef6e5ea29243ca4128b24abf55cadc53714c19e62d0"
DATA = texts.make_data(7, 30, (1, 2, 3, 10))


def test_the_data_are_the_same_bytes_everywhere() -> None:
    data = texts.make_data(1, 200)
    assert hashlib.sha256(data.as_bytes()).hexdigest() == GOLDEN
    assert texts.make_data(2, 200).as_bytes() != data.as_bytes()


def test_the_lists_are_as_the_generator_needs_them() -> None:
    assert len(texts.SURNAMES) == 10 and len(texts.FIRST_NAMES) == 101
    for known in (texts.SURNAMES, texts.FIRST_NAMES, texts.THINGS, texts.JOBS):
        assert len(set(known)) == len(known) and all(re.fullmatch("[A-Za-z]+", w) for w in known)
    for one, other in itertools.permutations(texts.SURNAMES, 2):
        assert not one.startswith(other)


def test_each_answer_is_in_the_line_asked_about() -> None:
    data = texts.make_data(3, 300)
    assert [line.number for line in data.lines] == [*range(1, 301)]
    assert data.text == texts.OPENING + "".join(line.text for line in data.lines)
    places = [(q.after, q.lines_back) for q in data.queries]
    assert places == [(n, d) for n in range(160, 301, 10) for d in texts.DISTANCES]
    for number, query in enumerate(data.queries, start=1):
        assert query.number == number
        # Counting back from the next line, which is where the query is.
        line, about = query.line, query.after + 1 - query.lines_back
        assert line is data.lines[about - 1]
        asked = re.fullmatch(
            r"Question: Who owns (.*) in line (\d+)\?\nAnswer: (\w+)", line.question
        )
        assert asked and int(asked[2]) == about
        assert line.text.lower().startswith(f"line {about}: {asked[1]} belongs to a ")
        assert line.text.endswith(f", {asked[3]}{line.answer}.\n")
        assert line.answer in texts.CANDIDATES


def test_fewer_lines_are_the_beginning_of_more() -> None:
    few, many = texts.make_data(4, 40, (5, 20)), texts.make_data(4, 95, (5, 20))
    assert many.text.startswith(few.text)
    assert many.queries[: len(few.queries)] == few.queries
    # The worked example.
    assert [(q.after, q.line.number) for q in few.queries][:4] == [
        (20, 16),
        (20, 1),
        (30, 26),
        (30, 11),
    ]


def test_the_file_has_lines_and_queries_in_the_order_of_reading(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("what was there before")
    texts.write_data(DATA, path)
    assert path.read_bytes() == DATA.as_bytes()
    header, *records = map(json.loads, path.read_text("ascii").splitlines())
    assert (header["format"], header["version"]) == ("mlx_stream streameval", 1)
    assert (header["seed"], header["lines"], header["distances"]) == (7, 30, [1, 2, 3, 10])
    read, waiting, last = header["opening"], iter(DATA.queries), 0
    for record in records:
        if "line" in record:
            last = record["line"]
            read += record["text"]
        else:
            query = next(waiting)
            assert (record["query"], query.after) == (query.number, last)
            assert (record["about"], record["text"]) == (query.line.number, query.line.question)
            assert record["candidates"] == [f" {name}" for name in texts.SURNAMES]
    assert read == DATA.text and next(waiting, None) is None
    with pytest.raises(TextError, match="cannot be written: No such file"):
        texts.write_data(DATA, tmp_path / "nowhere" / "data.jsonl")
