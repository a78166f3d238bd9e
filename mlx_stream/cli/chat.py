"""`mlx_stream chat`: talk on a terminal, or read turns from a pipe; saved, if it has a name."""

import os
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mlx_stream.chat.exchange import plural
from mlx_stream.cli import options
from mlx_stream.cli.prompt import is_dumb, keys_wait
from mlx_stream.cli.terminal import (
    REPEATED,
    Progress,
    decode_utf8,
    defer_interrupts,
    log_progress,
    repeats_itself,
)
from mlx_stream.errors import MlxStreamError, SessionError, ValueRefused, one_line
from mlx_stream.program.escape import TerminalEscaper
from mlx_stream.program.exits import ending_on_signals, finished_before_signals, notify

if TYPE_CHECKING:
    from mlx_stream.chat.session import ChatSession
    from mlx_stream.text.pieces import Piece

    Pieces = Generator[Piece, None, None]


class ReplyStopped(Exception):
    """The user asked for the reply to end."""


@options.verb
def chat(
    *,
    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL",
            help="A folder, a Hub id, a .gguf file, or starter. Default: the saved session's, "
            "else the starter.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        Option(
            help="System prompt; it is never evicted. Default: a short one for the starter, and "
            "the template's own for other models. '' always uses the template's own."
        ),
    ] = None,
    session: Annotated[
        str | None,
        Option(help="Name to save the chat under; if one with this name exists, it is continued."),
    ] = None,
    latest: Annotated[
        bool, Option("--continue", help="Continue the most recently used session.")
    ] = False,
    attended: options.WindowOptions,
    evict: Annotated[
        str | None,
        Option(
            help="What a full window evicts: turn drops whole exchanges, oldest first (the "
            "default); token drops single tokens, oldest first."
        ),
    ] = None,
    max_tokens: options.MaxTokens = 512,
    sampling: options.SamplingOptions,
    reply: options.ReplyOptions,
    thinking: options.ThinkingOptions,
    loading: options.LoadOptions,
    stats: options.ShowStats = False,
) -> None:
    """Chat with a model for as long as you like.

    Memory does not grow. Ctrl-C ends a reply, Ctrl-D ends the conversation, and /help lists
    commands. When standard input is not a terminal, each of its lines is a turn, and Ctrl-C ends
    the conversation.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    # On a terminal a question typed ahead is kept, and Ctrl-C ends only the reply.
    with keys_wait() if interactive else ending_on_signals(signal.SIGINT):
        from mlx_stream.chat import resume, saving, summaries
        from mlx_stream.hub.starter import STARTER, STARTER_SYSTEM

        if latest:
            if session is not None:
                raise ValueRefused("--continue and --session exclude each other: use one of them")
            session = summaries.latest_session()
            if session is None:
                raise SessionError("there is no saved session: start one with --session NAME")
        before = resume.header_of(session) if session is not None else None
        source = model or (before.model if before else STARTER)
        if system is None and before is None and source == STARTER:
            system = STARTER_SYSTEM
        choice = sampling.as_sampling()
        if interactive:
            notify(f"loading {source}")
            # Imported while the weights are read: MLX does that without Python's lock.
            Thread(target=import_module, args=("prompt_toolkit",)).start()
        loaded = loading.load(source)
        screen = Screen(thinking.hide_thinking)
        chosen = resume.SessionOptions(
            system=system,
            window=attended.window,
            sinks=attended.sinks,
            evict=evict,
            sampling=choice,
            max_tokens=max_tokens,
            stop=tuple(reply.stop or ()),
            kv_bits=attended.kv_bits,
            speculate=reply.speculate,
            draft=loading.load(reply.draft) if reply.draft else None,
            think=thinking.think,
            reasoning_effort=thinking.reasoning_effort,
        )
        if session is None:
            talk = resume.new_chat(loaded, chosen, screen.notify)
        else:
            told = log_progress("reading again")
            talk = resume.open_session(session, loaded, chosen, screen.notify, told).chat
        try:
            (run_interactive if interactive else run_batch)(talk, screen, stats)
        finally:
            if saved := saving.saved_as(talk):
                with finished_before_signals():
                    saved.close()


def run_interactive(chat: "ChatSession", screen: "Screen", stats: bool) -> None:
    """Ask for lines on the terminal until Ctrl-D."""
    from mlx_stream.chat import session_files
    from mlx_stream.chat.saving import saved_as
    from mlx_stream.cli import commands
    from mlx_stream.cli.prompt import Prompt
    from mlx_stream.cli.report import print_stats

    def status() -> str:
        saved = saved_as(chat)
        return commands.status(chat.stats, saved.name if saved else None)

    def idle() -> str:
        try:
            if saved := saved_as(chat):
                saved.write_snapshot()
        except MlxStreamError as error:
            return one_line(error)
        return ""

    now = chat.stats
    begin = "the system prompt" if now.pinned else f"the first {now.sinks:,}"
    notify(f"attends to {begin} and the latest {now.window:,} tokens")
    notify("Ctrl-C ends a reply, Ctrl-D leaves, /help lists commands")
    saved = saved_as(chat)
    if saved and chat.exchanges:
        notify(f"continuing {saved.name}: {plural(len(chat.exchanges))} attended")
    history = session_files.data_folder().parent / "history"
    prompt = Prompt(history, status, commands.completions(), notify, idle)
    line = ""
    while True:
        try:
            asked = commands.parse(prompt.ask(line))
        except EOFError:
            return
        line = ""
        try:
            with screen.reply() as progress:
                if isinstance(asked, str):
                    screen.show(chat.reply(asked, progress=progress))
                else:
                    outcome = commands.run(asked, chat, progress)
                    if outcome.text:
                        print(outcome.text)
                    if outcome.pieces:
                        screen.show(outcome.pieces)
                    if outcome.quit:
                        return
                    line = outcome.prefill
        except MlxStreamError as error:
            screen.notify(one_line(error))
        if stats:
            print_stats(chat.stats)


def run_batch(chat: "ChatSession", screen: "Screen", stats: bool) -> None:
    """Read each line of standard input that is not blank as a turn."""
    from mlx_stream.cli.report import print_stats

    for number, line in enumerate(sys.stdin.buffer, 1):
        turn = decode_utf8(line, f"standard input, line {number}").strip()
        if turn:
            screen.show(chat.reply(turn, progress=log_progress("reading")))
            screen.end_reply()
            if stats:
                print_stats(chat.stats)


class Screen:
    """Replies on standard output; escaped on a terminal, and without notices in the middle.

    A model's thinking is shown dimmed, on a terminal only.
    """

    def __init__(self, hide_thinking: bool = False) -> None:
        self.in_reply = self.in_thinking = self.told = False
        self._stopped = lambda: False
        self.shows_thinking = sys.stdout.isatty() and not hide_thinking
        styled = not is_dumb() and not os.environ.get("NO_COLOR")
        self.dim, self.undim = ("\x1b[2m", "\x1b[22m") if styled else ("", "")

    @contextmanager
    def reply(self) -> Iterator[Progress]:
        """Let Ctrl-C end the reply shown in the `with` block; a second Ctrl-C ends the program.

        Yields a progress callback for reading the prompt, which Ctrl-C ends too.
        """
        told = log_progress("reading")

        def progress(done: int, total: int) -> None:
            self._check()
            told(done, total)

        with defer_interrupts(signal.SIGINT) as self._stopped:
            yield progress
        self.end_reply()

    def _check(self) -> None:
        if self._stopped():
            raise ReplyStopped

    def show(self, pieces: "Pieces") -> None:
        """Print a reply as it arrives."""
        shown = TerminalEscaper() if sys.stdout.isatty() else None
        finish, end, thoughts = None, "", TerminalEscaper()
        try:
            for piece in pieces:
                if piece.thinking and self.shows_thinking:
                    self.write_thinking(thoughts.add(piece.thinking))
                end = (end + piece.text)[-REPEATED:]
                self.write(shown.add(piece.text) if shown else piece.text)
                finish = piece.finish
                self._check()
            if shown and (rest := shown.flush()):
                self.write(rest)
            if shown and finish == "length":
                self.notify("cut at its limit (--max-tokens)")
            if shown and not self.told and repeats_itself(end):
                self.told = True
                self.notify("the reply repeats itself; --repetition-penalty 1.1 makes that rare")
        except ReplyStopped:
            self.notify("stopped")
        finally:
            pieces.close()

    def write(self, text: str) -> None:
        if text:
            self.end_thinking()
        self.in_reply = True
        sys.stdout.write(text)
        sys.stdout.flush()

    def write_thinking(self, text: str) -> None:
        begin = "" if self.in_thinking else self.dim
        self.in_reply = self.in_thinking = True
        sys.stdout.write(begin + text)
        sys.stdout.flush()

    def end_thinking(self) -> None:
        if self.in_thinking:
            sys.stdout.write(self.undim + "\n\n")
        self.in_thinking = False

    def end_reply(self) -> None:
        self.end_thinking()
        if self.in_reply:
            print(flush=True)
        self.in_reply = False

    def notify(self, text: str) -> None:
        if sys.stdout.isatty():
            self.end_reply()
        notify(text)
