"""The commands: run, ask, note, status, stop, install, uninstall; holds no state."""

import functools
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from datetime import datetime
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mlx_stream.errors import MlxStreamError, one_line
from mlx_stream.program.escape import TerminalEscaper, escape
from mlx_stream.program.help import with_help
from mlx_stream_assistant.paths import AGENT, assistant_paths
from mlx_stream_assistant.settings import Settings
from mlx_stream_assistant.socket_server import request


def notify(text: str) -> None:
    """Print a line for the user that is not part of the result."""
    line = "".join(c if c.isprintable() else " " for c in text)
    with suppress(OSError, ValueError):  # the log is closed, or on a full disk
        print(f"assistant: {line}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    notify(text)
    raise SystemExit(1)


class Commands(TyperGroup):
    """The commands; an error that a user can cause becomes one line and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MlxStreamError as error:
            fail(one_line(error))
        except BrokenPipeError:
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            notify("interrupted")
            raise SystemExit(130) from None


app = typer.Typer(
    cls=Commands,
    name="assistant",
    help="A local assistant that follows files, notes and pipes for days. "
    "Nothing leaves this machine.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def option_of(each: Field[Any]) -> Any:
    return typer.Option("--" + each.name.replace("_", "-"), **each.metadata)


Name = Annotated[str, option_of(Settings.__dataclass_fields__["name"])]


def takes_settings(*without: str) -> Callable[[Callable[[Settings], None]], Callable[..., None]]:
    """Give a command the options of `Settings`, except those named."""
    kinds = get_type_hints(Settings)
    options = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=[] if each.default is MISSING else each.default,
            annotation=Annotated[kinds[each.name], option_of(each)],
        )
        for each in fields(Settings)
        if each.name not in without
    ]

    def decorate(verb: Callable[[Settings], None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def run(**given: Any) -> None:
            verb(Settings(**given).with_absolute_paths())

        run.__annotations__ = {option.name: option.annotation for option in options}
        run.__dict__["__signature__"] = inspect.Signature(options)
        return run

    return decorate


@app.command()
@takes_settings()
def run(settings: Settings) -> None:
    """Follow the sources until stopped by Ctrl-C, SIGTERM or `stop`."""
    from mlx_stream_assistant.daemon import Assistant

    assistant = Assistant(settings, notify)
    failed = False
    try:
        assistant.run()
        notify(f"{settings.name} has stopped; its journal is kept")
    except MlxStreamError as error:
        failed = True
        notify(one_line(error))
    # Everything is on disk, and the interpreter's own exit takes a while.
    os._exit(failed and not os.environ.get(AGENT))


@app.command()
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    remember: Annotated[
        bool, typer.Option("--remember", help="Add the question and the answer to the stream.")
    ] = False,
    now: Annotated[bool, typer.Option("--now", help="Answer before reading new text.")] = False,
    name: Name = "main",
) -> None:
    """Ask the running assistant. It answers from what it attends to."""
    what = {"what": "ask", "question": question, "remember": remember, "now": now}
    shown, begun, since, tell = TerminalEscaper(), False, None, Progress()
    try:
        for line in request(assistant_paths(name).socket, name, **what):
            since = line.get("since")
            if waiting := line.get("waiting"):
                tell(waiting, line.get("seconds"))
            if text := line.get("text"):
                sys.stdout.write(shown.add(text))
                sys.stdout.flush()
                begun = True
    finally:
        if begun:  # an error or Ctrl-C gets its own line
            print(shown.flush(), flush=True)
    if since:
        notify(f"answered from text read since {clock(since)}; older text has left the window")


@app.command()
def note(name: Name = "main") -> None:
    """Write a note now, if anything is new, and print it."""
    (line,) = request(assistant_paths(name).socket, name, what="note")
    if line["note"] is None:
        notify("there is nothing new since the last note")
    else:
        print(escape(line["note"]).strip())


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    name: Name = "main",
) -> None:
    """Show attended tokens, memory and each source's position."""
    (line,) = request(assistant_paths(name).socket, name, what="status")
    del line["done"]
    print(json.dumps(line) if as_json else "\n".join(table(line)))


@app.command()
def stop(name: Name = "main") -> None:
    """Stop the running assistant. Its journal is kept."""
    (line,) = request(assistant_paths(name).socket, name, what="stop")
    notify(f"{name} is stopping (process {line['pid']})")


@app.command()
@takes_settings("stdin")
def install(settings: Settings) -> None:
    """Start the assistant at each login, with launchd or systemd."""
    from mlx_stream_assistant.service import login_service

    settings.check()
    path, trouble = login_service(settings, assistant_paths(settings.name).log).install()
    if trouble:
        fail(f"installed at {path}, but it could not be started: {trouble}")
    notify(f"installed at {path}")


@app.command()
def uninstall(name: Name = "main") -> None:
    """Stop the assistant, and no longer start it at login. Its journal is kept."""
    from mlx_stream.program.login_service import uninstall_service
    from mlx_stream_assistant.service import service_name

    where = assistant_paths(name)
    path = uninstall_service(service_name(name))
    if path is None:
        fail(f"the assistant {name!r} is not installed")
    notify(f"removed {path}; the journal is kept: {where.journal}")


class Progress:
    """Reports how much must be read before an answer: immediately, then every ten seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, waiting: int, seconds: int | None) -> None:
        if time.monotonic() >= self._next:
            first, self._next = not self._next, time.monotonic() + 10
            about = "" if seconds is None else f", about {duration(seconds)}"
            skip = "; --now skips this" if first else ""
            notify(f"reading {waiting:,} new characters first{about}{skip}")


def clock(time: str) -> str:
    return escape(time)[:16].replace("T", " ")


def duration(seconds: float) -> str:
    """Return a duration in words.

    >>> duration(5), duration(600), duration(8000)
    ('5 seconds', '10 minutes', '2.2 hours')
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6_000 else f"{seconds / 3_600:.1f} hours"


def table(status: dict[str, Any]) -> list[str]:
    """Return the lines that `status` prints."""
    seconds = int(status["uptime_seconds"])
    days = f"{seconds // 86_400} d " if seconds >= 86_400 else ""
    up = f"{days}{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    rows = [
        ("state", f"{status['state']}, process {status['pid']}, up {up}"),
        ("model", status["model"]),
    ]
    if "attended" in status:
        since = f", since {clock(status['since'])}" if status["since"] else ""
        rows += [
            ("attended", f"{status['attended']:,} tokens, window {status['window']:,}{since}"),
            ("evicted", f"{status['evicted']:,} tokens"),
            ("backlog", backlog(status)),
        ]
    rows.append(("memory", f"{status['resident_bytes'] / 1e6:.1f} MB resident"))
    if status["notes"]:
        last = status["last_note"]
        when = f"last {datetime.fromtimestamp(last):%Y-%m-%d %H:%M}" if last else "none written yet"
        rows.append(("diary", f"{status['notes']}, {when}"))
    rows += [("reads", source_line(source)) for source in status["sources"]]
    return [f"{what:<9} {escape(text)}" for what, text in rows]


def backlog(status: dict[str, Any]) -> str:
    """Return how much is left to read, how long that will take, and whether it is growing."""
    waiting = status["backlog"] + status["bytes_unread"]
    text = f"{waiting:,} characters to read"
    if speed := status["characters_per_second"]:
        took = f" at {status['tokens_per_second']:,.0f} tokens a second"
        text += f", {duration(waiting / speed)}{took}" if waiting else f"; it reads{took}"
    return text + "; falling behind: text arrives faster than it is read" * status["falls_behind"]


def source_line(source: dict[str, Any]) -> str:
    if "notes" in source:
        shown = f"notes read: {source['notes']:,}, waiting: {source['waiting']:,}"
    else:
        shown = "ended" if source.get("ended") else "open"
        if "size" in source:
            shown = f"at byte {source['offset']:,} of {source['size']:,}"
        shown += f", {source.get('bytes_read', 0):,} bytes read"
    line = f"{source['name']}: {shown}"
    return f"{line}; {source['complaint']}" if source["complaint"] else line


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; `program` is its name in help."""
    with_help(get_command(app))(args=arguments, prog_name=program)
