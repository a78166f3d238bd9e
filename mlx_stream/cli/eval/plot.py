"""`mlx_stream eval plot`: draw again what was measured before."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_stream.cli.eval.common import refuse_same_files
from mlx_stream.program.exits import exits_cleanly, notify


@exits_cleanly
def plot(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="What an experiment printed with --json.")
    ],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .png or .svg; its dark twin is FILE-dark.")
    ],
) -> None:
    """Draw a result that was kept with --json again."""
    from mlx_stream.evaluate.charts import check_plot, dark_twin, draw_chart
    from mlx_stream.evaluate.report import read_report

    check_plot(file)
    refuse_same_files([result], [file, dark_twin(file)])
    for path in draw_chart(read_report(result), file):
        notify(f"drew {path}")
