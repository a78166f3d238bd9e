"""`mlx_stream eval sinks` and `eval windows`: the paper's tables 2 and 6."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.eval import common
from mlx_stream.cli.terminal import progress_bar
from mlx_stream.program.exits import exits_cleanly

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
@options.grouped
def sinks(
    *,
    model: options.ModelArgument,
    files: options.Files,
    sinks: Annotated[
        list[int] | None,
        typer.Option("--sinks", help="May be given several times. Default: 0, 1, 2, 4, 8."),
    ] = None,
    capacity: Annotated[
        int, typer.Option("--capacity", help="Sinks + window, the same for all.")
    ] = 256,
    tokens: options.Tokens = 8_192,
    chunk: options.Chunk = 128,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Perplexity with 0 to 8 sinks, one size: the paper's table 2."""
    from mlx_stream.evaluate.report import Report, facts
    from mlx_stream.evaluate.sweeps import sink_shapes

    output.check(files)
    loaded = loading.load(model)
    shapes = sink_shapes(loaded, capacity, [0, 1, 2, 4, 8] if sinks is None else sinks)
    text = common.read_texts(loaded, files)
    rows, cut = read_through(loaded, text, shapes, tokens, chunk)
    about = facts(loaded, texts=text.names, capacity=capacity, chunk=chunk)
    output.publish(Report("sinks", about, rows), COLUMNS, cut=cut)


@exits_cleanly
@options.grouped
def windows(
    *,
    model: options.ModelArgument,
    files: options.Files,
    window: Annotated[
        list[int] | None,
        typer.Option(
            "--window", help="May be given several times. Default: 252, 508, 1020, 2044, 4092."
        ),
    ] = None,
    sinks: options.SinkCount = 4,
    tokens: options.Tokens = 12_288,
    chunk: options.Chunk = 128,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Perplexity with windows of 252 to 4,092: its table 6."""
    from mlx_stream.evaluate.report import Report, facts
    from mlx_stream.evaluate.sweeps import window_shapes

    output.check(files)
    loaded = loading.load(model)
    chosen = [252, 508, 1_020, 2_044, 4_092] if window is None else window
    shapes = window_shapes(loaded, sinks, chosen)
    text = common.read_texts(loaded, files)
    rows, cut = read_through(loaded, text, shapes, tokens, chunk)
    about = facts(loaded, texts=text.names, sinks=sinks, chunk=chunk)
    output.publish(Report("windows", about, rows), COLUMNS, cut=cut)


def read_through(
    model: "Model", text: "Corpus", shapes: "Sequence[Shape]", tokens: int, chunk: int
) -> "tuple[list[Row], BaseException | None]":
    from mlx_stream.evaluate.sweeps import sweep

    with progress_bar("reading") as progress:
        return common.collecting_rows(sweep(model, text, shapes, tokens, chunk, progress))
