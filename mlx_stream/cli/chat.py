"""`mlx_stream chat`: talk on a terminal, or read turns from a pipe."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.terminal import decode, guarded, note

if TYPE_CHECKING:
    from mlx_stream.session import ChatSession

PROMPT = "> "


class Stopped(Exception):
    """The user asked for the reply to end."""


@guarded
def chat(
    model: options.ModelArgument = "starter",
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            help="The system prompt; read once. Default: for the starter a line that makes it "
            "helpful, else what the model's template says, as with ''.",
        ),
    ] = None,
    window: options.Window = None,
    sinks: options.Sinks = None,
    max_tokens: options.MaxTokens = 512,
    temp: options.Temp = 0.6,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.9,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = None,
    keep_quantized: options.KeepQuantized = None,
    force: options.Force = False,
    stats: options.ShowStats = False,
) -> None:
    """Talk with a model for as long as you like.

    Memory does not grow. Ctrl-C ends a reply, Ctrl-D the conversation. When standard input is not
    a terminal, each of its lines is a turn.
    """
    from mlx_stream import hub
    from mlx_stream.cli.report import print_stats
    from mlx_stream.generate import Sampling
    from mlx_stream.load import load
    from mlx_stream.session import ChatSession

    if system is None and model == hub.STARTER:
        system = hub.STARTER_SYSTEM
    sampling = Sampling(temp, top_k, top_p, min_p, repetition_penalty, seed)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        note(f"loading {model}")
    loaded = load(model, dtype, keep_quantized, force, note)
    screen = Screen()
    session = ChatSession(
        loaded, system or None, window, sinks, sampling, max_tokens, stop or (), screen.note
    )
    if interactive:
        note(
            f"attends to the first {session.stats.sinks} and the latest {session.stats.window:,} "
            "tokens; Ctrl-C ends a reply, Ctrl-D leaves"
        )
    for question in typed_turns() if interactive else piped_turns():
        print_reply(session, question, screen)
        if stats:
            print_stats(session.stats)


class Screen:
    """Replies on standard output; on a terminal, a notice never lands in the middle of one."""

    def __init__(self) -> None:
        self.in_reply = False

    def write(self, text: str) -> None:
        self.in_reply = True
        sys.stdout.write(text)
        sys.stdout.flush()

    def end_reply(self) -> None:
        if self.in_reply:
            print(flush=True)
        self.in_reply = False

    def note(self, text: str) -> None:
        if sys.stdout.isatty():
            self.end_reply()
        note(text)


def print_reply(session: "ChatSession", question: str, screen: Screen) -> None:
    with reply_ends_on_interrupt() as stopped:

        def check(*_: int) -> None:
            if stopped():
                raise Stopped

        pieces = session.reply(question, progress=check)
        try:
            for piece in pieces:
                screen.write(piece.text)
                check()
        except Stopped:
            screen.note("stopped")
        finally:
            pieces.close()
    screen.end_reply()


@contextmanager
def reply_ends_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C ask for the reply's end between two tokens; a second one leaves the program."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def typed_turns() -> Iterator[str]:
    """Yield what the user types; Ctrl-C drops a line, Ctrl-D ends."""
    with suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401  (line editing and recall in input())

    while True:
        try:
            line = input(PROMPT)
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        except UnicodeDecodeError:
            note("that line is not valid in this terminal's encoding; type it again")
            continue
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def piped_turns() -> Iterator[str]:
    """Yield the lines of standard input that are not blank."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        turn = decode(line, f"standard input, line {number}").strip()
        if turn:
            yield turn
