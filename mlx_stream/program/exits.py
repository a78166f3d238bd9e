"""How a program ends: errors as one line and exit status 1, interrupts, streams that are closed."""

import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from mlx_stream.errors import MlxStreamError, one_line

Params = ParamSpec("Params")


DEVICE_ERRORS = ("[metal", "[malloc")  # how MLX's messages begin


UNWRITABLE = {
    errno.EPIPE: "was closed",
    errno.ENOSPC: "was full",
    errno.EDQUOT: "was full",
    errno.EFBIG: "was full",
    errno.EIO: "failed",
}


def notify(text: str) -> None:
    """Say something to the user that is not the result."""
    print(f"mlx_stream: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    notify(text)
    raise SystemExit(1)


def exits_cleanly(verb: Callable[Params, None]) -> Callable[Params, None]:
    """Turn errors that a user can cause into one line on standard error and exit status 1."""

    @functools.wraps(verb)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            open_closed_streams()
            prepare_process()
            verb(*args, **kwargs)
            sys.stdout.flush()
        except MlxStreamError as error:
            fail(one_line(error))
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
            line = one_line(error)
            fail(f"the device failed: {line}: start again, with a smaller --window if it recurs")
        except KeyboardInterrupt:
            if sys.stdout.isatty():
                print()
            notify("interrupted")
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


def prepare_process() -> None:
    """Set this process up as a program: what an import must not do for others."""
    from mlx_stream import backend

    backend.set_cache_limit()
    # What the terminal's encoding does not have is shown as an escape, as on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
