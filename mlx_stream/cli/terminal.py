"""What every verb does with its streams: notices, progress, errors; knows no verb."""

import errno
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, ParamSpec

from mlx_stream.errors import MlxStreamError, TextError

Params = ParamSpec("Params")

SECONDS_PER_LINE = 30.0
DEVICE_ERRORS = ("[metal", "[malloc")  # how MLX's messages begin
UNWRITABLE = {
    errno.EPIPE: "was closed",
    errno.ENOSPC: "was full",
    errno.EDQUOT: "was full",
    errno.EFBIG: "was full",
    errno.EIO: "failed",
}


def note(text: str) -> None:
    """Say something to the user that is not the result."""
    print(f"mlx_stream: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    note(text)
    raise SystemExit(1)


def guarded(verb: Callable[Params, None]) -> Callable[Params, None]:
    """Turn errors that a user can cause into one line on standard error and exit status 1."""

    @functools.wraps(verb)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            open_closed_streams()
            prepare()
            verb(*args, **kwargs)
            sys.stdout.flush()
        except MlxStreamError as error:
            fail(" ".join(str(error).split()))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            # The interpreter's own flush at exit must find a place to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            fail(f"standard output {UNWRITABLE[error.errno]} before everything was written")
        except RuntimeError as error:
            # A GPU's errors come late, from wherever its results are waited for.
            if not str(error).lower().startswith(DEVICE_ERRORS):
                raise
            line = " ".join(str(error).split())
            fail(f"the device failed: {line}: start again, with a smaller --window if it recurs")
        except KeyboardInterrupt:
            if sys.stdout.isatty():
                print()
            note("interrupted")
            raise SystemExit(130) from None

    return run


def open_closed_streams() -> None:
    """Give the standard streams that were closed before we began a place to go, or an end."""
    # Held open for the whole process: the next file opened would else take their number.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def prepare() -> None:
    """Set this process up as a program: what an import must not do for others."""
    from mlx_stream import backend

    backend.set_cache_limit()
    # What the terminal's encoding does not have is shown as an escape, as on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def read_text(path: str) -> str:
    """Read a UTF-8 text file, or standard input for `-`.

    Raises:
        TextError: it cannot be read, is not UTF-8, or is empty.
    """
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TextError(f"{name}: cannot be read: {reason}") from error
    text = decode(data, name)
    if not text:
        raise TextError(f"{name}: is empty: give a text of at least one character")
    return text


def decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{name}: is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}): convert it, "
            "for instance with iconv -t UTF-8"
        ) from error


def seldom(label: str) -> Callable[[int, int], None]:
    """Return a progress callback for logs: a line now and then, none for what is soon done."""
    begun = told = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > SECONDS_PER_LINE:
            told = time.monotonic()
            left = max(0.0, (told - begun) * (total / max(done, 1) - 1))
            note(f"{label}: {done:,} of {total:,}, {left / 60:.0f} min left")

    return update


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show on standard error a bar with the time left, or lines where it is no terminal."""
    if not sys.stderr.isatty():
        yield seldom(label)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done == total:
                bar.stop()  # what is printed next must not meet a bar

        yield update
