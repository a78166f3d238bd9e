"""What a line that begins with a slash does to a conversation; knows no terminal and no file.

`parse` tells a command from a question, `run` carries a command out. Nothing of a refused command
has happened, and the chat goes on.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_stream.chat.exchange import plural
from mlx_stream.errors import MlxStreamError, ValueRefused, one_line
from mlx_stream.program.escape import escape

if TYPE_CHECKING:
    from mlx_stream.chat.session import ChatSession
    from mlx_stream.generate.stats import Stats
    from mlx_stream.text.pieces import Piece

    Pieces = Generator[Piece, None, None]

Progress = Callable[[int, int], None]

NOTHING = ("''", '""')
LONGEST_QUOTE = 60


@dataclass(frozen=True)
class CommandOutcome:
    """What is to be done after a command.

    Attributes:
        text: to be shown; harmless.
        pieces: a reply to be printed and closed. Errors while it is read are the caller's.
        prefill: what the next prompt begins with.
    """

    text: str = ""
    pieces: "Pieces | None" = None
    prefill: str = ""
    quit: bool = False


@dataclass(frozen=True)
class Call:
    """A line that begins with a slash; the command need not exist."""

    name: str
    argument: str = ""


@dataclass(frozen=True)
class CommandContext:
    """What every command is run with."""

    chat: "ChatSession"
    argument: str
    list_sessions: Callable[[], Iterable[str]]
    progress: Progress | None


@dataclass(frozen=True)
class Command:
    """A command; its argument as usage shows it: "" takes none, [..] may be left out."""

    argument: str
    help: str
    run: Callable[[CommandContext], CommandOutcome]


def parse(line: str) -> Call | str:
    """Return a command's call, or else the question; //text is the question /text."""
    if line.startswith("//"):
        return line[1:]
    if not line.startswith("/"):
        return line
    name, *argument = line.split(maxsplit=1)
    return Call(name, "".join(argument).strip())


def run(
    call: Call,
    chat: "ChatSession",
    list_sessions: Callable[[], Iterable[str]],
    progress: Progress | None = None,
) -> CommandOutcome:
    """Carry a command out.

    Args:
        list_sessions: returns the names of the saved sessions.
        progress: for `retry` and `edit`.
    """
    try:
        command = command_of(call)
        outcome = command.run(CommandContext(chat, call.argument, list_sessions, progress))
    except MlxStreamError as error:
        return CommandOutcome(escape(one_line(error)))
    return CommandOutcome(escape(outcome.text), outcome.pieces, outcome.prefill, outcome.quit)


def command_of(call: Call) -> Command:
    """Look a command up, and see that its argument is there, or not, as it should be."""
    command = COMMANDS.get(call.name)
    if command is None:
        raise ValueRefused(
            f"{shorten_line(call.name)} is no command: /help lists them, and // at the beginning "
            "sends a line that begins with /"
        )
    if call.argument and not command.argument:
        raise ValueRefused(
            f"{call.name} takes nothing after it, not {shorten_line(call.argument)!r}"
        )
    if command.argument and not call.argument and not command.argument.startswith("["):
        raise ValueRefused(f"{call.name} needs something after it: {call.name} {command.argument}")
    return command


def completions() -> dict[str, str]:
    """Return what a prompt may complete: each command, and what it does."""
    return {name: command.help for name, command in COMMANDS.items()}


def status(stats: "Stats", name: str | None = None) -> str:
    """Return the status bar's text: "1,012/2,052 attended · 3,400 evicted · 12.3 tok/s · …"."""
    parts = [
        f"{stats.attended:,}/{stats.sinks + stats.window:,} attended",
        f"{stats.evicted:,} evicted",
        f"{stats.tokens_per_second:.1f} tok/s",
        f"cache {stats.cache_bytes / 1e6:.1f} MB",
    ]
    return " · ".join([*parts, name] if name else parts)


