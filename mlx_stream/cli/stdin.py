"""Standard input as a single text; tells the user if nothing arrives."""

import select
import sys
from collections.abc import Iterator

from mlx_stream.cli.terminal import decode_utf8
from mlx_stream.errors import TextError
from mlx_stream.program.exits import notify

SECONDS_OF_SILENCE = 2.0
MOST_BYTES = 8 * 10**6  # the limit for a question, which is encoded as one text


def lines_of_stdin() -> Iterator[bytes]:
    """Yield the lines of standard input.

    Raises:
        TextError: it cannot be read.
    """
    try:
        yield from sys.stdin.buffer
    except (OSError, ValueError) as error:
        raise TextError(f"standard input cannot be read: {error}") from error


def read_stdin() -> str:
    """Read standard input to its end; it may be empty.

    Raises:
        TextError: it is not UTF-8, is too long, or cannot be read.
    """
    stdin = sys.stdin.buffer
    try:
        waits = not select.select([stdin], [], [], SECONDS_OF_SILENCE)[0]
    except (OSError, ValueError):  # standard input has no file descriptor
        waits = False
    if waits:
        notify("waiting for standard input, which is part of the question; < /dev/null sends none")
    try:
        data = stdin.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise TextError(f"standard input cannot be read: {error}") from error
    if len(data) > MOST_BYTES:
        raise TextError(
            f"standard input is longer than {MOST_BYTES // 10**6:,} MB: use generate -p -, which "
            "reads a text of any length"
        )
    return decode_utf8(data, "standard input")
