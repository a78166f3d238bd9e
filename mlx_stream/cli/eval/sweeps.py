"""`mlx_stream eval sinks` and `eval windows`: the paper's tables 2 and 6."""

from typing import Annotated

from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.eval import common
from mlx_stream.cli.terminal import progress_bar
from mlx_stream.program.exits import fail, notify

COLUMNS = (
    ("sinks", "sinks", ","),
    ("window", "window", ","),
    ("perplexity", "perplexity", ",.2f"),
    ("tokens_per_second", "tok/s", ".1f"),
    ("cache_bytes", "cache MB", "MB"),
)


@options.verb
def sinks(
    *,
    model: options.ModelArgument,
    files: common.Files,
    sinks: Annotated[
        list[int] | None,
        Option(help="Number of initial tokens to never evict; repeatable. Default: 0, 1, 2, 4, 8."),
    ] = None,
    capacity: Annotated[int, Option(help="Tokens in the cache: sinks and window together.")] = 256,
    tokens: common.Tokens = 8_192,
    chunk: common.Chunk = 128,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Measure perplexity by number of sinks (table 2)."""
    counts = [0, 1, 2, 4, 8] if sinks is None else sinks
    if capacity <= max(counts):
        fail(f"--capacity must be above {max(counts)}, the number of sinks, not {capacity}")
    shapes = [(count, capacity - count) for count in counts]
    about = {"capacity": capacity}
    sweep("sinks", model, files, shapes, tokens, chunk, about, loading, output)


@options.verb
def windows(
    *,
    model: options.ModelArgument,
    files: common.Files,
    window: Annotated[
        list[int] | None,
        Option(
            help="Number of recent tokens to attend to; repeatable. "
            "Default: 252, 508, 1020, 2044, 4092."
        ),
    ] = None,
    sinks: common.Sinks = 4,
    tokens: common.Tokens = 12_288,
    chunk: common.Chunk = 128,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Measure perplexity by window size (table 6)."""
    chosen = [252, 508, 1_020, 2_044, 4_092] if window is None else window
    shapes = [(sinks, one) for one in chosen]
    about = {"sinks": sinks}
    sweep("windows", model, files, shapes, tokens, chunk, about, loading, output)


def sweep(
    name: str,
    model: str,
    files: list[str],
    shapes: list[tuple[int, int]],
    tokens: int,
    chunk: int,
    about: dict[str, int],
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    from mlx_stream.evaluate.report import Report, facts
    from mlx_stream.evaluate.sweeps import sweep as measure

    output.check()
    loaded = loading.load(model)
    shapes = [loaded.resolve_window(*shape, notify) for shape in shapes]
    text = common.read_texts(loaded, files)
    with progress_bar("reading") as progress:
        rows, cut = common.collecting_rows(measure(loaded, text, shapes, tokens, chunk, progress))
    found = facts(loaded, texts=text.names, **about, chunk=chunk)
    output.publish(Report(name, found, rows), COLUMNS, cut=cut)
