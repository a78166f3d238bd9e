"""Handles how a program ends: errors as one line with exit status 1, interrupts, closed streams."""

import errno
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


# The parameters that the library's errors name, and the corresponding options of a program.
PARAMETERS = (
    *("window", "sinks", "kv_bits", "evict", "max_tokens", "stop", "speculate", "draft", "dtype"),
    *("force", "reasoning_effort", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
)
OPTIONS = {f"`{name}`": f"--{name.replace('_', '-')}" for name in PARAMETERS} | {
    "`temperature`": "--temp",
    "`think`": "--think and --no-think",
    "`speculate=False`": "--no-speculate",
}
# Sent when the terminal is closed, and by the system when it shuts down.
ENDING = signal.SIGHUP, signal.SIGTERM


def notify(text: str, dim: bool = True) -> None:
    """Print a line for the user on standard error; on a terminal, it is wrapped and dimmed.

    Library parameters are shown as the program's options.
    """
    text = re.sub("`[a-zA-Z_=]+`", lambda found: OPTIONS.get(found[0], found[0]), text)
    line = f"mlx_stream: {text}"
    with suppress(OSError):  # the terminal is gone
        if sys.stderr.isatty():
            from mlx_stream.program.terminal import styled_notice, terminal_size

            line = styled_notice(line, terminal_size(sys.stderr)[0], dim)
        print(line, file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    notify(text, dim=False)
    raise SystemExit(1)


def exits_cleanly(verb: Callable[Params, None]) -> Callable[Params, None]:
    """Turn errors that a user can cause into one line on standard error and exit status 1."""

    @functools.wraps(verb)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            open_closed_streams()
            prepare_process()
            with ending_on_signals():
                verb(*args, **kwargs)
            sys.stdout.flush()
        except MlxStreamError as error:
            fail(one_line(error))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            discard_output()
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


@contextmanager
def ending_on_signals(*signals: int) -> Iterator[Callable[[], None]]:
    """Let signals (default: SIGHUP and SIGTERM) unwind the block; exit with 128 + their number.

    A second signal ends the process at once. A signal that is ignored, as under nohup, stays
    ignored. Yields a function that raises again after a signal, because an exception that a handler
    raises while MLX converts an array is lost.
    """
    ended = []

    def end(number: int, frame: object) -> NoReturn:
        ended.append(number)
        for one in (*ENDING, signal.SIGINT):
            signal.signal(one, signal.SIG_DFL)
        raise SystemExit(128 + number)

    def check() -> None:
        if ended:
            raise SystemExit(128 + ended[0])

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: signal.getsignal(one) for one in signals or ENDING}
        before = {one: how for one, how in before.items() if how != signal.SIG_IGN}
    for one in before:
        signal.signal(one, end)
    try:
        yield check
        check()
    except SystemExit:
        try:
            sys.stdout.flush()
        except OSError:  # the terminal is gone
            discard_output()
        raise
    finally:
        for one, how in before.items():
            if signal.getsignal(one) is end:  # not while a signal is ending the process
                signal.signal(one, how)


@contextmanager
def finished_before_signals() -> Iterator[None]:
    """Let the block finish before a signal ends the process; a second signal ends it at once."""
    asked = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for one in before:
            signal.signal(one, signal.SIG_DFL)

    before = {one: signal.getsignal(one) for one in (*ENDING, signal.SIGINT)}
    before = {one: how for one, how in before.items() if callable(how)}
    for one in before:
        signal.signal(one, ask)
    try:
        yield
    finally:
        if not asked:
            for one, how in before.items():
                signal.signal(one, how)
        if asked:  # perhaps while the handlers were being set
            raise SystemExit(128 + asked[0])


def discard_output() -> None:
    """Send output to the null device, so that the interpreter's flush at exit succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_closed_streams() -> None:
    """Open the null device in place of each standard stream that was closed at startup."""
    # They stay open until the process ends; otherwise the next file would get their descriptors.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123


def prepare_process() -> None:
    """Set up this process in ways that a program may but an import must not."""
    from mlx_stream import backend

    backend.set_cache_limit()
    # Characters that the terminal's encoding lacks are shown as escapes, as on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
