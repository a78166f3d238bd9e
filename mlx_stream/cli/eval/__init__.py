"""`mlx_stream eval ...`: the paper's experiments, each with a table, JSON, CSV and a chart."""

from mlx_stream.cli import new_group
from mlx_stream.cli.eval.endurance import endurance
from mlx_stream.cli.eval.latency import latency
from mlx_stream.cli.eval.perplexity import perplexity
from mlx_stream.cli.eval.plot import plot
from mlx_stream.cli.eval.streameval import streameval
from mlx_stream.cli.eval.sweeps import sinks, windows

app = new_group("eval")
for experiment in (perplexity, sinks, windows, latency, endurance, streameval, plot):
    app.command()(experiment)
