"""`eval endurance`: one stream for hundreds of thousands of tokens, stopped and continued at will.

After each segment a line is logged; the stream's state is saved now and then, and when asked to
stop. A state older than the log is caught up by reading, which gives the same bits again.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.errors import SnapshotError, TextError, ValueRefused
from mlx_stream.evaluate.corpus import Corpus
from mlx_stream.evaluate.jsonl import JsonLog
from mlx_stream.evaluate.readers import StreamReader
from mlx_stream.evaluate.report import Row, perplexity
from mlx_stream.evaluate.score import losses_of
from mlx_stream.generate import snapshot
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import Model
from mlx_stream.program.notices import Notify

FRESH = "fresh"


@dataclass(frozen=True)
class Course:
    """What one stream reads, and how.

    Attributes:
        sinks, window: S and W of the stream.
        segment: tokens of one line of the log.
        chunk: tokens read per step.
        save_every: seconds between saved states, at least.
    """

    model: Model
    text: Corpus
    sinks: int
    window: int
    segment: int
    chunk: int
    save_every: float = 300.0

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ValueRefused(f"--segment must be at least 1, not {self.segment}")
        if self.chunk < 1:
            raise ValueRefused(f"--chunk must be at least 1, not {self.chunk}")
        if not 0 <= self.save_every < math.inf:
            raise ValueRefused(f"--save-every must be 0 or more seconds, not {self.save_every}")
        if len(self.text.ids) <= self.segment:
            raise TextError(
                f"{', '.join(self.text.names)}: {len(self.text.ids):,} tokens do not make a "
                f"segment of {self.segment:,} and one to predict: give a longer text, or a "
                "smaller --segment"
            )

    @property
    def key(self) -> Row:
        """What a log must agree in to be one of this course."""
        return {
            "experiment": "endurance",
            "model": self.model.fingerprint(),
            "text": self.text.digest,
            "sinks": self.sinks,
            "window": self.window,
            "segment": self.segment,
            "chunk": self.chunk,
        }


@dataclass
class EnduranceState:
    """A stream on its way, and what it found in the segment it is in."""

    stream: TokenStream
    nll: list[float] = field(default_factory=list)
    seconds: float = 0.0


def state_path(log: Path) -> Path:
    """Return where the state of a log's stream is saved: beside it."""
    return log.with_name(f"{log.name}.state")


def segments(log: JsonLog) -> list[Row]:
    return [row for row in log.rows if "segment" in row]


def check_log(course: Course, log: JsonLog) -> None:
    """Refuse a log whose lines are not what this module writes.

    Raises:
        ValueRefused: a segment missing, twice or out of order, or a figure that is none.
    """
    for index, row in enumerate(segments(log)):
        counts = ("active_bytes", "resident_bytes", "evicted")
        whole = (
            (row["segment"], row.get("tokens")) == (index, (index + 1) * course.segment)
            and is_number(row.get("nll"))
            and (row.get("perplexity") is None or is_number(row["perplexity"]))
            and is_number(row.get("tokens_per_second"))
            and row["tokens_per_second"] > 0
            and all(type(row.get(name)) is int for name in counts)
        )
        if not whole:
            raise ValueRefused(
                f"{log.path}: the line of segment {index} is damaged or missing: choose another "
                "file, or cut this one before that line"
            )


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15


def endure(
    course: Course,
    log: JsonLog,
    tokens: int,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    notify: Notify = lambda line: None,
) -> bool:
    """Read on until at least `tokens` tokens are logged; return whether that is done.

    Args:
        stopped: asked after each step; once true, the state is saved and the reading ends.
        progress: called with tokens read and to read from here on.

    Raises:
        ValueRefused: fewer than one token.
        TextError, SnapshotError: log or state cannot be written; what was logged is kept.
    """
    if tokens < 1:
        raise ValueRefused(f"--tokens must be at least 1, not {tokens}")
    check_log(course, log)
    check_state_path(log)
    target = math.ceil(tokens / course.segment) * course.segment
    if len(segments(log)) * course.segment >= target:
        return True
    reading = resume_state(course, log, notify)
    begun, saved = reading.stream.length, time.monotonic()
    if begun:
        notify(f"{log.path}: going on from token {begun:,}")
    try:
        if len(reading.nll) == course.segment:
            end_segment(course, reading, log, notify)  # its line did not get onto the disk
        for boundary in steps(course, reading, target):
            if boundary:
                end_segment(course, reading, log, notify)
            progress(reading.stream.length - begun, target - begun)
            if time.monotonic() - saved > course.save_every:
                save_state(reading, log)
                saved = time.monotonic()
            if stopped():
                break
    except TextError:
        # The log's disk is full. Where the state still finds room, nothing is read twice.
        with suppress(SnapshotError):
            save_state(reading, log)
        raise
    save_state(reading, log)
    return reading.stream.length == target


def steps(course: Course, reading: EnduranceState, target: int) -> Iterator[bool]:
    """Read step by step to `target`; yield after each whether it ended a segment."""
    stream = reading.stream
    while stream.length < target:
        start = stream.length
        left = course.segment - start % course.segment
        stop = start + min(course.chunk, left)
        begun = time.perf_counter()
        ids = course.text.around(start, stop + 1)
        for losses in losses_of(stream, ids, course.chunk):
            reading.nll.extend(losses)
        reading.seconds += time.perf_counter() - begun
        yield stop - start == left


