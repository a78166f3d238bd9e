"""`mlx_stream eval ...`: the paper's experiments, each with a table, JSON, CSV and a chart."""

import typer

from mlx_stream.cli.eval.endurance import endurance
from mlx_stream.cli.eval.latency import latency
from mlx_stream.cli.eval.perplexity import perplexity
from mlx_stream.cli.eval.plot import plot
from mlx_stream.cli.eval.streameval import streameval
from mlx_stream.cli.eval.sweeps import sinks, windows

app = typer.Typer(
    name="eval",
    help="The paper's experiments on your model, text and machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
for experiment in (perplexity, sinks, windows, latency, endurance, streameval, plot):
    app.command()(experiment)
