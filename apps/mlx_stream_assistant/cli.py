"""The commands: run, ask, note, status, stop, install, uninstall; holds no state."""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from mlx_stream.errors import MlxStreamError, one_line
from mlx_stream.program.escape import TerminalEscaper, escape
from mlx_stream_assistant.paths import assistant_paths
from mlx_stream_assistant.settings import Settings
from mlx_stream_assistant.socket_server import request

Params = ParamSpec("Params")
app = typer.Typer(
    name="assistant",
    help="A local assistant that reads along for days. Nothing leaves this machine.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Option("--name", help="Which assistant, if there are several.")]
Follow = Annotated[
    list[Path] | None,
    typer.Option(
        "--follow", metavar="FILE", help="Read a growing file; may be given several times."
    ),
]
FromEnd = Annotated[
    bool,
    typer.Option("--from-end", help="Of files not followed before, read what is added from now."),
]
Folder = Annotated[
    list[Path] | None,
    typer.Option(
        "--folder",
        metavar="FOLDER",
        help="Read the .txt and .md notes in it; may be given several times.",
    ),
]
Notes = Annotated[
    Path | None,
    typer.Option("--notes", metavar="FILE", help="Write dated notes to this Markdown file."),
]
Every = Annotated[float, typer.Option("--every", metavar="MINUTES", help="Between two notes.")]
Model = Annotated[
    str, typer.Option("--model", help="A folder, a Hub id, a .gguf file, or starter.")
]
Window = Annotated[
    int | None, typer.Option("--window", help="Latest tokens attended. Default: 2,048.")
]
System = Annotated[
    str | None,
    typer.Option("--system", help="What it is told to be, which never leaves attention."),
]
SnapshotEvery = Annotated[
    float,
    typer.Option(
        "--snapshot-every", metavar="MINUTES", help="Between two snapshots while text arrives."
    ),
]
PauseOnBattery = Annotated[
    bool, typer.Option("--pause-on-battery", help="Read and note nothing on battery power.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def notify(text: str) -> None:
    """Say something to the user that is not the result."""
    line = "".join(c if c.isprintable() else " " for c in text)
    with suppress(OSError, ValueError):  # a log on a full disk, or closed: reading goes on
        print(f"assistant: {line}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    notify(text)
    raise SystemExit(1)


def exits_cleanly(verb: Callable[Params, None]) -> Callable[Params, None]:
    """Turn errors that a user can cause into one line and exit status 1."""

    @functools.wraps(verb)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except MlxStreamError as error:
            fail(one_line(error))
        except BrokenPipeError:
            raise SystemExit(1) from None

    return run


def settings_of(
    follow: list[Path] | None, folder: list[Path] | None, notes: Path | None, **others: Any
) -> Settings:
    """Return settings with whole paths, each once, and defaults for what was not given."""
    given = {name: value for name, value in others.items() if value is not None}
    if is_folder(Path(given["model"])) or given["model"].endswith(".gguf"):
        given["model"] = str(absolute_path(Path(given["model"])))
    return Settings(
        follow=tuple(dict.fromkeys(map(absolute_path, follow or ()))),
        folders=tuple(dict.fromkeys(map(absolute_path, folder or ()))),
        notes=None if notes is None else absolute_path(notes),
        **given,
    )


def absolute_path(path: Path) -> Path:
    """Return a path that means the same wherever the assistant runs, however it is spelled."""
    try:
        return Path(os.path.normpath(path.expanduser().absolute()))
    except RuntimeError as error:
        fail(f"{path}: {error}")


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long, or in one that may not be entered
        return False


@app.command()
@exits_cleanly
def run(
    follow: Follow = None,
    folder: Folder = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Read standard input.")] = False,
    notes: Notes = None,
    every: Every = 60.0,
    model: Model = "starter",
    window: Window = None,
    name: Name = "main",
    system: System = None,
    snapshot_every: SnapshotEvery = 5.0,
    pause_on_battery: PauseOnBattery = False,
    from_end: FromEnd = False,
) -> None:
    """Read along until it is stopped: with Ctrl-C, SIGTERM or `stop`."""
    settings = settings_of(
        follow,
        folder,
        notes,
        stdin=stdin,
        every=every,
        model=model,
        window=window,
        name=name,
        system=system,
        snapshot_every=snapshot_every,
        pause_on_battery=pause_on_battery,
        from_end=from_end,
    )
    from mlx_stream_assistant.daemon import Assistant

    assistant = Assistant(settings, notify)
    try:
        assistant.run()
    except MlxStreamError as error:
        if assistant.has_ended:
            raise
        notify(one_line(error))
        leave(1)
    notify(f"{name} has stopped; what it has read is kept")
    leave(0)


def leave(status: int) -> NoReturn:
    """End this process at once: all is on disk, and the interpreter's own end takes a while."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


@app.command()
@exits_cleanly
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    remember: Annotated[
        bool,
        typer.Option("--remember", help="Have it read question and answer, as it reads the rest."),
    ] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Do not have it first read what waits to be read.")
    ] = False,
    name: Name = "main",
) -> None:
    """Ask the running assistant; it answers from what it attends to."""
    what = {"what": "ask", "question": question, "remember": remember, "now": now}
    shown, begun = TerminalEscaper(), False
    try:
        for line in request(assistant_paths(name).socket, name, **what):
            if waiting := line.get("waiting"):
                notify(f"it reads {waiting:,} characters first that have arrived; --now does not")
            if text := line.get("text"):
                sys.stdout.write(shown.add(text))
                sys.stdout.flush()
                begun = True
    finally:
        if begun:  # a line of its own for what ends it, Ctrl-C say
            print(shown.flush(), flush=True)


@app.command()
@exits_cleanly
def note(name: Name = "main") -> None:
    """Have it write a note now, if anything is new, and print it."""
    (line,) = request(assistant_paths(name).socket, name, what="note")
    if line["note"] is None:
        notify("nothing is new since the last note")
    else:
        print(escape(line["note"]).strip())


@app.command()
@exits_cleanly
def status(as_json: AsJson = False, name: Name = "main") -> None:
    """Show what is attended, memory, and how far each source is read."""
    (line,) = request(assistant_paths(name).socket, name, what="status")
    del line["done"]
    if as_json:
        print(json.dumps(line))
    else:
        print("\n".join(table(line)))


@app.command()
@exits_cleanly
def stop(name: Name = "main") -> None:
    """Stop the running assistant; nothing is lost."""
    (line,) = request(assistant_paths(name).socket, name, what="stop")
    notify(f"{name} is stopping (process {line['pid']})")


@app.command()
@exits_cleanly
def install(
    follow: Follow = None,
    folder: Folder = None,
    notes: Notes = None,
    every: Every = 60.0,
    model: Model = "starter",
    window: Window = None,
    name: Name = "main",
    system: System = None,
    snapshot_every: SnapshotEvery = 5.0,
    pause_on_battery: PauseOnBattery = False,
    from_end: FromEnd = False,
) -> None:
    """Have launchd or systemd run it from each login on."""
    from mlx_stream_assistant import service

    settings = settings_of(
        follow,
        folder,
        notes,
        every=every,
        model=model,
        window=window,
        name=name,
        system=system,
        snapshot_every=snapshot_every,
        pause_on_battery=pause_on_battery,
        from_end=from_end,
    )
    settings.check()
    where = assistant_paths(name)
    path, trouble = service.install(service.service_for(settings, where.log))
    if trouble:
        fail(f"installed as {path}, but it could not be started: {trouble}")
    notify(f"installed as {path}")


@app.command()
@exits_cleanly
def uninstall(name: Name = "main") -> None:
    """Stop it and have the system forget it; what it has read stays."""
    from mlx_stream_assistant import service

    where = assistant_paths(name)
    path = service.uninstall(name)
    if path is None:
        fail(f"the assistant {name!r} is not installed")
    notify(f"{path} is removed; what it has read stays in {where.journal}")


def table(status: dict[str, Any]) -> list[str]:
    """Return what `status` shows, a line for each thing."""
    rows = [
        ("state", f"{status['state']}, process {status['pid']}, {duration(status)}"),
        ("model", status["model"]),
    ]
    if "attended" in status:
        rows += [
            ("attended", f"{status['attended']:,} tokens, window {status['window']:,}"),
            ("evicted", f"{status['evicted']:,} tokens"),
            (
                "backlog",
                f"{status['backlog']:,} characters it is reading, "
                f"{status['chunks_waiting']:,} pieces of text behind them",
            ),
        ]
    rows.append(("memory", f"{status['resident_bytes'] / 1e6:.1f} MB resident"))
    if status["notes"]:
        last = status["last_note"]
        when = f"last {datetime.fromtimestamp(last):%Y-%m-%d %H:%M}" if last else "none written yet"
        rows.append(("diary", f"{status['notes']}, {when}"))
    rows += [("reads", source_line(source)) for source in status["sources"]]
    return [f"{what:<9} {escape(text)}" for what, text in rows]


def source_line(source: dict[str, Any]) -> str:
    if "notes" in source:
        parts = [f"notes read: {source['notes']:,}, waiting: {source['waiting']:,}"]
    elif "size" in source:
        parts = [f"at byte {source['offset']:,} of {source['size']:,}"]
    else:
        parts = ["ended" if source["ended"] else "open"]
    if "notes" not in source:
        parts.append(f"{source.get('bytes_read', 0):,} bytes read")
    line = f"{source['name']}: {', '.join(parts)}"
    return f"{line}; {source['complaint']}" if source["complaint"] else line


def duration(status: dict[str, Any]) -> str:
    """Return how long it has run: "up 2 d 03:04:05"."""
    seconds = int(status["uptime_seconds"])
    days, seconds = divmod(seconds, 86_400)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"up {days} d {clock}" if days else f"up {clock}"


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line.

    Args:
        program: what help calls it.
    """
    try:
        app(args=arguments, prog_name=program)
    except KeyboardInterrupt:
        notify("interrupted")
        raise SystemExit(130) from None