def end_segment(course: Course, reading: EnduranceState, log: JsonLog, notify: Notify) -> None:
    """Log the segment that has just ended, or hold it against the line that is there already."""
    done = segments(log)
    row = {
        "segment": reading.stream.length // course.segment - 1,
        "tokens": reading.stream.length,
        "perplexity": perplexity(reading.nll),
        "nll": math.fsum(reading.nll) / len(reading.nll),
        "tokens_per_second": course.segment / reading.seconds,
        "active_bytes": mx.get_active_memory(),
        "resident_bytes": backend.resident_bytes(),
        "evicted": reading.stream.cache.evicted,
    }
    if row["segment"] == len(done):
        log.append(row)
    elif row["nll"] != done[row["segment"]].get("nll"):
        notify(
            f"segment {row['segment']} gives other bits than are logged: another machine, or "
            "another version of MLX"
        )
    reading.nll, reading.seconds = [], 0.0


def save_state(reading: EnduranceState, log: JsonLog) -> None:
    about = {"key": log.header["key"], "nll": reading.nll, "seconds": reading.seconds}
    model = log.header["key"]["model"]
    snapshot.save_snapshot(state_path(log.path), reading.stream, model, about)


def resume_state(course: Course, log: JsonLog, notify: Notify) -> EnduranceState:
    """Return the stream as it was saved, or from the beginning where no state is of use."""
    reading = EnduranceState(new_stream(course))
    path = state_path(log.path)
    logged = len(segments(log))
    if not logged and not path.exists():
        return reading
    try:
        found = snapshot.load_snapshot(path)
        length = found.state.get("length")
        if found.about.get("key") != log.header["key"]:
            raise SnapshotError(f"{path}: is not the state of this log")
        nll, seconds = found.about["nll"], found.about["seconds"]
        if (
            type(length) is not int
            or type(nll) is not list
            or not all(map(is_number, nll))
            or not is_number(seconds)
            or (nll and seconds == 0)
        ):
            raise SnapshotError(f"{path}: is not the state of a log")
        begun, odd = divmod(length - len(nll), course.segment)
        if odd or len(nll) > course.segment or not 0 <= begun <= logged:
            raise SnapshotError(f"{path}: does not fit the log, which has {logged} segments")
        reading.stream.restore(found.state)
        return EnduranceState(reading.stream, nll, seconds)
    except (SnapshotError, ValueRefused, KeyError) as error:
        notify(f"{error}; reading {logged * course.segment:,} logged tokens again")
        return reading  # a state that is refused changes nothing


def check_state_path(log: JsonLog) -> None:
    """Refuse to put the state where another file is, or where none can be.

    Raises:
        ValueRefused: there is a file that this program did not write.
        TextError: the name is too long, or the like.
    """
    path = state_path(log.path)
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise TextError(f"{path}: cannot be used: {error.strerror}: choose another log") from error
    if not snapshot.is_snapshot(path):
        raise ValueRefused(
            f"{path}: the log's state goes there, and a file that is none is there: move it away "
            "or choose another log"
        )


def new_stream(course: Course) -> TokenStream:
    return TokenStream(course.model, course.model.new_cache(course.sinks, course.window))


def compare_with_fresh(
    course: Course,
    log: JsonLog,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Row:
    """Read the last tenth with a fresh stream, begun on the window before it; log and return it.

    A log that has it already is not read again.
    """
    rows = segments(log)
    tenth = rows[-max(1, len(rows) // 10) :]
    start, stop = tenth[0]["tokens"] - course.segment, tenth[-1]["tokens"]
    for line in log.rows:
        known = line.get(FRESH)
        if isinstance(known, dict) and (known.get("from"), known.get("to")) == (start, stop):
            figures = (known.get("perplexity"), known.get("stream_perplexity"))
            if all(is_number(figure) and figure != 0 for figure in figures):
                return known
    begin = max(0, start - course.sinks - course.window)
    ids = course.text.around(begin, stop + 1)
    stream = new_stream(course)
    reader = StreamReader(course.model, ids, stream.cache, course.chunk)
    nll: list[float] = []
    for first in range(0, len(ids) - 1, course.chunk):
        nll.extend(reader.read(first, min(first + course.chunk, len(ids) - 1)))
        progress(first, len(ids) - 1)
    fresh = {
        "from": start,
        "to": stop,
        "perplexity": perplexity(nll[start - begin :]),
        "stream_perplexity": mean_perplexity(tenth),
    }
    log.append({FRESH: fresh})
    return fresh


def mean_perplexity(rows: Sequence[Row]) -> float:
    """Return the perplexity of equally long segments together."""
    return perplexity([row["nll"] for row in rows])


def in_tenths(rows: Sequence[Row]) -> list[Row]:
    """Return up to ten rows that sum up a log, the last one the rest."""
    count = min(10, len(rows))
    bounds = [index * len(rows) // count for index in range(count + 1)]
    return [sum_up(rows[a:b]) for a, b in itertools.pairwise(bounds)]


def sum_up(rows: Sequence[Row]) -> Row:
    seconds = sum(1 / row["tokens_per_second"] for row in rows)
    last: dict[str, Any] = dict(rows[-1])
    return {
        **last,
        "perplexity": mean_perplexity(rows),
        "tokens_per_second": len(rows) / seconds,
    }


def memory_line(rows: Sequence[Row]) -> str:
    """Return what the active memory after each segment was, equal to the byte or not."""
    active = [row["active_bytes"] for row in rows]
    if len(set(active)) == 1:
        return f"active memory: {active[0]:,} bytes after every segment"
    return f"active memory: from {min(active):,} to {max(active):,} bytes"
