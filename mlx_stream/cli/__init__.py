"""The command line: one short file per verb; holds no arithmetic."""

from importlib.metadata import version
from typing import Annotated

import typer

from mlx_stream.cli.bench import bench
from mlx_stream.cli.chat import chat
from mlx_stream.cli.convert import convert
from mlx_stream.cli.devices import devices
from mlx_stream.cli.doctor import doctor
from mlx_stream.cli.eval import app as evaluate
from mlx_stream.cli.generate import generate
from mlx_stream.cli.ls import ls
from mlx_stream.cli.plan import plan
from mlx_stream.cli.pull import pull
from mlx_stream.cli.score import score
from mlx_stream.cli.sessions import app as sessions
from mlx_stream.cli.terminal import note

app = typer.Typer(
    name="mlx_stream",
    help="Large language models on a stream without end, in memory that never grows.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help wraps whole sentences and cuts no option's name
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (chat, generate, score, plan, devices, convert, bench, doctor, pull, ls):
    app.command()(verb)
app.add_typer(evaluate)
app.add_typer(sessions)


def print_version(asked: bool) -> None:
    if asked:
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
        note("interrupted")
        raise SystemExit(130) from None
