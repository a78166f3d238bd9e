"""Ends a program: errors as one line and exit status 1, interrupts, and closed streams."""

import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from mlx_stream.errors import MlxStreamError, one_line

Params = ParamSpec("Params")
DEVICE_ERRORS = ("[metal", "[malloc")  # the beginnings of MLX's messages
UNWRITABLE = {
    errno.EPIPE: "was closed",
    errno.ENOSPC: "was full",
    errno.EDQUOT: "was full",
    errno.EFBIG: "was full",
    errno.EIO: "failed",
}


def notify(text: str) -> None:
    """Print a line for the user that is not the result."""
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
            # The interpreter's own flush at exit must find an open file.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            fail(f"standard output {UNWRITABLE[error.errno]} before everything was written")
        except RuntimeError as error:
            # A GPU reports errors late, wherever the program waits for a result.
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
    """Open the null device in place of each standard stream that was closed at the start."""
    # They stay open for the whole process. Otherwise the next file would get their number.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123


def prepare_process() -> None:
    """Set up this process as a program, in ways that an import must not."""
    from mlx_stream import backend

    backend.set_cache_limit()
    # Characters that the terminal's encoding lacks are shown as escapes, as on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
