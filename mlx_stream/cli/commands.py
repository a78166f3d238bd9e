"""Runs slash commands on a conversation; independent of terminals and files.

`parse` distinguishes a command from a question, and `run` executes it. A refused command changes
nothing.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_stream.chat.exchange import plural
from mlx_stream.cli import recall, views
from mlx_stream.cli.config_file import named_prompt
from mlx_stream.cli.report import shorten_line
from mlx_stream.errors import MlxStreamError, ValueRefused, one_line
from mlx_stream.program.escape import escape

if TYPE_CHECKING:
    from mlx_stream.chat.session import ChatSession
    from mlx_stream.generate.stats import Stats
    from mlx_stream.text.pieces import Piece

    Pieces = Generator[Piece, None, None]

Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class CommandOutcome:
    """What to do after a command.

    Attributes:
        text: the text to show, with control characters escaped.
        pieces: a reply to print and close. The caller handles errors raised while reading it.
        prefill: the text that the next prompt starts with.
    """

    text: str = ""
    pieces: "Pieces | None" = None
    prefill: str = ""
    quit: bool = False


@dataclass(frozen=True)
class Call:
    """A line that starts with a slash; the command need not exist."""

    name: str
    argument: str = ""


@dataclass(frozen=True)
class Command:
    """A command. `argument` is shown in its usage: "" if it takes none, [..] if it is optional.

    `run` returns either the text to show or a complete outcome.
    """

    argument: str
    help: str
    run: "Callable[[ChatSession, str, Progress], str | CommandOutcome]"


def parse(line: str) -> Call | str:
    """Return a command call if the line is one, else the question; //text is the question /text."""
    if line.startswith("//"):
        return line[1:]
    if not line.startswith("/"):
        return line
    name, *argument = line.split(maxsplit=1)
    return Call(name, "".join(argument).strip())


def run(call: Call, chat: "ChatSession", progress: Progress = None) -> CommandOutcome:
    """Execute a command; `progress` is called while tokens are being read."""
    try:
        outcome = command_of(call).run(chat, call.argument, progress)
    except MlxStreamError as error:
        outcome = one_line(error)
    return CommandOutcome(escape(outcome)) if isinstance(outcome, str) else outcome


def command_of(call: Call) -> Command:
    """Look up a command, and check that its argument is present or absent as required."""
    command = COMMANDS.get(call.name)
    if command is None:
        raise ValueRefused(
            f"Unknown command {shorten_line(call.name)!r}. Try /help; start with // to ask a "
            "question that begins with /."
        )
    if call.argument and not command.argument:
        raise ValueRefused(
            f"{call.name} takes no argument: leave out {shorten_line(call.argument)!r}"
        )
    if command.argument and not call.argument and not command.argument.startswith("["):
        raise ValueRefused(f"{call.name} needs an argument: {call.name} {command.argument}")
    return command


def completions() -> dict[str, str]:
    """Return the commands that a prompt can complete, with a description of each."""
    return {name: command.help for name, command in COMMANDS.items()}


def status(stats: "Stats", name: str | None = None, width: int = 200) -> str:
    """Return the status bar's text: "1,012/2,052 attended · 3,400 evicted · 2 recalled · …".

    Parts that do not fit the width are left out.
    """
    parts = [
        f"{stats.attended:,}/{stats.sinks + stats.window:,} attended",
        f"{stats.evicted:,} evicted",
        *([f"{stats.recalled} recalled"] if stats.recalled else []),
        f"{stats.tokens_per_second:.1f} tok/s",
        f"cache {stats.cache_bytes / 1e6:.1f} MB",
    ]
    parts += [name] if name else []
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts.pop()
    return " · ".join(parts)


# --- the commands ---


def show_help(chat: "ChatSession", argument: str, progress: Progress) -> str:
    usages = {f"{name} {command.argument}": command.help for name, command in COMMANDS.items()}
    usages["//TEXT"] = "send a question that begins with /"
    usages["@FILE"] = "in a question, inserts a text file, if there is one"
    width = max(map(len, usages))
    return "\n".join(f"{usage:<{width}}  {text}" for usage, text in usages.items())


def system(chat: "ChatSession", argument: str, progress: Progress) -> str:
    if not argument:
        return chat.system or "there is no system prompt"
    text = None if argument in ("''", '""') else argument
    chat.restart(named_prompt(text) if text else None, chat.stats.window, progress)
    return "the system prompt has changed" if text else "there is no system prompt now"


def retry(chat: "ChatSession", argument: str, progress: Progress) -> CommandOutcome:
    return CommandOutcome(pieces=chat.retry(progress=progress))


