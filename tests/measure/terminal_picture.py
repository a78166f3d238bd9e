"""Draws what a chat shows on a terminal, on a light or a dark background.

    python -m tests.measure.terminal_picture tests/measure/reply.md FOLDER
    python -m tests.measure.terminal_picture recall FOLDER

The first draws a Markdown reply, printed in pieces, as FOLDER/terminal.svg and terminal-dark.svg.
The second holds a conversation with the starter in which two facts leave the window, asks for both,
and draws the reply, the status bar and `/recall` as recall.svg and recall-dark.svg.
"""

import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI, TerminalTheme
from rich.text import Text

from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.session import ChatSession
from mlx_stream.cli.commands import Call, run, status
from mlx_stream.cli.markdown_printer import MarkdownPrinter
from mlx_stream.hub.starter import STARTER_SYSTEM
from mlx_stream.program.terminal import wrap
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import said
from tests.fakes.emulator import Emulator

COLUMNS, ROWS, PIECE = 80, 200, 5
THEMES: dict[str, TerminalTheme] = {"": DEFAULT_TERMINAL_THEME, "-dark": MONOKAI}
TOLD = "My dog is called Rufus.", "My sister lives in Lisbon."
SINCE = (
    "Name three fruits.",
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name two planets.",
    "What is a prime number?",
    "How do I boil an egg?",
    "What is the sea made of?",
)
ASKED = "What is my dog called, and where does my sister live?"


def shown_lines(text: str) -> list[str]:
    """Return the lines on the screen after a reply was printed, with their styles."""
    screen = Emulator(COLUMNS, ROWS)
    printer = MarkdownPrinter(screen.write, lambda: (COLUMNS - 1, ROWS))
    for at in range(0, len(text), PIECE):
        printer.add(text[at : at + PIECE])
    printer.flush()
    return screen.styled


def typed(line: str) -> str:
    return f"\x1b[1m> {line}\x1b[0m"


def markdown_lines(source: Path) -> list[str]:
    return [typed("Compare the rocky planets."), *shown_lines(source.read_text("utf-8"))]


def recall_lines() -> list[str]:
    """Return a question about what has left the window, its reply, and what `/recall` says."""
    options = SessionOptions(
        STARTER_SYSTEM, 252, sampling=Sampling(0), max_tokens=60, recall_tokens=120
    )
    with tempfile.TemporaryDirectory() as home:
        os.environ["MLX_STREAM_HOME"] = home
        saved = open_session("work", mlx_stream.load("starter", dtype="float32"), options)
        for question in (*TOLD, *SINCE):
            said(saved.chat.reply(question))
        reply = said(saved.chat.reply(ASKED))
        bar, told = bar_of(saved.chat), run(Call("/recall"), saved.chat).text
        saved.close()
    recalled = wrap(told, COLUMNS - 1, 4).split("\n")
    shown = "\n".join(shown_lines(reply)).rstrip()
    return [typed(ASKED), *shown.split("\n"), typed("/recall"), *recalled, "", bar]


def bar_of(chat: ChatSession) -> str:
    return f"\x1b[7m{status(chat.stats, 'work', COLUMNS - 1):<{COLUMNS - 1}}\x1b[0m"


def picture(lines: Sequence[str], theme: TerminalTheme) -> str:
    """Return a picture of lines; it needs no font from the network."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line))
    drawn = console.export_svg(title="mlx_stream chat", theme=theme)
    drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)
    return drawn.replace("Fira Code, monospace", "monospace")


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    name = "recall" if what == "recall" else "terminal"
    lines = recall_lines() if what == "recall" else markdown_lines(Path(what))
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, theme in THEMES.items():
        (folder / f"{name}{suffix}.svg").write_text(picture(lines, theme), "utf-8")
