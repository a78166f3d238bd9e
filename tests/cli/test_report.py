"""Tables and texts fit a terminal: each word whole, each row's cells together."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mlx_stream.cli.report import aligned_lines
from tests.fakes.shell import program
from tests.fakes.terminals import Terminal

WORDS = st.lists(st.text("ab漢", min_size=1, max_size=9), min_size=1, max_size=8).map(" ".join)
TABLES = st.integers(1, 5).flatmap(
    lambda columns: st.lists(st.tuples(*[WORDS] * columns), min_size=1, max_size=4)
)


def test_columns_that_do_not_fit_are_below_the_others():
    rows = [("abcde", "f", "ghijkl"), ("漢字", "x", "y")]
    assert list(aligned_lines(rows, 17)) == ["abcde  f  ghijkl", "漢字   x  y"]
    assert list(aligned_lines(rows, 9)) == ["abcde  f\n  ghijkl", "漢字   x\n  y"]


def test_the_last_column_wraps_beside_the_others():
    rows = [("name", "a text that is longer than the terminal is wide")]
    assert list(aligned_lines(rows, 32)) == [
        "name  a text that is longer than\n      the terminal is wide"
    ]


@given(TABLES, st.integers(30, 100))
def test_no_line_is_too_wide_and_no_word_is_lost_or_broken(rows, width):
    for row, line in zip(rows, aligned_lines(rows, width), strict=True):
        assert all(cell_len(part) <= width for part in line.split("\n"))
        found = line.split() if "漢" not in line else re.sub(r"\s", "", line)
        whole = " ".join(row).split() if "漢" not in line else re.sub(r"\s", "", "".join(row))
        assert found == whole


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
@pytest.mark.parametrize("columns", [80, 40])
def test_what_verbs_print_fits_the_terminal(letters, columns):
    for verb in (["models"], ["devices"], ["doctor"], ["show", letters], ["plan", letters]):
        terminal = Terminal(*program(*verb)[1:], columns=columns)
        terminal.end()
        lines = re.sub(r"\x1b\[\d+m|\r", "", terminal.shown).splitlines()
        assert len(lines) > 4 and max(map(len, lines)) < columns, verb


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_statistics_fit_the_terminal(letters):
    options = ("-p", "Hello", "--max-tokens", 4, "--stats")
    terminal = Terminal(*program("generate", letters, *options)[1:], columns=60)
    terminal.end()
    _, _, shown = terminal.shown.partition("[7 of 512 tokens attended")
    first, second = re.sub(r"\x1b\[\d+m|\r", "", shown).splitlines()
    assert len(f"[7 of 512 tokens attended{first}") < 60 and second.endswith("]")