def undo(chat: "ChatSession", argument: str, progress: Progress) -> str:
    return f"removed: {shorten_line(chat.undo().question)}"


def edit(chat: "ChatSession", argument: str, progress: Progress) -> CommandOutcome:
    if argument:
        return CommandOutcome(pieces=chat.edit(argument, progress=progress))
    question = chat.unanswered or "".join(e.question for e in chat.exchanges[-1:])
    if not question:
        raise ValueRefused("there is nothing to edit: no question has been asked yet")
    # The prefilled line is itself an edit command, so discarding it changes nothing.
    return CommandOutcome(prefill=f"/edit {question}")


def stats(chat: "ChatSession", argument: str, progress: Progress) -> str:
    return str(chat.stats)


def window(chat: "ChatSession", argument: str, progress: Progress) -> str:
    if argument:
        try:
            size = int(argument.replace(",", ""))
        except ValueError:
            raise ValueRefused(
                f"/window takes a whole number of tokens, not {shorten_line(argument)!r}"
            ) from None
        chat.restart(chat.system, size, progress)
    now = chat.stats
    return f"the window is {now.window:,} tokens, in addition to {now.sinks:,} that always stay"


def save(chat: "ChatSession", argument: str, progress: Progress) -> str:
    from mlx_stream.chat.saving import SavedSession, saved_as

    saved = saved_as(chat)
    if not saved and not argument:
        raise ValueRefused("this conversation has no name yet: give it one with /save NAME")
    if not saved:
        saved = SavedSession.create(chat, argument)
        saved.start_recall()
    if argument not in ("", saved.name):
        raise ValueRefused(f"it is already saved as {saved.name!r}; /export writes a copy")
    saved.flush()
    saved.write_snapshot()
    return f"saved as {saved.name}; to continue it: mlx_stream chat --session {saved.name}"


def export(chat: "ChatSession", argument: str, progress: Progress) -> str:
    from mlx_stream.chat.export import write_export
    from mlx_stream.chat.saving import saved_turns

    name = argument
    if len(name) > 2 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ValueRefused(f"/export {name}: {error}") from error
    header, turns = saved_turns(chat)
    write_export(path, header, turns)
    return f"{plural(len(turns))} written to {path}"


def file(chat: "ChatSession", argument: str, progress: Progress) -> CommandOutcome:
    from mlx_stream.cli.attach import naming

    return CommandOutcome(prefill=naming(argument))


def clear(chat: "ChatSession", argument: str, progress: Progress) -> str:
    return recall.clear(chat)


def show_recalled(chat: "ChatSession", argument: str, progress: Progress) -> str:
    return recall.show_recalled(chat, argument)


def forget(chat: "ChatSession", argument: str, progress: Progress) -> str:
    return recall.forget(chat, argument)


def pin(chat: "ChatSession", argument: str, progress: Progress) -> str:
    return recall.pin(chat, argument)


def leave(chat: "ChatSession", argument: str, progress: Progress) -> CommandOutcome:
    return CommandOutcome(quit=True)


COMMANDS = {
    "/help": Command("", "list the commands", show_help),
    "/system": Command("[TEXT]", "show the system prompt, or change it; '' removes it", system),
    "/retry": Command("", "answer the last question again", retry),
    "/undo": Command("", "remove the last question and its reply", undo),
    "/edit": Command("[TEXT]", "change the last question and ask it again", edit),
    "/stats": Command("", "show tokens attended and evicted, speed and memory", stats),
    "/window": Command("[N]", "show or change how many tokens are attended to", window),
    "/save": Command("[NAME]", "save the conversation now", save),
    "/sessions": Command("", "list the saved conversations", views.sessions),
    "/history": Command("", "list the questions of this conversation", views.history),
    "/show": Command("[N]", "show exchange N again, or the last one", views.show),
    "/model": Command("", "show which model this is, and its size", views.model),
    "/temp": Command("[T]", "show the temperature, from 0 to 5, or change it", views.temp),
    "/file": Command("FILE", "ask about a text file, as @FILE in a question does", file),
    "/export": Command("FILE", "write the conversation to a .md or .json file", export),
    "/clear": Command("", "remove the whole conversation from attention", clear),
    "/pin": Command("TEXT", "add a line to the system prompt, which is never evicted", pin),
    "/recall": Command("[TEXT]", "show quotations, or search evicted exchanges", show_recalled),
    "/forget": Command("N", "delete exchange N if it has left the window", forget),
    "/quit": Command("", "exit, as Ctrl-D does", leave),
}
