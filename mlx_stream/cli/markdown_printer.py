"""Prints a reply to a terminal as Markdown while it is generated; handles blocks, not styles.

    closed blocks     printed once; they become part of the scrollback
    the open block    reprinted from the first line that has changed, whenever a word is complete

The cursor can only move within the screen. So when the open block is about to fill it, or when the
window is resized, what is already shown is left alone, and the rest of the block is printed below.
"""

import re
from collections.abc import Callable

from mlx_stream.cli.markdown import as_ansi, render_lines
from mlx_stream.program.markdown import split_blocks
from mlx_stream.program.terminal import UNSPACED

# Blocks that are shown a whole line at a time: fenced code and tables.
BY_LINES = re.compile(r" *(```|~~~|\|)")
# The beginning of a line that may be a block of its own, or belong to the block before it.
UNDECIDED = re.compile(r"[ >*+\-#=_~`|\d.)]*")
LAST_WORD = re.compile(rf"[^\s{UNSPACED}]*$")


class MarkdownPrinter:
    """Print text that arrives in pieces and contains no control characters.

    Args:
        write: prints to the terminal and flushes.
        size: returns the columns that may be used, and the rows.
    """

    def __init__(self, write: Callable[[str], None], size: Callable[[], tuple[int, int]]):
        self._write, self._size, self._at = write, size, size()
        self._source = ""  # of the open block
        self._shown: list[str] = []  # its lines on the screen; the cursor is below them
        self._end = 0  # how much of the source is shown
        self._begun = self._gap = False  # whether a block, and an empty line, precede it
        self._continues = False  # whether it continues a block printed above

    def add(self, text: str) -> None:
        """Add a piece, and print whatever can now be shown."""
        self._source += text
        if not self._begun:
            self._source = self._source.lstrip("\n")
        if self._at != (now := self._size()):
            self._split(self._end)
            self._at = now
        blocks = split_blocks(self._source) or [""]
        if len(blocks) > 1 and UNDECIDED.fullmatch(blocks[-1]):
            blocks[-2:] = ["".join(blocks[-2:])]
        *closed, opened = blocks
        for block in closed:
            self._close(block)
        self._source = opened
        end = certain_end(opened)
        if end > self._end or closed:
            self._draw(end)

    def flush(self) -> None:
        """Print the rest; no more text will follow."""
        for block in split_blocks(self._source):
            self._close(block)
        self._source = ""

    def _close(self, block: str) -> None:
        """Print a block that will not change again."""
        self._replace(self._lines(block))
        self._shown, self._end, self._continues = [], 0, False
        self._begun, self._gap = True, ends_with_gap(block)

    def _draw(self, end: int) -> None:
        """Show the open block up to `end`."""
        lines = self._lines(self._source[:end])
        if len(lines) >= self._at[1] - 1:
            end = self._source.rfind("\n", 0, end) + 1 or self._end or end
            self._replace(self._lines(self._source[:end]))
            return self._split(end)
        self._replace(lines)
        self._end = end

    def _split(self, end: int) -> None:
        """Keep what is already shown; the text after `end` becomes a block that continues it."""
        if not end:
            return
        head, rest = self._source[:end], self._source[end:]
        self._begun, self._gap = True, ends_with_gap(head)
        self._source, self._continues = opening_of(head) + rest, True
        self._shown, self._end = [], 0

    def _lines(self, block: str) -> list[str]:
        lines = [as_ansi(line) for line in render_lines(block, self._at[0])]
        if self._continues:
            return lines[1:] if opening_of(block).strip(" ")[:1] in ("`", "~") else lines
        return ["", *lines] if lines and self._begun and self._gap else lines

    def _replace(self, lines: list[str]) -> None:
        """Replace the open block's lines on the screen with these."""
        same = 0
        while same < min(len(lines), len(self._shown)) and lines[same] == self._shown[same]:
            same += 1
        back = len(self._shown) - same
        move = f"\x1b[{back}A\x1b[J" if back else ""
        self._write(move + "".join(f"{line}\n" for line in lines[same:]))
        self._shown = lines


def certain_end(block: str) -> int:
    """Return how much of an open block can be shown: whole words, or whole lines."""
    if BY_LINES.match(block):
        end = block.rfind("\n") + 1
        is_table = block.lstrip(" ").startswith("|")
        return 0 if is_table and block.count("\n", 0, end) < 2 else end
    word = LAST_WORD.search(block)
    return word.start() if word and len(word[0]) < 100 else len(block)


def opening_of(block: str) -> str:
    """Return the lines that the rest of a block needs before it: a fence, or a table's header."""
    found = BY_LINES.match(block)
    if not found:
        return ""
    lines = block.splitlines(keepends=True)
    return "".join(lines[: 2 if found[1] == "|" else 1])


def ends_with_gap(block: str) -> bool:
    return not "".join(block.splitlines()[-1:]).strip()
