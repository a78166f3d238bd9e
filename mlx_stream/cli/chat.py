"""`mlx_stream chat`: talk on a terminal, read turns from a pipe, or ask one question."""

import gc
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mlx_stream.chat.exchange import plural
from mlx_stream.cli import options
from mlx_stream.cli.prompt import keys_wait
from mlx_stream.cli.screen import Screen
from mlx_stream.cli.stdin import lines_of_stdin
from mlx_stream.cli.terminal import ask_line, decode_utf8
from mlx_stream.errors import MlxStreamError, SessionError, ValueRefused, one_line
from mlx_stream.program.exits import ENDING, ending_on_signals, finished_before_signals, notify
from mlx_stream.program.terminal import terminal_size

if TYPE_CHECKING:
    from mlx_stream.chat.session import ChatSession

# Modules that are needed to show a reply on a terminal and are slow to import.
SLOW_MODULES = "rich.progress", "mlx_stream.cli.markdown_printer"
# Modules that the prompt needs.
MODULES = "mlx_stream.chat.resume", "prompt_toolkit"
# How many lines from a pipe are answered before a notice says that each is a turn.
LINES_WITHOUT_NOTICE = 20
EXCHANGES_SHOWN_AGAIN = 2


@options.verb
def chat(
    *,
    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL",
            help="A folder, a Hub id, a .gguf file, or starter. Default: the saved session's, "
            "else the config file's, else the starter.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        Option(
            help="System prompt; it is never evicted. @NAME names a prompt in the config file. "
            "Default: the config file's, else a short one for the starter, and the template's own "
            "for other models. '' always uses the template's own."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        Option(
            "--prompt",
            "-p",
            help="Ask this and exit. A pipe or file on standard input is part of the question.",
        ),
    ] = None,
    lines: Annotated[
        bool,
        Option("--lines", help="Treat each line of standard input as a turn; print no notice."),
    ] = False,
    session: Annotated[
        str | None,
        Option(help="Name to save the chat under; if a chat is saved under it, continue that one."),
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
    recall: Annotated[
        int | None,
        Option(
            help="Number of window tokens to reserve for quoting evicted exchanges; 0 reserves "
            "none. Default: an eighth of the window in a saved chat."
        ),
    ] = None,
    max_tokens: options.MaxTokens = 512,
    sampling: options.SamplingOptions,
    reply: options.ReplyOptions,
    thinking: options.ThinkingOptions,
    plain: Annotated[
        bool, Option("--plain", help="Show replies as they are, without rendering Markdown.")
    ] = False,
    loading: options.LoadOptions,
    stats: options.ShowStats = False,
) -> None:
    """Chat with a model for as long as you like.

    Memory does not grow. Ctrl-C ends a reply, Ctrl-D ends the conversation, and /help lists
    commands. When standard input is not a terminal, each of its lines is a turn, and Ctrl-C ends
    the conversation. @FILE in a question inserts a text file.
    """
    if lines and prompt is not None:
        raise ValueRefused("--lines and -p cannot be used together")
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not lines and prompt is None
    if interactive and (model, session, latest) == (None, None, False):
        from mlx_stream.cli.first_model import choose_model

        model = choose_model(ask_line)
    # On a terminal, a question typed ahead is kept, and Ctrl-C ends only the reply.
    signals = ENDING if interactive else (*ENDING, signal.SIGINT)
    with (
        keys_wait() if interactive else nullcontext(),
        ending_on_signals(*signals) as check_ended,
    ):
        from mlx_stream.cli.config_file import named_prompt, setting
        from mlx_stream.hub.starter import STARTER, STARTER_SYSTEM

        if interactive:  # while the model is loaded, mostly without holding the GIL
            Thread(target=import_all, args=[MODULES]).start()
        with collecting_later():
            if latest:
                from mlx_stream.chat.summaries import latest_session

                if session is not None:
                    raise ValueRefused("--continue and --session cannot be used together")
                session = latest_session()
                if session is None:
                    raise SessionError("there is no saved session: start one with --session NAME")
            before = None
            if session is not None:
                from mlx_stream.chat.resume import header_of

                before = header_of(session)
            source = model or (before.model if before else options.default_model())
            window = attended.window
            if before is None:
                system = setting("system") if system is None else system
                window = setting("window") if window is None else window
                if system is None and source == STARTER:
                    system = STARTER_SYSTEM
            choice = sampling.as_sampling()
            question = None if prompt is None else question_of(prompt)
            screen = Screen(check_ended, thinking.hide_thinking, plain)
            if interactive:
                notify(f"loading {source}")
            loaded = loading.load(source)
            from mlx_stream.chat import resume, saving

            chosen = resume.SessionOptions(
                system=named_prompt(system) if system else system,
                window=window,
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
                recall_tokens=recall,
            )
            if session is None:
                talk = resume.new_chat(loaded, chosen, screen.notify)
            else:
                with screen.progress("reading again") as told:
                    talk = resume.open_session(session, loaded, chosen, screen.notify, told).chat
        try:
            if question is not None:
                ask(talk, screen, question)
            else:
                (run_interactive if interactive else run_batch)(talk, screen, stats, lines)
        finally:
            if saved := saving.saved_as(talk):
                with finished_before_signals():
                    saved.close()


