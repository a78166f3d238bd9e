"""Thinking apart from the answer, however the text of a reply is cut."""

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.text.pieces import ReplyDecoder
from mlx_stream.text.thinking import STYLES, Phase, ThinkingReader, ThinkingRules, style_of
from mlx_stream.text.tokenizer import StreamDecoder

MARKS = sorted({mark for s in STYLES for mark in (*s.openings, s.closing, *s.answers)})
# Pieces of marks, whole marks of any style, and plain text.
TEXT = st.lists(
    st.sampled_from([*MARKS, *(m[:-1] for m in MARKS), *(m[1:] for m in MARKS), "a", " ", "\n"]),
    max_size=8,
).map("".join)
styles = st.sampled_from(STYLES)


def read(style, pieces, inside=False):
    reader = ThinkingReader(style, inside)
    found = [reader.add(piece) for piece in pieces]
    found.append(reader.flush())
    thinking, answer = ("".join(texts) for texts in zip(*found, strict=True))
    assert thinking == reader.thinking
    return thinking, answer


@given(styles, TEXT, st.booleans(), st.lists(st.integers(0, 60), max_size=12))
def test_where_a_reply_is_cut_does_not_matter(style, text, inside, cuts):
    ends = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert read(style, pieces, inside) == read(style, [text], inside) == read(style, text, inside)


class Given:
    """Decodes ids to given texts."""

    def __init__(self, texts):
        self.texts = texts

    def add(self, token):
        return self.texts[token]

    def flush(self):
        return ""


@given(styles, TEXT, st.booleans(), st.lists(st.integers(0, 60), max_size=12))
def test_a_reply_has_the_texts_of_its_pieces(style, text, inside, cuts):
    ends = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    decoder = cast(StreamDecoder, Given(pieces))
    reply = ReplyDecoder(decoder, (), thinking=ThinkingRules(style, inside))
    said, thought = "", ""
    for id in range(len(pieces)):
        said += reply.add(id)
        thought += reply.take_thinking()
    said += reply.flush()
    thought += reply.take_thinking()
    assert (thought, said) == read(style, [text], inside)
    assert (reply.thinking, reply.final_text()) == (thought.strip(), said)
    assert reply.final_ids() == (len(pieces), "")


PLAIN = st.text("ab \n.", min_size=1).filter(lambda text: text == text.strip())


@given(styles, PLAIN, PLAIN, st.sampled_from(["", " ", "\n\n"]), st.data())
def test_a_reply_is_split_at_its_marks(style, thinking, answer, space, data):
    opening = data.draw(st.sampled_from(style.openings))
    before = data.draw(st.sampled_from(style.answers or ("",)))
    body = f"{thinking}{style.closing}{space}{before}{answer}"
    assert read(style, space + opening + body) == (thinking, answer)
    assert read(style, body, inside=True) == (thinking, answer)
    assert read(style, before + answer) == ("", answer)
    assert read(style, opening + thinking) == (thinking, "")
    assert read(None, space + opening + body) == ("", space + opening + body)
    # The text that cuts off overlong thinking ends it here, too.
    assert read(style, opening + thinking + style.cut + answer) in (
        (thinking, answer),
        (thinking + "\n", answer),
    )


def test_thinking_in_parts_is_one_thinking():
    harmony = STYLES[0]
    parts = [opening + text for opening, text in zip(harmony.openings, "ab", strict=True)]
    text = harmony.closing.join([*parts, harmony.answers[-1] + "c"])
    assert read(harmony, text) == ("ab", "c")


def test_the_answer_keeps_a_mark_that_comes_late():
    for style in STYLES:
        text = "An answer with " + style.openings[0] + " in it."
        assert read(style, text) == ("", text)


def test_the_phase_is_known_as_early_as_it_can_be():
    reader = ThinkingReader(style_of("... </think> ..."))
    for text, phase in (("\n<thi", Phase.UNKNOWN), ("nk>", Phase.THINKING), ("x", Phase.THINKING)):
        reader.add(text)
        assert reader.phase is phase
    assert reader.add("</think>\n") == ("", "") and reader.phase is Phase.UNKNOWN
    assert reader.add("\nA") == ("", "A") and reader.phase is Phase.ANSWER


@pytest.mark.parametrize(
    ("source", "opening"),
    [
        ("{{ content.split('</think>')[-1] }}", "<think>"),
        ("[THINK] and [/THINK]", "[THINK]"),
        ("<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
        ("text.split('<channel|>')", "<|channel>thought\n"),
    ],
)
def test_a_template_shows_how_its_model_thinks(source, opening):
    style = style_of(source)
    assert style and style.openings[0] == opening
    assert style_of("{{ messages }}") is None
