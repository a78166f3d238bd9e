"""`mlx_stream eval streameval`: questions about lines further and further back."""

from pathlib import Path
from typing import Annotated

from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.eval import common
from mlx_stream.cli.terminal import progress_bar
from mlx_stream.program.exits import notify

COLUMNS = (
    ("lines_back", "lines back", ","),
    ("tokens_back", "tokens back", ",.0f"),
    ("inside", "in window", ""),
    ("queries", "queries", ","),
    ("likelihood", "by likelihood", ".1%"),
    ("generation", "by generation", ".1%"),
)


@options.verb
def streameval(
    *,
    model: options.DefaultModelArgument = None,
    window: common.Window = 1_020,
    sinks: common.Sinks = 4,
    lines: Annotated[int, Option(help="Number of lines to read.")] = 600,
    distances: Annotated[
        list[int] | None,
        Option(
            help="How many lines back to ask about; 1 is the last line read. Repeatable. "
            "Default: 1, 5, 10, 20, 40, 80, 160."
        ),
    ] = None,
    seed: Annotated[int, Option(help="Random seed for the facts in the lines.")] = 1,
    recall: Annotated[
        bool,
        Option("--recall", help="Before a query, read its line again if it has left the window."),
    ] = False,
    data_out: Annotated[
        Path | None, Option(help="JSON-lines file to write the lines and queries to.")
    ] = None,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Ask a stream about lines further and further back.

    The stream reads numbered lines, with a question after every 10. An answer counts as right by
    likelihood if it is likelier than nine others (chance: 10%), and by generation if the model
    writes it. The default window holds about 46 lines of 22 tokens.
    """
    from mlx_stream.evaluate.streameval import streameval as ask
    from mlx_stream.evaluate.streameval_data import DISTANCES, make_data, write_data

    output.check()
    chosen = distances or DISTANCES
    data = make_data(seed, lines, chosen)
    loaded = loading.load(model)
    sinks, window = loaded.resolve_window(sinks, window, notify)
    if data_out is not None:
        write_data(data, data_out)
        notify(f"wrote {data_out}")
    with progress_bar("reading lines") as progress:
        report = ask(loaded, sinks, window, seed, lines, chosen, progress, recall)
    output.publish(report, COLUMNS)
