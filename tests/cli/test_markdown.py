"""Markdown on a terminal: a reply printed as it is written looks like one printed whole."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.cli.markdown import as_ansi, render_lines
from mlx_stream.cli.markdown_printer import MarkdownPrinter
from mlx_stream.program.markdown import split_blocks
from tests.fakes.emulator import Emulator

SAMPLE = """\
# A title with **bold**

Some *text* with `code`, a [link](https://example.com/a), &amp; and <b>HTML</b> that wraps around.
Second line of a poem with 日本語のテキスト、です and an emoji 👍 that stands near the edge

1. **First**: an item that is long enough to wrap over the edge of forty columns
   - nested
     - deeper

     a paragraph in it
2. Second
10. Tenth
- a ~~bullet~~

> a quotation that goes beyond the edge of a line of forty columns
> - with a list

```python
def add(first, second):  # a comment that is long enough to reach beyond the edge of the screen

    return first + second
```
| name | value | what it is |
|------|------:|------------|
| one  | 1 | a description that wraps |
| two  | 22 | 日本 |

text
---
[name]: https://example.com/b
"""
PARTS = st.lists(st.sampled_from([*SAMPLE.splitlines(keepends=True), "\n", "word ", "**"]))


def printed(text, columns, rows, size=5, resize=None):
    """Return the terminal after printing a text in pieces of `size` characters."""
    screen = Emulator(columns, rows)
    printer = MarkdownPrinter(screen.write, lambda: (screen.columns - 1, screen.rows))
    for at in range(0, len(text), size):
        if resize and at >= len(text) // 2:
            screen.resize(resize)
            resize = None
        printer.add(text[at : at + size])
    printer.flush()
    return screen


def rendered(text, width):
    return "\n".join(line.plain for line in render_lines(text, width)).rstrip("\n")


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_streamed_reply_ends_as_the_whole_reply_is_rendered(columns, size):
    assert printed(SAMPLE, columns, 200, size).text == rendered(SAMPLE, columns - 1)


@given(PARTS, st.integers(1, 60))
def test_any_text_in_any_pieces_ends_as_its_blocks_are_rendered(parts, size):
    text = "".join(parts).strip("\n")
    assert "".join(split_blocks(text)) == text
    assert printed(text, 60, 10_000, size).text == printed(text, 60, 10_000, 10**6).text


@given(PARTS, st.integers(20, 90))
def test_no_line_is_too_wide_and_no_word_is_lost(parts, width):
    text = "".join(parts)
    lines = render_lines(text, width)
    assert all(line.cell_len <= width for line in lines)
    shown = "".join(line.plain for line in lines).replace(" ", "")
    assert all(
        shown.count(word) >= text.count(word) for word in ("poem", "deeper", "&amp;", "[name]:")
    )


def words_of(kind):
    """Return a reply of 300 lines, and the words that must each appear once on the screen."""
    words = [f"w{number}w" for number in range(300)]
    separators = {"one paragraph": " ", "lines": "\n", "paragraphs": "\n\n"}
    if kind in separators:
        return separators[kind].join(words), words
    marks = {
        "list": "- {}\n",
        "nested list": "   - {}\n",
        "code": "{} = 1\n",
        "table": "| {} | b |\n",
    }
    body = "".join(marks[kind].format(word) for word in words)
    if kind == "code":
        return f"```python\n{body}```\n", words
    return {"nested list": "1. All\n", "table": "| a | b |\n|---|---|\n"}.get(
        kind, ""
    ) + body, words


@pytest.mark.parametrize(
    "kind",
    ["one paragraph", "lines", "paragraphs", "list", "nested list", "code", "table"],
)
@pytest.mark.parametrize("resize", [None, 40])
def test_a_reply_taller_than_the_screen_stands_once_and_whole(kind, resize):
    text, words = words_of(kind)
    shown = printed(text, 80, 24, resize=resize).text
    assert re.findall(r"w\d+w", "".join(shown.split())) == words
    if kind == "table":
        assert "|" not in shown and shown.count("\na ") >= 1 - bool(resize)
    elif not resize:
        assert shown == rendered(text, 79)


def test_only_the_open_block_is_printed_again():
    writes = []
    printer = MarkdownPrinter(writes.append, lambda: (79, 24))
    for piece in ("first **block** here\n\n", "second ", "one *is* ", "open "):
        printer.add(piece)
    printer.flush()
    assert "".join(writes).count("first") == 1 and "".join(writes).count("second") > 1


def test_code_can_be_copied_and_colours_obey_no_color(monkeypatch):
    (fence, line, end) = render_lines("```python\n\treturn None  # why\n```", 60)
    assert [fence.plain, line.plain, end.plain] == ["```python", "    return None  # why", "```"]
    assert "\x1b[35m" in as_ansi(line)


def test_a_table_that_is_too_wide_is_a_line_for_each_cell():
    table = "| name | what it does |\n|---|---|\n| alpha | unpronounceable |\n"
    assert rendered(table, 18) == "name: alpha\nwhat it does:\nunpronounceable"
