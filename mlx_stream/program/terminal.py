"""A terminal's width and styles, and text wrapped to fit it; independent of models.

Widths are in cells: a CJK character or an emoji takes two. The last column stays empty, because
terminals differ in where they put the cursor after it.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from mlx_stream.program.escape import escape

BOLD, UNBOLD = "\x1b[1m", "\x1b[22m"
DIM, UNDIM = "\x1b[2m", "\x1b[22m"
DEFAULT_COLUMNS, DEFAULT_ROWS, NARROWEST = 80, 24, 10
# Scripts without spaces between words: a line may end after each character, but not before closing
# punctuation.
UNSPACED = "\u2e80-\u2fdf\u3040-\ua4cf\uf900-\ufaff\uff21-\uffef\U0001f300-\U0003fffd"
CLOSING = "\u3001-\u3003\u3009\u300b\u300d\u300f\u3011\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f"
JOINED = "\u200d\ufe0f\U0001f3fb-\U0001f3ff"  # what joins several characters into one emoji
ATOM = re.compile(
    rf"\n|[^\S\n]+|[{UNSPACED}](?:\u200d.|[{JOINED}{CLOSING}])*|[^\s{UNSPACED}]+[{CLOSING}]*"
)


def is_dumb() -> bool:
    """Return whether the terminal cannot move its cursor."""
    return os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")


def is_styled() -> bool:
    """Return whether to use colours and styles on the user's terminal."""
    return not is_dumb() and not os.environ.get("NO_COLOR")


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """Return the size of a stream's terminal: the columns that may be used, and the rows."""
    columns, rows = 0, 0
    with suppress(OSError, ValueError):  # not a terminal, so it has no size
        columns, rows = os.get_terminal_size(stream.fileno())
    return max(NARROWEST, (columns or DEFAULT_COLUMNS) - 1), rows or DEFAULT_ROWS


def line_breaks(text: str, width: int, column: int = 0, indent: int = 0) -> list[int]:
    """Return the offsets in a text at which new lines must begin, besides those after \\n.

    A word that is longer than a line is split. Spaces before a break may extend beyond the width.
    With a width of 7, "one two three" has one break, at 8.

    Args:
        column: where the text begins on its line.
        indent: cells at the beginning of each new line.
    """
    from rich.cells import cell_len

    breaks: list[int] = []
    for found in ATOM.finditer(text):
        atom = found[0]
        size = cell_len(atom)
        if atom == "\n":
            column = 0
        elif atom.isspace() or column + size <= width:
            column += size
        else:
            if column > indent:
                breaks.append(found.start())
                column = indent
            if column + size <= width:
                column += size
                continue
            for offset, char in enumerate(atom, found.start()):
                if column + cell_len(char) > width and column > indent:
                    breaks.append(offset)
                    column = indent
                column += cell_len(char)
    return breaks


def wrap(text: str, width: int, indent: int = 0, column: int = 0) -> str:
    """Break lines between words; continuation lines begin with `indent` spaces."""
    breaks = line_breaks(text, width, column, indent)
    parts = [text[a:b] for a, b in zip([0, *breaks], [*breaks, len(text)], strict=True)]
    return ("\n" + " " * indent).join([*(part.rstrip(" ") for part in parts[:-1]), parts[-1]])


class WordWrapper:
    """Wrap text that arrives in pieces; joined together, the results are the whole text.

    Args:
        width: returns the width, which may change.
    """

    def __init__(self, width: Callable[[], int]):
        self._width, self._held, self._column = width, "", 0

    def add(self, text: str) -> str:
        """Return what can be shown. A word is held back until it is complete."""
        self._held += text.replace("\t", "    ")
        word = re.search(rf"[^\S\n]*[^\s{UNSPACED}]*$", self._held)
        end = word.start() if word and len(word[0]) <= self._width() else len(self._held)
        whole, self._held = self._held[:end], self._held[end:]
        return self._wrapped(whole)

    def flush(self) -> str:
        """Return what was held back; no more text will follow."""
        held, self._held = self._held, ""
        return self._wrapped(held)

    def _wrapped(self, text: str) -> str:
        from rich.cells import cell_len

        shown = wrap(text, self._width(), column=self._column)
        _, broken, last = shown.rpartition("\n")
        self._column = cell_len(last) + (0 if broken else self._column)
        return shown


def styled_notice(text: str, width: int, dim: bool) -> str:
    """Return a line for the user as a terminal shows it: wrapped, and dim if requested."""
    text = wrap(escape(text), width, indent=2)
    return f"{DIM}{text}{UNDIM}" if dim and is_styled() else text
