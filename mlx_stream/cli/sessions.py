"""`mlx_stream sessions`: lists and manages saved conversations."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument

from mlx_stream.chat.exchange import plural
from mlx_stream.cli import new_group, options
from mlx_stream.cli.report import local_time, print_json, print_table, print_text
from mlx_stream.cli.terminal import confirm
from mlx_stream.program.escape import escape
from mlx_stream.program.exits import fail, notify

app = new_group("sessions")

Name = Annotated[str, Argument(metavar="NAME", help="The name of a saved conversation.")]


@app.command("list")
@options.verb
def list_sessions(*, as_json: options.AsJson = False) -> None:
    """List the saved conversations, most recently used first."""
    from mlx_stream.chat.summaries import session_summaries

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
                local_time(one.used),
                escape(one.header.model) if one.header else "cannot be opened: run verify",
            ]
            for one in found
        ]
        print_table(["name", "exchanges", "attended", "on disk", "last used", "model"], rows)
    else:
        notify("there are no saved conversations: mlx_stream chat --session NAME starts one")


@app.command()
@options.verb
def show(*, name: Name) -> None:
    """Print a conversation as Markdown. A damaged one is printed up to the damage."""
    from mlx_stream.chat.export import export_markdown
    from mlx_stream.chat.manage import open_transcript

    with open_transcript(name) as store:
        turns, damage = store.whole()
        text = export_markdown(store.state.header, turns)
    sys.stdout.write(escape(text) if sys.stdout.isatty() else text)
    if damage:
        fail(f"only {plural(len(turns))} shown; {damage}")


@app.command()
@options.verb
def export(
    *,
    name: Name,
    file: Annotated[Path, Argument(metavar="FILE", help="A new .md or .json file.")],
) -> None:
    """Write a conversation to a Markdown or JSON file."""
    from mlx_stream.chat.export import write_export
    from mlx_stream.chat.manage import open_transcript

    with open_transcript(name) as store:
        turns, damage = store.whole()
        write_export(file, store.state.header, turns)
    done = f"{plural(len(turns))} written to {file}"
    if damage:
        fail(f"only {done}; {damage}")
    notify(done)


@app.command()
@options.verb
def rm(*, name: Name, yes: options.Yes = False) -> None:
    """Permanently remove a conversation: both its text and its state."""
    from mlx_stream.chat.manage import existing_paths, questions_of, remove_session
    from mlx_stream.cli.recall import forget_typed

    existing_paths(name)
    questions = questions_of(name)
    if not yes and sys.stdin.isatty() and not confirm(f"remove {name}, {plural(len(questions))}"):
        notify("nothing was removed")
        return
    remove_session(name)
    forget_typed(questions)
    notify(f"removed {name}")


@app.command()
@options.verb
def search(
    *,
    words: Annotated[list[str], Argument(metavar="WORDS", help="Words to look for.")],
    as_json: options.AsJson = False,
) -> None:
    """Find exchanges in all saved conversations, best matches first."""
    from mlx_stream.chat.search import search_sessions
    from mlx_stream.errors import one_line

    found = []
    for name, passages in search_sessions(" ".join(words), lambda e: notify(one_line(e))):
        found += [(passage, name) for passage in passages]
    found.sort(key=lambda one: (-round(one[0].share, 2), one[0].time), reverse=False)
    if as_json:
        rows = [
            {
                "name": name,
                "number": passage.number,
                "time": passage.time,
                "question": passage.question,
                "reply": passage.reply,
                "words": list(passage.words),
                "share": passage.share,
            }
            for passage, name in found
        ]
        print_json({"exchanges": rows})
    for passage, name in found if not as_json else ():
        print_text(escape(f"{name} {passage.number:,} {passage.line}"), indent=2)
    if not (found or as_json):
        notify("no saved exchange contains any of these words")


@app.command()
@options.verb
def verify(
    *,
    name: Annotated[
        str | None, Argument(metavar="NAME", help="The name of a saved conversation. Default: all.")
    ] = None,
) -> None:
    """Read saved conversations and compare them with their checksums."""
    from mlx_stream.chat import manage, session_files
    from mlx_stream.errors import SessionError, one_line

    damaged = 0
    for one in [name] if name is not None else session_files.session_names():
        try:
            print_text(f"{one}: {manage.verify_session(one)}", indent=2)
        except SessionError as error:
            if not session_files.session_paths(one).database.exists():
                raise
            damaged += 1
            notify(one_line(error))
    if damaged:
        fail(
            "`sessions show` and `export` give the part before the damage; `sessions rm` removes "
            "a conversation"
        )
