"""The command line: one short file per verb; holds no arithmetic.

A verb's file is imported when the verb is asked for, so that none waits for the others' options.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mlx_stream.program.exits import notify

# Each is a function of its name, or a group of them named `app`, in the file of its name; beside
# it what help says: the first sentence of its own.
VERBS = {
    "chat": "Talk with a model for as long as you like.",
    "generate": "Continue a text of any length, as it is: no chat template.",
    "score": "Print the perplexity of a text, read as is: no chat template.",
    "plan": "Say what a model will need, from its config and headers alone.",
    "devices": "List the devices that plans can be made for, and your own.",
    "convert": "Write a model to the folder OUT: quantized, or as it is.",
    "bench": "Time decoding and prefill side by side with mlx-lm.",
    "doctor": "Say what this machine is and what will be slow on it.",
    "pull": "Fetch a model into the shared Hugging Face cache: weights and words, never code.",
    "ls": "List the cached models.",
    "eval": "The paper's experiments on your model, text and machine.",
    "sessions": "Saved conversations: list, show, export, remove, verify.",
}
SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # plain help wraps whole sentences and cuts no option's name
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class Verbs(TyperGroup):
    """Know every verb's name and sentence, and import it when it is to be run."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(VERBS)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in VERBS and self.commands[cmd_name] is None:
            self.commands[cmd_name] = command(cmd_name)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def command(name: str) -> Any:
    """Import one verb and build its options."""
    module = import_module(f"mlx_stream.cli.{name}")
    group: typer.Typer | None = getattr(module, "app", None)
    if group is None:
        verb: Callable[..., None] = getattr(module, name)
        group = typer.Typer(**SETTINGS)
        group.command(name)(verb)
    return get_command(group)


app = typer.Typer(
    name="mlx_stream",
    cls=Verbs,
    help="Large language models on a stream without end, in memory that never grows.",
    no_args_is_help=True,
    **SETTINGS,
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
    except KeyboardInterrupt:  # before the verb began
        notify("interrupted")
        raise SystemExit(130) from None
