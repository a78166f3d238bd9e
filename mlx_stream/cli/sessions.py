"""`mlx_stream sessions`: what is saved, and what to do with it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_stream.chat.exchange import plural
from mlx_stream.cli import options
from mlx_stream.cli.report import print_json, print_table
from mlx_stream.program.escape import escape
from mlx_stream.program.exits import exits_cleanly, notify

app = typer.Typer(
    name="sessions",
    help="Saved conversations: list, show, export, remove, verify.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the saved conversation.")]


@app.command("list")
@exits_cleanly
def list_sessions(as_json: options.AsJson = False) -> None:
    """List the saved conversations, the one used last first."""
    from mlx_stream.chat.manage import session_summaries

    found = session_summaries()
    if as_json:
        rows = [
            {
                "name": one.name,
                "exchanges": one.exchanges,
                "attended_exchanges": one.attended,
                "bytes": one.bytes,
                "used": one.used,
                "model": one.header.model if one.header else None,
                "window": one.header.window if one.header else None,
                "damage": one.damage or None,
            }
            for one in found
        ]
        print_json({"sessions": rows})
    elif found:
        rows = [
            [
                one.name,
                f"{one.exchanges:,}",
                f"{one.attended:,}",
                f"{one.bytes / 1e6:.1f} MB",
                one.used,
                escape(one.header.model) if one.header else "cannot be opened: see verify",
            ]
            for one in found
        ]
        print_table(["name", "exchanges", "attended", "on disk", "last used", "model"], rows)
    else:
        notify("no conversation is saved: begin one with mlx_stream chat --session NAME")


@app.command()
@exits_cleanly
def show(name: Name) -> None:
    """Print a conversation as Markdown; of a damaged one, what comes before the damage."""
    from mlx_stream.chat.export import export_markdown
    from mlx_stream.chat.manage import open_transcript
    from mlx_stream.program.exits import fail

    with open_transcript(name) as store:
        turns, damage = store.whole()
        text = export_markdown(store.state.header, turns)
    sys.stdout.write(escape(text) if sys.stdout.isatty() else text)
    if damage:
        fail(f"{plural(len(turns))} shown, not all; {damage}")


@app.command()
@exits_cleanly
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new .md or .json file.")],
) -> None:
    """Write a conversation to a Markdown or JSON file."""
    from mlx_stream.chat.export import write_export
    from mlx_stream.chat.manage import open_transcript
    from mlx_stream.program.exits import fail

    with open_transcript(name) as store:
        turns, damage = store.whole()
        write_export(file, store.state.header, turns)
    if damage:
        fail(f"{plural(len(turns))} written to {file}, not all; {damage}")
    notify(f"{plural(len(turns))} written to {file}")


@app.command()
@exits_cleanly
def rm(name: Name) -> None:
    """Remove a conversation for good, text and state."""
    from mlx_stream.chat.manage import remove_session

    remove_session(name)
    notify(f"{name} is removed")


@app.command()
@exits_cleanly
def verify(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Default: all of them.")
    ] = None,
) -> None:
    """Read everything that is saved and compare it with its checksums."""
    from mlx_stream.chat import manage, session_files
    from mlx_stream.errors import SessionError, one_line
    from mlx_stream.program.exits import fail

    damaged = 0
    for one in [name] if name is not None else session_files.session_names():
        try:
            print(f"{one}: {manage.verify_session(one)}")
        except SessionError as error:
            if not session_files.session_paths(one).database.exists():
                raise
            damaged += 1
            notify(one_line(error))
    if damaged:
        fail("sessions show and export give what comes before a damage, sessions rm removes all")
