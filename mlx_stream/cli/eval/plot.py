"""`mlx_stream eval plot`: redraw the chart of an earlier measurement."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from mlx_stream.cli import options
from mlx_stream.cli.eval.common import draw


@options.verb
def plot(
    *,
    result: Annotated[
        Path, Argument(metavar="RESULT", help="File with the --json output of an experiment.")
    ],
    file: Annotated[
        Path, Argument(metavar="FILE", help="A .png or .svg file; the dark chart is FILE-dark.")
    ],
) -> None:
    """Plot a result that was saved with --json."""
    from mlx_stream.evaluate.charts import check_plot
    from mlx_stream.evaluate.report import read_report

    check_plot(file)
    draw(read_report(result), file)
