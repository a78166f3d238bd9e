"""Text broken between words: no line is too wide, and nothing but spaces is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mlx_stream.program.terminal import WordWrapper, styled_notice, wrap

TEXTS = st.text("ab, \n日本。é👍", max_size=80)
WIDTHS = st.integers(10, 40)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", ["one two", "three"]),
        ("one four", ["one", "four"]),
        ("abcdefghijkl", ["abcdefg", "hijkl"]),
        ("a\n\nb", ["a", "", "b"]),
        ("日本語テキスト", ["日本語", "テキス", "ト"]),
        ("日本語。です", ["日本", "語。で", "す"]),
        ("see 日本", ["see 日", "本"]),
        ("👩‍👩‍👧👍🏽👍🏽👍🏽", ["👩‍👩‍👧👍🏽👍🏽", "👍🏽"]),
        ("", [""]),
    ],
)
def test_lines_break_between_words_and_in_words_that_are_too_long(text, lines):
    assert wrap(text, 7).split("\n") == lines


@given(TEXTS, WIDTHS, st.integers(0, 4))
def test_no_line_is_too_wide_and_nothing_but_spaces_is_lost(text, width, indent):
    wrapped = wrap(text, width, indent)
    assert all(cell_len(line.rstrip()) <= width for line in wrapped.split("\n"))
    assert "".join(wrapped.split()) == "".join(text.split())


@given(TEXTS, st.integers(10, 30), st.integers(1, 9))
def test_a_text_in_pieces_is_broken_as_the_whole_is(text, width, size):
    wrapper = WordWrapper(lambda: width)
    pieces = [wrapper.add(text[at : at + size]) for at in range(0, len(text), size)]
    shown = "".join([*pieces, wrapper.flush()])
    assert all(cell_len(line.rstrip()) <= width for line in shown.split("\n"))
    assert "".join(shown.split()) == "".join(text.split())


@pytest.mark.parametrize("size", [1, 4, 9])
def test_words_in_pieces_stand_on_the_lines_they_have_in_the_whole(size):
    text = " ".join(f"word{number}" for number in range(60))
    for width in range(10, 30):
        wrapper = WordWrapper(lambda width=width: width)
        pieces = [wrapper.add(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join([*pieces, wrapper.flush()]) == wrap(text, width)


def test_a_notice_is_wrapped_dim_and_cannot_control_the_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styled_notice("one two\x1b[2J three", 12, dim=True) == (
        "\x1b[2mone\n  two\\x1b[2J\n  three\x1b[22m"
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in styled_notice("one two three", 12, dim=True)
