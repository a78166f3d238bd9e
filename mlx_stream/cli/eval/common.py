"""Shared by all experiments: options, texts, and ways of showing a result."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mlx_stream.cli import options
from mlx_stream.cli.report import Columns, print_json, print_rows, print_text
from mlx_stream.cli.terminal import read_text
from mlx_stream.errors import MlxStreamError
from mlx_stream.program.exits import fail, notify

if TYPE_CHECKING:
    from mlx_stream.evaluate.corpus import Corpus
    from mlx_stream.evaluate.report import Report, Row
    from mlx_stream.generate.model import Model

Files = Annotated[
    list[str], Argument(metavar="FILE...", help="Text files, read one after another; - is stdin.")
]
Tokens = Annotated[int, Option(help="Number of tokens to read.")]
Segment = Annotated[int, Option(help="Tokens per segment.")]
Chunk = Annotated[int, Option(help="Tokens read per step.")]
Window = Annotated[int, Option(help="Number of recent tokens to attend to.")]
Sinks = Annotated[int, Option(help="Number of initial tokens to never evict.")]


@dataclass(frozen=True)
class OutputOptions:
    """How a result is shown."""

    json: options.AsJson = False
    csv: Annotated[bool, Option("--csv", help="Print the rows as CSV.")] = False
    plot: Annotated[
        Path | None,
        Option(help="Write a chart to this .png or .svg file, and a dark version beside it."),
    ] = None

    def check(self) -> None:
        """Reject options that would prevent a result from being shown; called before measuring."""
        if self.json and self.csv:
            fail("--json and --csv both write to standard output: choose one")
        if self.plot is not None:
            from mlx_stream.evaluate.charts import check_plot

            check_plot(self.plot)

    def publish(
        self,
        report: "Report",
        columns: Columns,
        table: "Sequence[Row] | None" = None,
        cut: BaseException | None = None,
    ) -> None:
        """Print a report as a table, JSON or CSV, and draw it.

        Args:
            table: the rows to print as a table, if the report has too many to read.
            cut: the error that ended measuring early, from `collecting_rows`; raised at the end.
        """
        if cut:
            report.notes.append("interrupted: these are the figures up to that point")
        if self.json:
            print_json(report.as_json())
        elif self.csv:
            sys.stdout.write(report.as_csv())
        else:
            print_rows(report.rows if table is None else table, columns)
            for line in report.notes:
                print_text(line)
        if self.plot is not None:
            draw(report, self.plot)
        if cut:
            raise cut


def draw(report: "Report", file: Path) -> None:
    from mlx_stream.evaluate.charts import draw_chart

    for path in draw_chart(report, file):
        notify(f"drew {path}")


def parse_cache(text: str, allowed: Sequence[str]) -> tuple[str, dict[str, int]]:
    """Parse `NAME[,SETTING=NUMBER...]`, such as `recompute,stride=8,tokens=4096`."""
    name, *pairs = text.split(",")
    settings: dict[str, int] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in allowed or key in settings:
            fail(f"--cache {text}: expected {', '.join(allowed)}, each at most once, not {pair!r}")
        settings[key] = whole_number(f"--cache {text}: {key}", value, least=int(key != "sinks"))
    return name, settings


def whole_number(name: str, text: str, least: int) -> int:
    if not (text.isdecimal() and len(text) < 10 and int(text) >= least):
        fail(f"{name} must be a whole number, at least {least}, not {text!r}")
    return int(text)


def read_texts(model: "Model", files: Sequence[str]) -> "Corpus":
    from mlx_stream.evaluate.corpus import encode

    return encode(model.tokenizer, [(Path(path).name, read_text(path)) for path in files])


def collecting_rows(rows: "Iterator[Row]") -> "tuple[list[Row], BaseException | None]":
    """Return the rows, and the error that cut them short, if any; raise it if there are no rows."""
    found: list[Row] = []
    try:
        for row in rows:
            found.append(row)
    except (KeyboardInterrupt, MlxStreamError) as error:
        if not found:
            raise
        return found, error
    return found, None
