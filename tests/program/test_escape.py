"""Untrusted text on a terminal is shown, never obeyed, and contains nothing invisible."""

import sys
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.program.escape import TerminalEscaper, escape

# Zero-width non-joiner and joiner; Arabic, Syriac and Kaithi signs that are visible.
SHAPED = {0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x600, 0x606)}
KEPT = {0x9, 0xA, 0x200C, 0x200D, *SHAPED}

characters = st.one_of(
    st.characters(),
    st.sampled_from("\r\n\t\x1b\x7f\x9b\u202e\u2066\u200b\u2028\U000e0041\ud800 a"),
)


def pieces_of(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(st.text(characters, max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_pieces_in_any_split_join_to_the_whole(text, cuts):
    filter = TerminalEscaper()
    shown = "".join(filter.add(piece) for piece in pieces_of(text, cuts)) + filter.flush()
    assert shown == escape(text)
    assert filter.flush() == ""


def test_of_all_unicode_only_format_and_control_characters_are_escaped():
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        shown = escape(chr(code))
        escaped = shown != chr(code)
        assert escape(shown) == shown
        if category in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert escaped == (code not in KEPT), f"U+{code:04X}"
        elif escaped:  # unassigned, and reserved to be invisible
            assert category == "Cn", f"U+{code:04X}"


@pytest.mark.parametrize(
    "text",
    [
        "plain, with a tab\tand\nlines\n",
        "Größe, naïve, 日本語, 한국어, हिन्दी, ไทย, עברית, العربية",
        "می\u200cخواهم",  # noqa: RUF001  (Persian, with a zero-width non-joiner)
        "👩\u200d👩\u200d👧\u200d👦 ❤\ufe0f 👍🏽 葛\U000e0100",
        "a \\x1b that was typed",
    ],
)
def test_plain_text_is_unchanged(text):
    assert escape(text) == text
    assert TerminalEscaper().add(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]52;c;ZXZpbA==\x07", "\\x1b]52;c;ZXZpbA==\\x07"),  # the clipboard
        ("\x9b2J", "\\x9b2J"),  # one byte that is ESC [
        ("safe\rrm -rf", "safe\\rrm -rf"),
        ("a\r\nb\r\r\nc\r", "a\nb\\r\nc\\r"),
        ("abc\x08\x7f\x00", "abc\\x08\\x7f\\x00"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("pay\u200bpal", "pay\\u200bpal"),
        ("hi\U000e0068\U000e0069", "hi\\U000e0068\\U000e0069"),
    ],
)
def test_escapes_and_hidden_characters_are_shown(text, shown):
    assert escape(text) == shown


def test_a_carriage_return_waits_for_what_follows():
    filter = TerminalEscaper()
    assert filter.add("one\r") == "one"
    assert filter.add("") == ""
    assert filter.add("\ntwo\r") == "\ntwo"
    assert filter.add("three") == "\\rthree"
    assert filter.add("\r") == ""
    assert filter.flush() == "\\r"
