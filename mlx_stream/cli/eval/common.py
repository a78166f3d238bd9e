"""What all experiments share: their texts, and the three ways a result is shown."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_stream.cli import options
from mlx_stream.cli.terminal import read_text
from mlx_stream.errors import MlxStreamError
from mlx_stream.program.exits import fail, notify

if TYPE_CHECKING:
    from mlx_stream.evaluate.corpus import Corpus
    from mlx_stream.evaluate.report import Report, Row
    from mlx_stream.load import Model

Columns = Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class OutputOptions:
    """How a result is shown."""

    json: options.AsJson = False
    csv: options.AsCsv = False
    plot: options.Plot = None

    def check(
        self, read: "Sequence[str | Path]" = (), written: "Sequence[Path | None]" = ()
    ) -> None:
        """Refuse before anything is measured what could not be shown afterwards.

        Args:
            read: files that are read, and must not be written over.
            written: files that are written besides the plot.
        """
        if self.json and self.csv:
            fail("--json and --csv both want standard output: choose one")
        if self.plot is not None:
            from mlx_stream.evaluate.charts import check_plot, dark_twin

            check_plot(self.plot)
            written = [*written, self.plot, dark_twin(self.plot)]
        refuse_same_files(read, [path for path in written if path is not None])

    def publish(
        self,
        report: "Report",
        columns: Columns,
        table: "Sequence[Row] | None" = None,
        cut: BaseException | None = None,
    ) -> None:
        """Print a report as a table, JSON or CSV, and draw it.

        Args:
            columns: of the table: key of the rows, heading, format of a number.
            table: its rows, where there are too many in the report for people.
            cut: what ended it early, as of `collecting_rows`: noted, and raised in the end.
        """
        from mlx_stream.cli.report import print_json

        if cut:
            report.notes.append("interrupted: the figures until then")
        if self.json:
            print_json(report.as_json())
        elif self.csv:
            sys.stdout.write(report.as_csv())
        else:
            print_rows(report.rows if table is None else table, columns)
            for line in report.notes:
                print(line)
        if self.plot is not None:
            from mlx_stream.evaluate.charts import draw_chart

            for path in draw_chart(report, self.plot):
                notify(f"drew {path}")
        if cut:
            raise cut


def parse_cache(text: str, allowed: Sequence[str]) -> tuple[str, dict[str, int]]:
    """Read `NAME[,SETTING=NUMBER...]`, such as `recompute,stride=8,tokens=4096`."""
    name, *pairs = text.split(",")
    settings: dict[str, int] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        least = 0 if key == "sinks" else 1
        if key not in allowed or key in settings:
            fail(f"--cache {text}: takes {', '.join(allowed)}, each once, not {pair!r}")
        if not (value.isdecimal() and len(value) < 10 and int(value) >= least):
            fail(f"--cache {text}: {key} must be a whole number, at least {least}, not {value!r}")
        settings[key] = int(value)
    return name, settings


def refuse_same_files(read: "Sequence[str | Path]", written: "Sequence[Path]") -> None:
    """Refuse to write one file twice, or over one that is read."""
    taken = {os.path.realpath(path) for path in read if path != "-"}
    for path in written:
        place = os.path.realpath(path)
        if place in taken:
            fail(f"{path}: cannot be written to, it has another use: choose another file")
        taken.add(place)


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


def print_rows(rows: "Sequence[Row]", columns: Columns) -> None:
    from mlx_stream.cli.report import print_table

    shown = [[cell(row.get(key), form) for key, _, form in columns] for row in rows]
    print_table([heading for _, heading, _ in columns], shown)


def cell(value: Any, form: str) -> str:
    """Format one figure; `MB` shows bytes as megabytes."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if form == "MB":
        return f"{value / 1e6:,.1f}"
    return format(value, form)
