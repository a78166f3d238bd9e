"""`mlx_stream eval endurance`: one stream, read for hours, stopped and continued at will."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.cli.eval import common
from mlx_stream.cli.terminal import progress_bar
from mlx_stream.program.exits import exits_cleanly, notify

COLUMNS = (
    ("tokens", "tokens", ","),
    ("perplexity", "perplexity", ",.2f"),
    ("tokens_per_second", "tok/s", ".1f"),
    ("active_bytes", "active bytes", ","),
    ("resident_bytes", "resident MB", "MB"),
    ("evicted", "evicted", ","),
)


@exits_cleanly
@options.grouped
def endurance(
    *,
    model: options.ModelArgument,
    files: options.Files,
    log: Annotated[
        Path,
        typer.Option(
            "--log",
            metavar="FILE",
            help="JSON lines, one per segment; the stream's state is saved beside it.",
        ),
    ],
    tokens: options.Tokens = 250_000,
    window: options.WindowSize = 1_020,
    sinks: options.SinkCount = 4,
    segment: options.Segment = 2_048,
    chunk: options.Chunk = 128,
    save_every: Annotated[
        float, typer.Option("--save-every", help="Seconds between saved states.")
    ] = 300.0,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh/--no-fresh",
            help="In the end, read the last tenth with a fresh stream too, and compare.",
        ),
    ] = True,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Read texts over and over as one stream, into a log.

    Ctrl-C stops it after the step it is in; the same command continues from there, with the bits it
    would have had. A larger --tokens reads further. The last segment is read whole.
    """
    from mlx_stream.evaluate.endurance import (
        Course,
        compare_with_fresh,
        endure,
        in_tenths,
        memory_line,
        segments,
        state_path,
    )
    from mlx_stream.evaluate.jsonl import JsonLog
    from mlx_stream.evaluate.report import Report, facts

    output.check(files, (log, state_path(log)))
    loaded = loading.load(model)
    sinks, window = loaded.resolve_window(sinks, window, notify)
    text = common.read_texts(loaded, files)
    course = Course(loaded, text, sinks, window, segment, chunk, save_every)
    about = facts(
        loaded, texts=text.names, sinks=sinks, window=window, segment=segment, chunk=chunk
    )
    with JsonLog(log, course.key, about) as opened:
        with stop_on_signals() as stopped, progress_bar("reading") as progress:
            done = endure(course, opened, tokens, stopped, progress, notify)
        if not done:
            notify(f"stopped: {log} and its state are saved; the same command continues from there")
            raise SystemExit(130)
        rows = segments(opened)
        notes = [memory_line(rows)]
        about = dict(opened.header["about"])
        if fresh:
            with progress_bar("fresh stream, last tenth") as progress:
                about["fresh"] = found = compare_with_fresh(course, opened, progress)
            difference = found["stream_perplexity"] / found["perplexity"] - 1
            notes.append(
                f"last tenth: {found['stream_perplexity']:.3f}; read by a fresh stream: "
                f"{found['perplexity']:.3f} ({difference:+.2%})"
            )
    report = Report("endurance", about, rows, notes)
    output.publish(report, COLUMNS, in_tenths(rows))


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {one: signal.signal(one, ask) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
