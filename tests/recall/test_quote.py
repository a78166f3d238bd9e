"""A quotation stays on its line and within its budget, whatever the text is."""

import json

import pytest

from mlx_stream.recall.quote import BEGIN, END, Passage, choose_passages, quote
from tests.fakes.recalling import HOSTILE

TIME = "2026-05-09T17:03:00Z"


def count(text: str) -> int:
    """Count tokens as a model with a token for every four bytes would."""
    return -(-len(text.encode()) // 4)


def passage(number: int, question: str, reply: str, *words: str) -> Passage:
    return Passage(number, TIME, question, reply, words)


@pytest.mark.parametrize("text", [*HOSTILE, "a. " * 10**6, "x" * 10**7])
@pytest.mark.parametrize("most", [48, 256])
def test_a_quotation_is_a_line_within_its_budget(text, most):
    chosen = choose_passages([passage(1, text, text), passage(2, "dog", text, "dog")], most, count)
    lines = quote(chosen, "What?").split("\n")
    assert (lines[0], lines[-3:]) == (BEGIN, [END, "", "What?"])
    assert len(lines) == len(chosen) + 4
    for line in lines[1:-3]:
        _, quoted = line.split("] ", 1)
        asked, answered = quoted.split(" was answered: ")
        assert isinstance(json.loads(asked), str) and isinstance(json.loads(answered), str)
    assert count(quote(chosen, "")) <= most or not chosen


def test_a_long_exchange_is_cut_to_the_sentences_around_a_word():
    before, behind = "It rained all day. " * 50, " Then we had tea." * 50
    text = f"{before}My dog is called Rufus. He is three.{behind}"
    (cut,) = choose_passages([passage(1, text, "Good.", "dogs")], 60, count)
    assert "My dog is called Rufus. " in cut.question and cut.reply == "Good."
    inner = cut.question.removeprefix("...").removesuffix("...")
    assert cut.question == f"...{inner}..." and inner in text
    assert inner[0] in "IM" and inner[-1] == "."


def test_likelier_passages_are_quoted_first_and_shown_in_order_of_time():
    passages = [passage(number, "word " * 9, "reply") for number in (7, 3, 5)]
    two = count(quote(passages[:2], ""))
    assert choose_passages(passages, two, count) == [passages[1], passages[0]]
    assert choose_passages(passages, 10, count) == []
    assert choose_passages([passage(1, "Rex", "")], 48, count)
