"""Shows a chat's replies, the model's thinking, notices and marks; independent of conversations.

On a terminal, words wrap, Markdown is rendered, and notices wait for the end of a reply. Elsewhere,
standard output gets only the model's text.
"""

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from mlx_stream.cli.terminal import (
    REPEATED,
    Progress,
    defer_interrupts,
    progress_bar,
    repeats_itself,
)
from mlx_stream.program.escape import TerminalEscaper, escape
from mlx_stream.program.exits import notify
from mlx_stream.program.terminal import (
    BOLD,
    DIM,
    UNBOLD,
    UNDIM,
    WordWrapper,
    is_dumb,
    is_styled,
    terminal_size,
    wrap,
)

if TYPE_CHECKING:
    from mlx_stream.text.pieces import Piece

    Pieces = Generator[Piece, None, None]

SECONDS_WITHOUT_PROGRESS = 0.5


class ReplyStopped(Exception):
    """The user stopped the reply."""


class Printer(Protocol):
    """Prints text that arrives in pieces; `flush` ends its last line."""

    def add(self, text: str) -> None: ...
    def flush(self) -> None: ...


class Screen:
    """Standard output and standard error, as used by one chat.

    Args:
        check_ended: called after every piece and reply; raises an error if a signal ended the
            program.
        hide_thinking: never show the model's thinking; otherwise it is shown only on a terminal.
        plain: do not render Markdown.
    """

    def __init__(
        self, check_ended: Callable[[], None], hide_thinking: bool = False, plain: bool = False
    ) -> None:
        self._check_ended = check_ended
        self.is_terminal = sys.stdout.isatty()
        self._shows_thinking = self.is_terminal and not hide_thinking
        self._renders = self.is_terminal and not plain and not is_dumb()
        self._printer: Printer | None = None
        self._kind: Callable[[], Printer] | None = None
        self._notices: list[str] = []  # these wait for the end of a reply
        self._told_of_repetition = False
        self._stopped: Callable[[], bool] = bool
        self._progress = ExitStack()

    @contextmanager
    def reply(self, stoppable: bool = True) -> Iterator[Progress]:
        """Show a reply in the `with` block; yields a progress callback for reading the prompt.

        Args:
            stoppable: whether Ctrl-C stops only the reply, even while its prompt is being read; a
                second Ctrl-C ends the program.
        """
        signals = [signal.SIGINT] if stoppable else []
        with defer_interrupts(*signals) as self._stopped, self.progress("reading") as told:

            def progress(done: int, total: int) -> None:
                self._check()
                told(done, total)

            try:
                yield progress
            except ReplyStopped:
                self.notify("stopped")
            finally:
                self._end_reply()

    def _check(self) -> None:
        self._check_ended()
        if self._stopped():
            raise ReplyStopped

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """If reading takes a while, show how much has been read, until something else is shown."""
        bar = progress_bar(label, SECONDS_WITHOUT_PROGRESS)
        try:
            yield self._progress.enter_context(bar)
        finally:
            self._progress.close()

    def show(self, pieces: "Pieces") -> None:
        """Print a reply as it arrives; call this inside a `reply` block."""
        finish, end, escaped, thoughts = None, "", TerminalEscaper(), TerminalEscaper()
        try:
            for piece in pieces:
                if piece.thinking and self._shows_thinking:
                    self._print(thoughts.add(piece.thinking), thinking_printer)
                if piece.text or not self.is_terminal:
                    end = (end + piece.text)[-REPEATED:]
                    text = escaped.add(piece.text) if self.is_terminal else piece.text
                    self._print(text, self._answer_printer)
                finish = piece.finish
                self._check()
            self._check_ended()
            if self.is_terminal:
                self._print(escaped.flush(), self._answer_printer)
                self._explain(finish, end)
        finally:
            pieces.close()

    def show_question(self, text: str) -> None:
        """Print a question again, as it appears above its reply."""
        line = wrap(escape(text), terminal_size(sys.stdout)[0])
        print(f"{BOLD}{line}{UNBOLD}" if is_styled() else line)

    def show_text(self, text: str) -> None:
        """Print a whole reply again."""
        self._print(escape(text), self._answer_printer)
        self._end_reply()

    def show_lines(self, text: str, indent: int = 0) -> None:
        """Print lines that do not come from a model, wrapped."""
        print(wrap(text, terminal_size(sys.stdout)[0], indent))

    def mark(self, text: str) -> None:
        """Print a line that divides the conversation."""
        line = wrap(f"── {escape(text)}", terminal_size(sys.stdout)[0], indent=3)
        print(f"{DIM}{line}{UNDIM}" if is_styled() else line, flush=True)

    def notify(self, text: str) -> None:
        """Print a notice; during a reply, hold it back until the reply ends."""
        if self.is_terminal and self._printer:
            self._notices.append(text)
        else:
            self._progress.close()
            notify(text)

    def _explain(self, finish: str | None, end: str) -> None:
        if finish == "length":
            self.notify("stopped at --max-tokens")
        if not self._told_of_repetition and repeats_itself(end):
            self._told_of_repetition = True
            self.notify("the reply repeats itself; --repetition-penalty 1.1 helps")

    def _print(self, text: str, kind: "Callable[[], Printer]") -> None:
        if text or not self.is_terminal:
            self._progress.close()
            if self._printer is None or self._kind != kind:
                if self._printer:  # the thinking has ended
                    self._printer.flush()
                    write("\n")
                self._printer, self._kind = kind(), kind
            self._printer.add(text)

    def _answer_printer(self) -> Printer:
        if self._renders:
            from mlx_stream.cli.markdown_printer import MarkdownPrinter

            return MarkdownPrinter(write, lambda: terminal_size(sys.stdout))
        return WrappingPrinter() if self.is_terminal else PlainPrinter()

    def _end_reply(self) -> None:
        if self._printer:
            self._printer.flush()
        self._printer, waiting, self._notices = None, self._notices, []
        for text in waiting:
            notify(text)


class PlainPrinter:
    """Prints text unchanged."""

    def add(self, text: str) -> None:
        write(text)

    def flush(self) -> None:
        write("\n")


class WrappingPrinter:
    """Prints word-wrapped text between two terminal escape sequences."""

    def __init__(self, before: str = "", after: str = "") -> None:
        self._wrapper, self._after = WordWrapper(lambda: terminal_size(sys.stdout)[0]), after
        write(before)

    def add(self, text: str) -> None:
        write(self._wrapper.add(text))

    def flush(self) -> None:
        write(f"{self._wrapper.flush()}{self._after}\n")


def thinking_printer() -> Printer:
    return WrappingPrinter(DIM, UNDIM) if is_styled() else WrappingPrinter()


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