def shorten_line(text: str) -> str:
    """Return a text on one line, its end left out if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_QUOTE else line[: LONGEST_QUOTE - 1] + "…"


# --- the commands ---


def show_help(given: CommandContext) -> CommandOutcome:
    usages = [f"{name} {command.argument}".rstrip() for name, command in COMMANDS.items()]
    width = max(len(usage) for usage in usages)
    lines = [
        f"{usage:<{width}}  {command.help}"
        for usage, command in zip(usages, COMMANDS.values(), strict=True)
    ]
    return CommandOutcome(
        "\n".join([*lines, f"{'//TEXT':<{width}}  send a question that begins with /"])
    )


def system(given: CommandContext) -> CommandOutcome:
    if given.argument:
        text = None if given.argument in NOTHING else given.argument
        given.chat.restart(text, given.chat.stats.window)
        return CommandOutcome(
            "the system prompt is changed" if text else "there is no system prompt now"
        )
    return CommandOutcome(given.chat.system or "there is no system prompt")


def retry(given: CommandContext) -> CommandOutcome:
    return CommandOutcome(pieces=given.chat.retry(progress=given.progress))


def undo(given: CommandContext) -> CommandOutcome:
    return CommandOutcome(f"taken back: {shorten_line(given.chat.undo().question)}")


def edit(given: CommandContext) -> CommandOutcome:
    if given.argument:
        return CommandOutcome(pieces=given.chat.edit(given.argument, progress=given.progress))
    question = given.chat.unanswered or "".join(e.question for e in given.chat.exchanges[-1:])
    if not question:
        raise ValueRefused("there is nothing to edit: no question has been asked yet")
    # The line says itself that it replaces a question: dropped, it has changed nothing.
    return CommandOutcome(prefill=f"/edit {question}")


def stats(given: CommandContext) -> CommandOutcome:
    return CommandOutcome(str(given.chat.stats))


def window(given: CommandContext) -> CommandOutcome:
    if given.argument:
        given.chat.restart(given.chat.system, tokens(given.argument))
    now = given.chat.stats
    return CommandOutcome(
        f"the window is {now.window:,} tokens, after {now.sinks:,} that always stay"
    )


def tokens(argument: str) -> int:
    try:
        return int(argument.replace(",", ""))
    except ValueError:
        raise ValueRefused(
            f"/window takes a whole number of tokens, not {shorten_line(argument)!r}"
        ) from None


def save(given: CommandContext) -> CommandOutcome:
    from mlx_stream.chat.saving import SavedSession, saved_as

    saved, name = saved_as(given.chat), given.argument
    if not saved and not name:
        raise ValueRefused("this conversation has no name yet: give one, /save NAME")
    saved = saved or SavedSession.create(given.chat, name)
    if name not in ("", saved.name):
        raise ValueRefused(f"it is saved as {saved.name!r}; /export writes a copy")
    saved.flush()
    saved.write_snapshot()
    return CommandOutcome(
        f"saved as {saved.name}; go on with: mlx_stream chat --session {saved.name}"
    )


def sessions(given: CommandContext) -> CommandOutcome:
    names = list(given.list_sessions())
    return CommandOutcome("\n".join(names) or "no session is saved: /save NAME saves this one")


def export(given: CommandContext) -> CommandOutcome:
    from mlx_stream.chat.export import write_export
    from mlx_stream.chat.saving import saved_turns

    name = given.argument
    if len(name) > 2 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ValueRefused(f"/export {name}: {error}") from error
    header, turns = saved_turns(given.chat)
    write_export(path, header, turns)
    return CommandOutcome(f"{plural(len(turns))} written to {path}")


def clear(given: CommandContext) -> CommandOutcome:
    given.chat.clear()
    return CommandOutcome("nothing but the system prompt is attended now")


def leave(given: CommandContext) -> CommandOutcome:
    return CommandOutcome(quit=True)


COMMANDS = {
    "/help": Command("", "list the commands", show_help),
    "/system": Command("[TEXT]", "show the system prompt, or change it; '' removes it", system),
    "/retry": Command("", "answer the last question once more", retry),
    "/undo": Command("", "take the last question and its reply back", undo),
    "/edit": Command("[TEXT]", "change the last question and ask it again", edit),
    "/stats": Command("", "show tokens attended and evicted, speed and memory", stats),
    "/window": Command("[N]", "show how many tokens are attended, or change it", window),
    "/save": Command("[NAME]", "save the conversation now", save),
    "/sessions": Command("", "list the saved conversations", sessions),
    "/export": Command("FILE", "write what was said to a .md or .json file", export),
    "/clear": Command("", "let all that was said leave attention", clear),
    "/quit": Command("", "leave, as Ctrl-D does", leave),
}
