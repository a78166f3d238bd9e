"""The command line: one short file per verb; holds no arithmetic.

A verb's file is imported only when that verb is used, so no verb waits for the others' options.
Programs that are installed with the package are verbs, too; they are found through entry points.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mlx_stream.program.exits import fail, notify
from mlx_stream.program.help import HelpContext, with_help

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Each verb is a function of the same name, or a group of functions named `app`, in the file of that
# name. The value is the verb's line in `--help`: the first sentence of its own help.
VERBS = {
    "chat": "Chat with a model for as long as you like.",
    "generate": "Continue a text of any length, without a chat template.",
    "serve": "Serve a model to clients of OpenAI's API.",
    "score": "Print the perplexity of a text, read without a chat template.",
    "plan": "Show what a model needs on a device, from its config and headers alone.",
    "devices": "List the devices you can plan for, including your own.",
    "convert": "Write a model to the folder OUT, quantized or unchanged.",
    "bench": "Time decoding and prefill side by side with mlx-lm.",
    "doctor": "Describe this machine and what will be slow on it.",
    "pull": "Fetch a model into the shared Hugging Face cache: weights and tokenizer, never code.",
    "models": "List models worth pulling that fit a device, with the largest window that fits.",
    "ls": "List the models on this machine: cached, or written by convert.",
    "show": "Describe a model on this machine, without loading it.",
    "rm": "Remove a model from this machine.",
    "eval": "Run the paper's experiments on your model, text and machine.",
    "config": "Show or change the config file: defaults for new conversations.",
    "sessions": "List, show, export, remove, search or verify saved conversations.",
}
# The same for the known programs that may be installed with the package.
PROGRAMS = {
    "assistant": "Follow files, notes and pipes for days, and answer questions.",
    "desktop": "Chat in a desktop window.",
}
ENTRY_POINTS = "mlx_stream.programs"
SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # plain help wraps sentences and does not cut option names
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class Verbs(TyperGroup):
    """The group of all verbs, each imported only when it is needed."""

    context_class = HelpContext

    def list_commands(self, ctx: Any) -> list[str]:
        return [*VERBS, *installed_programs()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in VERBS:
            return command(cmd_name)
        program = installed_programs().get(cmd_name)
        return program and program_command(program)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        programs = {name: PROGRAMS.get(name, "A program.") for name in installed_programs()}
        with formatter.section("Commands"):
            formatter.write_dl(list((VERBS | programs).items()))


def new_group(name: str) -> typer.Typer:
    """Return an empty group for a verb with subcommands."""
    return typer.Typer(name=name, help=VERBS[name], no_args_is_help=True, **SETTINGS)


def command(name: str) -> Any:
    """Import one verb and build its options."""
    module = import_module(f"mlx_stream.cli.{name}")
    group: typer.Typer | None = getattr(module, "app", None)
    if group is None:
        group = typer.Typer(**SETTINGS)
        group.command(name)(getattr(module, name))
    return with_help(get_command(group))


def installed_programs() -> "dict[str, EntryPoint]":
    """Return the programs that are installed with the package, keyed by verb name."""
    from importlib.metadata import entry_points

    found = sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name)
    return {entry.name: entry for entry in found if entry.name not in VERBS}


def program_command(program: "EntryPoint") -> Any:
    """Build a verb that passes all its arguments on to a program."""
    from importlib.metadata import metadata

    def run_program(context: typer.Context) -> None:
        try:
            main = program.load()
        except ModuleNotFoundError as error:
            extra = program.name in (metadata("mlx_stream").get_all("Provides-Extra") or [])
            how = f": pip install 'mlx_stream[{program.name}]'" if extra else ""
            fail(f"{program.name} needs {error.name}, which is not installed{how}")
        main(context.args, f"mlx_stream {program.name}")

    group = typer.Typer(**SETTINGS)
    everything = {
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
    options = group.command(program.name, context_settings=everything, add_help_option=False)
    options(run_program)
    return get_command(group)


app = typer.Typer(
    name="mlx_stream",
    cls=Verbs,
    help="Run large language models on an endless stream, in constant memory.",
    no_args_is_help=True,
    **{**SETTINGS, "add_completion": True},
)


def print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"mlx_stream {version('mlx_stream')}")
        raise typer.Exit


@app.callback()
def options_before_a_verb(
    asked: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KeyboardInterrupt:  # Ctrl-C before the verb started
        notify("interrupted")
        raise SystemExit(130) from None
