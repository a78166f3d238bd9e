"""`mlx_stream eval endurance`: one stream that reads for hours and can be stopped and continued."""

import signal
from pathlib import Path
from typing import Annotated

from typer import Option

from mlx_stream.cli import options
from mlx_stream.cli.eval import common
from mlx_stream.cli.terminal import defer_interrupts, progress_bar
from mlx_stream.program.exits import notify

COLUMNS = (
    ("tokens", "tokens", ","),
    ("perplexity", "perplexity", ",.2f"),
    ("tokens_per_second", "tok/s", ".1f"),
    ("active_bytes", "active bytes", ","),
    ("resident_bytes", "resident MB", "MB"),
    ("evicted", "evicted", ","),
)


@options.verb
def endurance(
    *,
    model: options.ModelArgument,
    files: common.Files,
    log: Annotated[
        Path,
        Option(
            help="JSON-lines file, one line per segment; the stream's state is saved beside it."
        ),
    ],
    tokens: common.Tokens = 250_000,
    window: common.Window = 1_020,
    sinks: common.Sinks = 4,
    segment: common.Segment = 2_048,
    chunk: common.Chunk = 128,
    save_every: Annotated[float, Option(help="Seconds between saved states.")] = 300.0,
    fresh: Annotated[
        bool, Option(help="At the end, read the last tenth with a fresh stream too, and compare.")
    ] = True,
    loading: options.MeasuredLoadOptions,
    output: common.OutputOptions,
) -> None:
    """Read texts over and over as one stream, and log the results.

    Ctrl-C stops it after the current step. Rerun the command to continue; the figures
    are the same as in an uninterrupted run. With a larger --tokens it reads further. The last
    segment is always completed.
    """
    from mlx_stream.evaluate.endurance import (
        Course,
        compare_with_fresh,
        endure,
        in_tenths,
        memory_line,
        segments,
    )
    from mlx_stream.evaluate.jsonl import open_log
    from mlx_stream.evaluate.report import Report, facts

    output.check()
    loaded = loading.load(model)
    sinks, window = loaded.resolve_window(sinks, window, notify)
    text = common.read_texts(loaded, files)
    course = Course(loaded, text, sinks, window, segment, chunk, save_every)
    sizes = {"sinks": sinks, "window": window, "segment": segment, "chunk": chunk}
    with open_log(log, course.key, facts(loaded, texts=text.names, **sizes)) as opened:
        signals = signal.SIGINT, signal.SIGTERM
        with defer_interrupts(*signals) as stopped, progress_bar("reading") as progress:
            done = endure(course, opened, tokens, stopped, progress, notify)
        if not done:
            notify(f"stopped: {log} and its state are saved; rerun the command to continue")
            raise SystemExit(130)
        rows = segments(opened)
        notes, about = [memory_line(rows)], dict(opened.header["about"])
        if fresh:
            with progress_bar("fresh stream, last tenth") as progress:
                about["fresh"] = found = compare_with_fresh(course, opened, progress)
            difference = found["stream_perplexity"] / found["perplexity"] - 1
            notes.append(
                f"last tenth: {found['stream_perplexity']:.3f}; read by a fresh stream: "
                f"{found['perplexity']:.3f} ({difference:+.2%})"
            )
    output.publish(Report("endurance", about, rows, notes), COLUMNS, in_tenths(rows))
