"""The desktop app's parts: lines of text, pauses between redraws, names, rows."""

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.chat import SessionSummary, session_files
from mlx_stream.program import paths
from mlx_stream_desktop.blocks import Block, blocks_of
from mlx_stream_desktop.history import Message, as_name, clock, new_name, slug, title_of
from mlx_stream_desktop.model_session import Gauge
from mlx_stream_desktop.text_layout import LONGEST_SHOWN, escape_markup, visible, wrap
from mlx_stream_desktop.throttle import Throttle


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", ["one two", "three"]),
        ("one four", ["one", "four"]),
        ("    def f(x):", ["    def", "f(x):"]),
        ("abcdefghijkl", ["abcdefg", "hijkl"]),
        ("a\n\nb", ["a", "", "b"]),
        ("a b  ", ["a b"]),
        ("", [""]),
    ],
)
def test_lines_break_between_words_and_in_words_that_are_too_long(text, lines):
    assert wrap(text, 7, len).split("\n") == lines


@given(st.text("ab \n", max_size=60), st.integers(1, 12))
def test_no_line_is_too_wide_and_nothing_but_spaces_is_lost(text, width):
    wrapped = wrap(text, width, len)
    assert all(len(line) <= width for line in wrapped.split("\n"))
    assert wrapped.replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")


def test_shown_text_is_cut_and_has_no_control_characters():
    assert visible("a\x1b[2Jb\r\nc\td\x00") == "a[2Jb\nc    d"
    assert escape_markup("a <b>") == "a <\N{WORD JOINER}b>"
    long = visible("x" * (LONGEST_SHOWN + 5))
    assert len(long) < LONGEST_SHOWN + 100 and long.endswith("of 20,005 characters)")


class Clock:
    """An event loop's clock that the test sets."""

    def __init__(self):
        self.now, self.waiting = 100.0, []

    def time(self):
        return self.now

    def call_later(self, delay, callback):
        self.waiting.append((self.now + delay, callback))

    def run_to(self, now):
        while self.waiting and self.waiting[0][0] <= now:
            self.now, callback = self.waiting.pop(0)
            callback()
        self.now = now


def test_a_thousand_changes_in_a_second_are_at_most_21_drawings_the_last_of_the_newest():
    clock, drawn, value = Clock(), [], 0
    loop: Any = clock
    pacer = Throttle(lambda: drawn.append((clock.now, value)), loop)
    for millisecond in range(1_000):
        clock.run_to(100 + millisecond / 1_000)
        value += 1
        pacer()
    clock.run_to(102)
    assert 19 <= len(drawn) <= 21
    assert all(b - a > 0.0499 for (a, _), (b, _) in pairwise(drawn))
    assert drawn[0][0] == 100.0 and drawn[-1][1] == 1_000


def test_a_conversation_is_named_after_its_first_question_and_no_other_has_the_name():
    assert slug("Why is the sky blue?") == "why-is-the-sky-blue"
    assert slug("/../../etc \N{SNOWMAN}") == "etc"
    assert slug("\N{SNOWMAN}") == "conversation"
    assert len(slug("word " * 100)) <= 40
    paths.private(paths.data_folder())
    for taken in ("hi", "Hi-2"):
        session_files.session_paths(taken).database.touch()
    assert new_name("Hi!") == "hi-3"
    assert session_files.NAME.fullmatch(new_name("x" * 500))


def test_a_gauge_says_numbers_with_their_units():
    gauge = Gauge(1_203, 42, 2_090, 3_412, 94_600_000, 21.34)
    for shown in ("1,203 of 2,090 tokens", "(42 pinned)", "3,412 evicted", "94.6 MB", "21.3 tok/s"):
        assert shown in str(gauge)


def test_rows_say_where_attention_begins_and_how_much_is_not_shown():
    from mlx_stream_desktop.transcript import EXCHANGES_SHOWN, rows_of
    from tests.fakes.desks import GREEDY  # noqa: F401  # it chooses the backend

    said = [Message(f"q{n}", f"r{n}", "end") for n in range(EXCHANGES_SHOWN + 5)]
    rows = rows_of(said, attended=2, name="work")
    assert rows[0].text == "5 earlier: mlx_stream sessions show work"
    at = next(n for n, row in enumerate(rows) if row.kind == "note" and n)
    gone = f"above, no longer in the window: {EXCHANGES_SHOWN + 3} exchanges"
    assert rows[at].text == gone
    assert [row.text for row in rows[at + 1 :]] == ["q23", "r23", "q24", "r24"]
    assert all(row.attended == (n > at) for n, row in enumerate(rows))
    assert [row.kind for row in rows_of(said[:1], 1, "work")] == ["you", "model"]
    assert rows_of([Message("q")], 1, None)[-1].text == " \N{HORIZONTAL ELLIPSIS}"


def test_what_was_quoted_is_shown_below_the_reply():
    from mlx_stream_desktop.transcript import rows_of
    from tests.fakes.desks import GREEDY  # noqa: F401  # it chooses the backend

    line = '[2026-05-09 17:03] "a" was answered: "b"'
    rows = rows_of([Message("q", "r", "end", recalled=(line,))], 1, "work")
    assert [row.kind for row in rows] == ["you", "model", "note"]
    assert rows[-1].text == f"quoted before this question:\n{line}"


def test_a_replys_markdown_is_blocks_and_its_mark_stands_after_them():
    from mlx_stream_desktop.transcript import rows_of

    text = "# Title\n\nSome *words*.\n\n1. one\n   - two\n     ```\n\n     x\n     ```\n> so"
    table = "| a | b |\n|---|---|\n| one | 2 |"
    assert blocks_of(text) == [
        Block("heading", "Title"),
        Block("text", "Some words."),
        Block("text", "1. one"),
        Block("text", "• two", 1),
        Block("code", "\nx", 2),
        Block("quote", "so", 1),
    ]
    assert blocks_of(table) == [Block("code", "a    b\n───  ─\none  2")]
    assert rows_of([Message("q", "*so*", "length")], 1, None)[-1].blocks == [
        Block("text", "so [cut]")
    ]
    assert rows_of([Message("q", "```\nx", "length")], 1, None)[-1].blocks == [
        Block("code", "x"),
        Block("text", " [cut]"),
    ]


def test_titles_are_as_they_were_written_and_times_are_local(monkeypatch):
    one = SessionSummary("why-me-2", 1, 1, 0, "", None, "", "Why\nme?")
    assert title_of(one) == "Why me?"
    assert title_of(SessionSummary("trip", 1, 1, 0, "", None, "", "Why me?")) == "trip"
    assert title_of(SessionSummary("trip", 0, 0, 0, "", None)) == "trip"
    assert as_name(" My trip! ") == "My-trip" and as_name("\N{SNOWMAN}") == ""
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    assert clock("2026-01-02T12:00:00Z") == "2026-01-02 14:00" and clock("") == ""
    monkeypatch.undo()
    time.tzset()
