"""A terminal that understands all that printing a reply uses: lines, cursor up, clear, styles."""

import re

from rich.cells import cell_len

CONTROL = re.compile(r"\x1b\[([\d;]*)([A-Za-z])|\n|[^\x1b\n]+")


class Emulator:
    """The rows of a screen and of what has scrolled off it.

    Args:
        columns, rows: the size.

    Attributes:
        lines: all rows so far, without styles; the last `rows` of them are the screen.
        styled: the same with the codes of their styles.
    """

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self.lines, self.styled, self._row = [""], [""], 0

    def resize(self, columns: int) -> None:
        """Change the width; longer rows wrap, as in most terminals."""
        self.columns, before = columns, self.lines
        self.lines = []
        for line in before:
            self.lines += [line[at : at + columns] for at in range(0, len(line) or 1, columns)]
        self.styled, self._row = list(self.lines), len(self.lines) - 1

    def write(self, text: str) -> None:
        for found in CONTROL.finditer(text):
            number, letter = found[1], found[2]
            if found[0] == "\n":
                self._row += 1
                if self._row == len(self.lines):
                    self.lines.append("")
                    self.styled.append("")
            elif letter == "A":
                self._row -= int(number or 1)
                assert self._row >= max(0, len(self.lines) - self.rows), "above the screen"
            elif letter == "J":
                self.lines[self._row :], self.styled[self._row :] = [""], [""]
            elif letter == "m":
                self.styled[self._row] += found[0]
            else:
                assert not letter, "not understood"
                self.lines[self._row] += found[0]
                self.styled[self._row] += found[0]
                assert cell_len(self.lines[self._row]) < self.columns, "beyond the edge"

    @property
    def text(self) -> str:
        """All rows, without empty ones at the end."""
        return "\n".join(self.lines).rstrip("\n")