@contextmanager
def collecting_later() -> Iterator[None]:
    """Collect no garbage: most of what is created at start-up stays.

    Collections took 80 ms of the time to the prompt with the starter, which is 0.6 to 1 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_all(modules: Sequence[str]) -> None:
    for module in modules:
        import_module(module)


def question_of(prompt: str) -> str:
    """Return the question given with `-p`, plus the files it names and standard input."""
    from mlx_stream.cli.attach import attach_files
    from mlx_stream.cli.stdin import read_stdin

    text = "" if sys.stdin.isatty() else read_stdin().strip()
    question = attach_files(prompt, notify)
    return f"{question}\n\n{text}" if text else question


def ask(chat: "ChatSession", screen: Screen, question: str, stoppable: bool = False) -> None:
    """Ask one question and show its reply."""
    with screen.reply(stoppable) as progress:
        screen.show(chat.reply(question, progress=progress))


def run_interactive(chat: "ChatSession", screen: Screen, stats: bool, lines: bool) -> None:
    """Prompt for lines on the terminal until Ctrl-D."""
    from mlx_stream.chat import session_files
    from mlx_stream.chat.saving import saved_as
    from mlx_stream.cli import commands
    from mlx_stream.cli.attach import attach_files
    from mlx_stream.cli.describe import describe_model, describe_window
    from mlx_stream.cli.history import HISTORY
    from mlx_stream.cli.prompt import Prompt
    from mlx_stream.cli.report import print_stats, shorten_line
    from mlx_stream.cli.views import first_attended

    def status() -> str:
        saved = saved_as(chat)
        width = terminal_size(sys.stdout)[0]
        return commands.status(chat.stats, saved.name if saved else None, width)

    def idle() -> str:
        try:
            if saved := saved_as(chat):
                saved.write_snapshot()
        except MlxStreamError as error:
            return one_line(error)
        return ""

    notify(describe_model(chat.model))
    notify(describe_window(chat.stats))
    notify("Ctrl-C ends a reply, Ctrl-D exits, /help lists commands")
    saved = saved_as(chat)
    if saved and chat.exchanges:
        show_end(chat, screen)
        notify(f"continuing {saved.name}: {plural(len(chat.exchanges))} attended")
    history = session_files.data_folder().parent / HISTORY
    prompt = Prompt(history, status, commands.completions(), notify, idle, SLOW_MODULES)
    line, first = "", first_attended(chat)
    while True:
        try:
            asked = commands.parse(prompt.ask(line))
        except EOFError:
            return
        line = ""
        try:
            with screen.reply() as progress:
                if isinstance(asked, str):
                    question = attach_files(asked, screen.notify)
                    screen.show(chat.reply(question, progress=progress))
                else:
                    outcome = commands.run(asked, chat, progress)
                    if outcome.text:
                        screen.show_lines(outcome.text, indent=4)
                    if outcome.pieces:
                        screen.show(outcome.pieces)
                    if outcome.quit:
                        return
                    line = outcome.prefill
        except MlxStreamError as error:
            screen.notify(one_line(error))
        before, first = first, first_attended(chat)
        if first > before and chat.exchanges:
            begins = shorten_line(chat.exchanges[0].question)
            screen.mark(f"evicted {plural(first - before)}; attention now begins at: {begins}")
        if stats:
            print_stats(chat.stats)


def show_end(chat: "ChatSession", screen: Screen) -> None:
    """Show the end of a conversation that is being continued."""
    from mlx_stream.cli.prompt import PROMPT

    for exchange in chat.exchanges[-EXCHANGES_SHOWN_AGAIN:]:
        screen.show_question(PROMPT + exchange.question)
        screen.show_text(exchange.reply)


def run_batch(chat: "ChatSession", screen: Screen, stats: bool, lines: bool) -> None:
    """Treat each line of standard input that is not blank as a turn."""
    from mlx_stream.cli.report import print_stats

    for number, line in enumerate(lines_of_stdin(), 1):
        if number == LINES_WITHOUT_NOTICE + 1 and not lines:
            notify(
                "each line of standard input is a turn; -p TEXT asks one question about all of them"
            )
        turn = decode_utf8(line, f"standard input, line {number}").strip()
        if turn:
            ask(chat, screen, turn)
            if stats:
                print_stats(chat.stats)
