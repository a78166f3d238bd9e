"""What all experiments share: options, loading, and the three ways a result is shown."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_stream.cli.terminal import read_text
from mlx_stream.errors import MlxStreamError
from mlx_stream.program.exits import fail, notify

if TYPE_CHECKING:
    from mlx_stream.evaluate.corpus import Corpus
    from mlx_stream.evaluate.report import Report, Row
    from mlx_stream.load import Model

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, a .gguf file, or starter.")
]
Files = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="Text files, read one after another; - is stdin."),
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="TYPE", help="Compute in float32, float16 or bfloat16.")
]
Window = Annotated[int, typer.Option("--window", help="Latest tokens attended.")]
Sinks = Annotated[int, typer.Option("--sinks", help="First tokens kept.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of the text to read.")]
Segment = Annotated[int, typer.Option("--segment", help="Tokens of a segment.")]
Chunk = Annotated[int, typer.Option("--chunk", help="Tokens read per step.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Draw a .png or .svg, and its dark twin FILE-dark."
    ),
]


def check_output(
    json: bool,
    csv: bool,
    plot: Path | None,
    read: "Sequence[str | Path]" = (),
    written: "Sequence[Path | None]" = (),
) -> None:
    """Refuse before anything is measured what could not be shown afterwards.

    Args:
        read: files that are read, and must not be written over.
        written: files that are written besides the plot.
    """
    if json and csv:
        fail("--json and --csv both want standard output: choose one")
    if plot is not None:
        from mlx_stream.evaluate.charts import check_plot, dark_twin

        check_plot(plot)
        written = [*written, plot, dark_twin(plot)]
    refuse_same_files(read, [path for path in written if path is not None])


def refuse_same_files(read: "Sequence[str | Path]", written: "Sequence[Path]") -> None:
    """Refuse to write one file twice, or over one that is read."""
    taken = {os.path.realpath(path): "it is read" for path in read if path != "-"}
    for path in written:
        place = os.path.realpath(path)
        if place in taken:
            fail(f"{path}: cannot be written to, {taken[place]} as well: choose another file")
        taken[place] = "something else is written there"


def read_texts(model: "Model", files: Sequence[str]) -> "Corpus":
    from mlx_stream.evaluate.corpus import encode

    return encode(model.tokenizer, [(Path(path).name, read_text(path)) for path in files])


def collecting_rows(rows: "Iterator[Row]") -> "tuple[list[Row], BaseException | None]":
    """Return rows, and what ended them early: those that are there are shown, then it is raised.

    Raises:
        KeyboardInterrupt, MlxStreamError: it ended before there was any.
    """
    found: list[Row] = []
    try:
        for row in rows:
            found.append(row)
    except (KeyboardInterrupt, MlxStreamError) as error:
        if not found:
            raise
        return found, error
    return found, None


def publish(
    report: "Report",
    columns: Sequence[tuple[str, str, str]],
    json: bool,
    csv: bool,
    plot: Path | None,
    table: "Sequence[Row] | None" = None,
    cut: BaseException | None = None,
) -> None:
    """Print a report as a table, JSON or CSV, and draw it.

    Args:
        columns: of the table: key of the rows, heading, format of a number.
        table: its rows, where there are too many in the report for people.
        cut: what ended it early, as of `collected`: noted, and raised once the report is shown.
    """
    from mlx_stream.cli.report import print_json, print_table

    if cut:
        report.notes.append("interrupted: the figures until then")

    if json:
        print_json(report.as_json())
    elif csv:
        sys.stdout.write(report.as_csv())
    else:
        shown = [
            [cell(row.get(key), form) for key, _, form in columns]
            for row in (report.rows if table is None else table)
        ]
        print_table([heading for _, heading, _ in columns], shown)
        for line in report.notes:
            print(line)
    if plot is not None:
        from mlx_stream.evaluate.charts import draw_chart

        for path in draw_chart(report, plot):
            notify(f"drew {path}")
    if cut:
        raise cut


def cell(value: Any, form: str) -> str:
    """Format one figure; `MB` shows bytes as megabytes."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if form == "MB":
        return f"{value / 1e6:,.1f}"
    return format(value, form)
