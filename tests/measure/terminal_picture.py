"""Draws a Markdown reply as the terminal shows it, printed in pieces, on a light or a dark ground.

    python -m tests.measure.terminal_picture tests/measure/reply.md FOLDER

Writes FOLDER/terminal.svg and FOLDER/terminal-dark.svg, 80 columns wide.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI, TerminalTheme
from rich.text import Text

from mlx_stream.cli.markdown_printer import MarkdownPrinter
from tests.fakes.emulator import Emulator

COLUMNS, ROWS, PIECE = 80, 200, 5
QUESTION = "Compare the rocky planets."
THEMES: dict[str, TerminalTheme] = {
    "terminal.svg": DEFAULT_TERMINAL_THEME,
    "terminal-dark.svg": MONOKAI,
}


def shown_lines(text: str) -> list[str]:
    """Return the lines on the screen after a reply was printed, with their styles."""
    screen = Emulator(COLUMNS, ROWS)
    printer = MarkdownPrinter(screen.write, lambda: (COLUMNS - 1, ROWS))
    for at in range(0, len(text), PIECE):
        printer.add(text[at : at + PIECE])
    printer.flush()
    return screen.styled


def picture(lines: list[str], theme: TerminalTheme) -> str:
    """Return a picture of lines; it needs no font from the network."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text("> ") + Text(QUESTION), style="bold")
    for line in lines:
        console.print(Text.from_ansi(line))
    drawn = console.export_svg(title="mlx_stream chat", theme=theme)
    drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)
    return drawn.replace("Fira Code, monospace", "monospace")


if __name__ == "__main__":
    source, folder = map(Path, sys.argv[1:])
    lines = shown_lines(source.read_text("utf-8"))
    for name, theme in THEMES.items():
        (folder / name).write_text(picture(lines, theme), "utf-8")
