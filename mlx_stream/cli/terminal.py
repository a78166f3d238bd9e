"""Reads text, shows progress and handles interrupts for every verb; independent of the verbs."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

from mlx_stream.errors import TextError
from mlx_stream.program.exits import notify
from mlx_stream.program.terminal import terminal_size

SECONDS_PER_LINE = 30.0
# A reply repeats itself if this many characters at its end consist of a shorter text, repeated at
# least three times.
REPEATED = 400

Progress = Callable[[int, int], None]


def read_text(path: str) -> str:
    """Read a UTF-8 text file, or standard input for `-`.

    Raises:
        TextError: the file cannot be read, is not UTF-8, or is empty.
    """
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TextError(f"{name}: cannot be read: {reason}") from error
    text = decode_utf8(data, name)
    if not text:
        raise TextError(f"{name}: is empty: some text is required")
    return text


def decode_utf8(data: bytes, name: str) -> str:
    """Decode UTF-8; a byte order mark is not part of the text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place, byte = error.start, error.object[error.start]
        raise TextError(
            f"{name}: is not UTF-8 (byte {place} is 0x{byte:02x}): convert it, for instance with "
            "iconv -t UTF-8"
        ) from error


def ask_line(question: str) -> str:
    """Ask for a line on the terminal; return "" at end of input."""
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def confirm(action: str) -> bool:
    """Ask on the terminal whether to do something."""
    return ask_line(f"{action}? y or n: ").lower() in ("y", "yes")


def repeats_itself(text: str) -> bool:
    """Return whether a text ends by repeating the same few lines over and over.

    >>> repeats_itself("I am here. " * 40), repeats_itself("I am here. " * 9)
    (True, False)
    """
    end = text[-REPEATED:]
    before = end.rfind(end[-50:], 0, -1)
    period = len(end) - 50 - before
    return (
        len(end) == REPEATED
        and before >= 0
        and period <= REPEATED // 3
        and (end[period:] == end[:-period])
    )


@contextmanager
def defer_interrupts(*signals: int) -> Iterator[Callable[[], bool]]:
    """Turn the first signal, such as Ctrl-C, into a request; a second one interrupts immediately.

    Yields a function that returns whether the signal has arrived.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {one: signal.signal(one, ask) for one in signals}
    try:
        yield lambda: asked
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def log_progress(label: str) -> Progress:
    """Return a progress callback for logs, which prints a line every 30 seconds."""
    begun = told = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > SECONDS_PER_LINE:
            told = time.monotonic()
            left = max(0.0, (told - begun) * (total / max(done, 1) - 1))
            notify(f"{label}: {done:,} of {total:,}, {left / 60:.0f} min left")

    return update


@contextmanager
def progress_bar(label: str, delay: float = 0.0) -> Iterator[Progress]:
    """Show a bar with the time left on standard error, or lines if that is not a terminal.

    Args:
        delay: seconds before it is shown.
    """
    if not sys.stderr.isatty():
        yield log_progress(label)
        return
    from rich import progress
    from rich.console import Console

    shown = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(min(40, terminal_size(sys.stderr)[0] // 4)),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    bar = progress.Progress(*shown, console=console, transient=True, refresh_per_second=4)
    timer = Timer(delay, bar.start)
    task = bar.add_task(label, total=None)

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done == total:
            stop()  # before anything else is printed

    def stop() -> None:
        timer.cancel()
        timer.join()  # it may be starting the bar right now
        bar.stop()

    timer.start()
    try:
        yield update
    finally:
        stop()
