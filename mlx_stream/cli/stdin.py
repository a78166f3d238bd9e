"""Standard input as one text; says so if nothing comes."""

import select
import sys

from mlx_stream.cli.terminal import decode_utf8
from mlx_stream.program.exits import notify

SECONDS_OF_SILENCE = 2.0


def read_stdin() -> str:
    """Read standard input to its end; it may be empty.

    Raises:
        TextError: it is not UTF-8.
    """
    stdin = sys.stdin.buffer
    try:
        waits = not select.select([stdin], [], [], SECONDS_OF_SILENCE)[0]
    except (OSError, ValueError):  # it has no descriptor
        waits = False
    if waits:
        notify("waiting for standard input, which is part of the question; < /dev/null sends none")
    return decode_utf8(stdin.read(), "standard input")
