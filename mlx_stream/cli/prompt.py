"""The prompt of a chat: history, multi-line input, completion and a status bar.

It uses prompt_toolkit, which is imported when a prompt is created. It does not touch the model and
needs only the names of commands. A terminal that cannot move its cursor (TERM=dumb) gets a plain
input line.
"""

import re
import sys
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_stream.program.escape import escape
from mlx_stream.program.terminal import is_dumb

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "> "
HINT = "(Ctrl-D exits)"
# Surrogates, which stand for bytes that are not UTF-8.
NO_TEXT = re.compile("[\ud800-\udfff]")
SECONDS_OF_IDLENESS = 60.0

Notify = Callable[[str], None]


class Prompt:
    """Ask for lines on the terminal; standard input and output must both be terminals.

    Enter sends; Alt-Enter or Ctrl-J starts a new line; pasted text stays together.

    Args:
        history: the file of earlier lines; it is created, with its folder, if it is missing.
        status: returns the status bar's text; called whenever the bar is drawn.
        completions: the commands to complete at the beginning of a line, each with a description.
        idle: called once when nothing has been typed for a minute; keystrokes wait until it
            returns. Any text that it returns is shown as a notice. Never called on a terminal that
            cannot move its cursor.
        modules: imported while the first line is being typed.
    """

    def __init__(
        self,
        history: Path,
        status: Callable[[], str],
        completions: Mapping[str, str],
        notify: Notify,
        idle: Callable[[], str] = str,
        modules: Sequence[str] = (),
    ):
        from mlx_stream.cli.history import open_history

        self.notify, self._notices = notify, []
        kept = open_history(history, self._notices.append)
        if is_dumb():
            self._read = lambda default: plain_line(default, kept)
        else:
            self._read = editor(kept, status, completions, self._while_typing(idle, modules))

    def ask(self, default: str = "") -> str:
        """Return the text typed, which is not blank and may span several lines.

        Raises:
            EOFError: Ctrl-D on an empty line, or the end of the input.
        """
        while True:
            while self._notices:  # not in the middle of a line being edited
                self.notify(self._notices.pop(0))
            try:
                line = self._read(default)
            except KeyboardInterrupt:
                print(HINT, flush=True)
                default = ""
                continue
            default = NO_TEXT.sub("\ufffd", line)
            if line != default:
                self.notify("that line is not UTF-8: retype the characters shown as \ufffd")
            elif line.strip():
                return line
            else:
                default = ""

    def _while_typing(self, idle: Callable[[], str], modules: Sequence[str]) -> Callable[[], None]:
        """Return a function that imports modules and waits until the user has stopped typing."""

        async def wait() -> None:
            import asyncio

            from prompt_toolkit.application import get_app, run_in_terminal

            await asyncio.to_thread(lambda: [import_module(name) for name in modules])
            before = None
            while (typed := get_app().current_buffer.text) != before:
                before = typed
                await asyncio.sleep(SECONDS_OF_IDLENESS)
            if notice := idle():
                await run_in_terminal(lambda: self.notify(notice))

        def begin() -> None:
            from prompt_toolkit.application import get_app

            get_app().create_background_task(wait())

        return begin


def editor(
    history: "History",
    status: Callable[[], str],
    completions: Mapping[str, str],
    begun: Callable[[], None],
) -> Callable[[str], str]:
    """Return a function that reads text, edited with prompt_toolkit."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.styles import Style

    session: PromptSession[str] = PromptSession(
        PROMPT,
        style=Style.from_dict({"": "bold"}),  # so that earlier questions stand out
        multiline=True,
        history=history,
        # `sentence`: a completion begins where the text does.
        completer=WordCompleter(list(completions), meta_dict=completions, sentence=True),
        # Room for the menu is kept free only where it may open: at a command.
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
        key_bindings=key_bindings(),
        bottom_toolbar=status,
        enable_suspend=True,
    )
    # A terminal that does not report the cursor position has no status bar; do not warn about it.
    session.app.renderer.cpr_not_supported_callback = None
    return lambda default: session.prompt(default=default, pre_run=begun)


def plain_line(default: str, history: "History") -> str:
    """Read a line that the terminal itself edits and shows; Enter alone returns the default."""
    print(f"{PROMPT}[{escape(default)}] " if default else PROMPT, end="", flush=True)
    try:
        data = sys.stdin.buffer.readline()
    except KeyboardInterrupt:
        print()
        raise
    if not data:
        print()
        raise EOFError
    line = data.decode("utf-8", "surrogateescape").rstrip("\r\n")
    history.append_string(line or default)
    return line or default


def key_bindings() -> "KeyBindings":
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    bindings, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @bindings.add("enter", filter=typing)
    def send(event: "KeyPressEvent") -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=typing)
    @bindings.add("c-j", filter=typing)
    def begin_line(event: "KeyPressEvent") -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


@contextmanager
def keys_wait() -> Iterator[None]:
    """Keep keys pressed while no prompt is shown, except Ctrl-C, for the next prompt.

    Otherwise the terminal would show them in the middle of the reply and turn Enter into Ctrl-J.
    This stays in effect for a whole conversation, so that Enter also means the same between a reply
    and the next prompt. A terminal that cannot move its cursor edits and shows lines itself, as
    usual.
    """
    if is_dumb():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    held = list(before)
    held[0] &= ~termios.ICRNL
    held[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, held)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
