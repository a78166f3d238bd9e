"""A model for laptops: 6 bits, whose predictions are close to the source's.

python convert/laptop.py SOURCE OUT [--bits 8]
"""

from typing import Annotated

import typer

from mlx_stream.cli.convert import Force, Out, Report, Source, convert, run_script


def laptop(
    source: Source,
    out: Out,
    bits: Annotated[int, typer.Option("--bits", help="Fewer where memory is short.")] = 6,
    report: Report = None,
    force: Force = False,
) -> None:
    """Convert SOURCE for a laptop: 6 bits, floats of the source's own type."""
    convert(source, out, bits=bits, report=report, force=force)


if __name__ == "__main__":
    run_script(laptop)
