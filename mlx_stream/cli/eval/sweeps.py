"""`mlx_stream eval sinks` and `eval windows`: the paper's tables 2 and 6."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.eval import common
from mlx_stream.cli.terminal import progress_bar
from mlx_stream.program.exits import exits_cleanly, notify

if TYPE_CHECKING:
    from mlx_stream.evaluate.corpus import Corpus
    from mlx_stream.evaluate.report import Row
    from mlx_stream.evaluate.sweeps import Shape
    from mlx_stream.load import Model

COLUMNS = (
    ("sinks", "sinks", ","),
    ("window", "window", ","),
    ("perplexity", "perplexity", ",.2f"),
    ("tokens_per_second", "tok/s", ".1f"),
    ("cache_bytes", "cache MB", "MB"),
)


@exits_cleanly
def sinks(
    model: common.ModelName,
    files: common.Files,
    sinks: Annotated[
        list[int] | None,
        typer.Option("--sinks", help="May be given several times. Default: 0, 1, 2, 4, 8."),
    ] = None,
    capacity: Annotated[
        int, typer.Option("--capacity", help="Sinks + window, the same for all.")
    ] = 256,
    tokens: common.Tokens = 8_192,
    chunk: common.Chunk = 128,
    dtype: common.Dtype = "float32",
    keep_quantized: options.KeepQuantized = False,
    force: options.Force = False,
    json: options.AsJson = False,
    csv: common.AsCsv = False,
    plot: common.Plot = None,
) -> None:
    """Perplexity with 0 to 8 sinks, one size: the paper's table 2."""
    from mlx_stream.evaluate.report import Report, facts
    from mlx_stream.evaluate.sweeps import sink_shapes
    from mlx_stream.load import load

    common.check_output(json, csv, plot, files)
    loaded = load(model, dtype, keep_quantized, force, notify)
    shapes = sink_shapes(loaded, capacity, [0, 1, 2, 4, 8] if sinks is None else sinks)
    text = common.read_texts(loaded, files)
    rows, cut = read_through(loaded, text, shapes, tokens, chunk)
    about = facts(loaded, texts=text.names, capacity=capacity, chunk=chunk)
    common.publish(Report("sinks", about, rows), COLUMNS, json, csv, plot, cut=cut)


@exits_cleanly
def windows(
    model: common.ModelName,
    files: common.Files,
    window: Annotated[
        list[int] | None,
        typer.Option(
            "--window", help="May be given several times. Default: 252, 508, 1020, 2044, 4092."
        ),
    ] = None,
    sinks: common.Sinks = 4,
    tokens: common.Tokens = 12_288,
    chunk: common.Chunk = 128,
    dtype: common.Dtype = "float32",
    keep_quantized: options.KeepQuantized = False,
    force: options.Force = False,
    json: options.AsJson = False,
    csv: common.AsCsv = False,
    plot: common.Plot = None,
) -> None:
    """Perplexity with windows of 252 to 4,092: its table 6."""
    from mlx_stream.evaluate.report import Report, facts
    from mlx_stream.evaluate.sweeps import window_shapes
    from mlx_stream.load import load

    common.check_output(json, csv, plot, files)
    loaded = load(model, dtype, keep_quantized, force, notify)
    chosen = [252, 508, 1_020, 2_044, 4_092] if window is None else window
    shapes = window_shapes(loaded, sinks, chosen)
    text = common.read_texts(loaded, files)
    rows, cut = read_through(loaded, text, shapes, tokens, chunk)
    about = facts(loaded, texts=text.names, sinks=sinks, chunk=chunk)
    common.publish(Report("windows", about, rows), COLUMNS, json, csv, plot, cut=cut)


def read_through(
    model: "Model", text: "Corpus", shapes: "Sequence[Shape]", tokens: int, chunk: int
) -> "tuple[list[Row], BaseException | None]":
    from mlx_stream.evaluate.sweeps import sweep

    with progress_bar("reading") as progress:
        return common.collecting_rows(sweep(model, text, shapes, tokens, chunk, progress))
