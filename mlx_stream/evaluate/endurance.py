"""`eval endurance`: reads hundreds of thousands of tokens in one stream; can be interrupted.

A line is logged after each segment. The stream's state is saved periodically and when the run is
stopped. If the saved state is older than the log, the stream catches up by rereading,
with bit-identical results.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.evaluate.corpus import Corpus
from mlx_stream.evaluate.jsonl import JsonLog
from mlx_stream.evaluate.report import Progress, Row, no_progress, perplexity
from mlx_stream.evaluate.score import losses_of
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.program.notices import Notify, discard


@dataclass(frozen=True)
class Course:
    """The text that one stream reads, and how it is read.

    Each line of the log covers `segment` tokens; `chunk` tokens are read per step. At least
    `save_every` seconds pass between saved states.
    """

    model: Model
    text: Corpus
    sinks: int
    window: int
    segment: int
    chunk: int
    save_every: float = 300.0

    def __post_init__(self) -> None:
        for option, number in (("--segment", self.segment), ("--chunk", self.chunk)):
            if number < 1:
                raise ValueRefused(f"{option} must be at least 1, not {number}")
        if not 0 <= self.save_every < math.inf:
            raise ValueRefused(f"--save-every must be 0 or more seconds, not {self.save_every}")
        self.text.require(self.segment, "--segment")

    @property
    def key(self) -> Row:
        """The settings in the first line of this course's log."""
        return {
            "experiment": "endurance",
            "model": self.model.fingerprint(),
            "text": self.text.digest,
            "sinks": self.sinks,
            "window": self.window,
            "segment": self.segment,
            "chunk": self.chunk,
        }

    def new_stream(self) -> TokenStream:
        return TokenStream(self.model, self.model.new_cache(self.sinks, self.window))


@dataclass
class EnduranceState:
    """A stream, and the losses and elapsed seconds of its current segment."""

    stream: TokenStream
    nll: list[float] = field(default_factory=list)
    seconds: float = 0.0


def state_path(log: Path) -> Path:
    """Return the path where the state of a log's stream is saved, next to the log."""
    return Path(f"{log}.state")


def segments(log: JsonLog) -> list[Row]:
    return [row for row in log.rows if "segment" in row]


def endure(
    course: Course,
    log: JsonLog,
    tokens: int,
    stopped: Callable[[], bool] = lambda: False,
    progress: Progress = no_progress,
    notify: Notify = discard,
) -> bool:
    """Continue reading until at least `tokens` tokens are logged; return False if stopped earlier.

    Once `stopped` returns True, the state is saved and reading stops. Raises ValueRefused if
    `tokens` is below 1 or the state would overwrite some other file, and TextError or SnapshotError
    if the log or the state cannot be written. Lines that have already been logged are kept.
    """
    if tokens < 1:
        raise ValueRefused(f"--tokens must be at least 1, not {tokens}")
    state = state_path(log.path)
    if state.exists() and not snapshot.is_snapshot(state):
        raise ValueRefused(
            f"{state}: the state would overwrite this file: move it, or use another --log"
        )
    target = math.ceil(tokens / course.segment) * course.segment
    if len(segments(log)) * course.segment >= target:
        return True
    reading = resume_state(course, log, notify)
    stream = reading.stream
    begun, saved = stream.length, time.monotonic()
    if begun:
        notify(f"{log.path}: continuing from token {begun:,}")
    while stream.length < target and not stopped():
        read_step(course, reading)
        if stream.length % course.segment == 0:
            end_segment(course, reading, log)
        progress(stream.length - begun, target - begun)
        if time.monotonic() - saved > course.save_every:
            save_state(reading, log)
            saved = time.monotonic()
    save_state(reading, log)
    return stream.length == target


def read_step(course: Course, reading: EnduranceState) -> None:
    """Read a chunk, or the rest of the segment if that is shorter."""
    start = reading.stream.length
    stop = start + min(course.chunk, course.segment - start % course.segment)
    begun = time.perf_counter()
    ids = course.text.around(start, stop + 1)
    reading.nll += losses_of(reading.stream, ids, course.chunk)
    reading.seconds += time.perf_counter() - begun


def end_segment(course: Course, reading: EnduranceState, log: JsonLog) -> None:
    """Log the segment that has just ended, unless it has already been logged."""
    stream = reading.stream
    row = {
        "segment": stream.length // course.segment - 1,
        "tokens": stream.length,
        "perplexity": perplexity(reading.nll),
        "nll": math.fsum(reading.nll) / len(reading.nll),
        "tokens_per_second": course.segment / reading.seconds,
        "active_bytes": mx.get_active_memory(),
        "resident_bytes": backend.resident_bytes(),
        "evicted": stream.cache.evicted,
    }
    if row["segment"] == len(segments(log)):
        log.append(row)
    reading.nll, reading.seconds = [], 0.0


def save_state(reading: EnduranceState, log: JsonLog) -> None:
    key = log.header["key"]
    about = {"key": key, "nll": reading.nll, "seconds": reading.seconds}
    snapshot.save_snapshot(state_path(log.path), reading.stream, key["model"], about)


def resume_state(course: Course, log: JsonLog, notify: Notify) -> EnduranceState:
    """Return the saved stream, or a new one if there is no usable state."""
    stream, path = course.new_stream(), state_path(log.path)
    logged = len(segments(log)) * course.segment
    if not logged and not path.exists():
        return EnduranceState(stream)
    try:
        found = snapshot.load_snapshot(path)
        nll, length = found.about["nll"], found.state["length"]
        assert isinstance(length, int)
        if found.about["key"] != log.header["key"]:
            raise SnapshotError(f"{path}: belongs to another log")
        if length - len(nll) > logged or length % course.segment != len(nll):
            raise SnapshotError(f"{path}: does not match the log of {logged:,} tokens")
        stream.restore(found.state)
        return EnduranceState(stream, nll, found.about["seconds"])
    except (SnapshotError, ValueRefused, KeyError) as error:
        notify(f"{error}; reading {logged:,} logged tokens again")
        return EnduranceState(stream)  # a refused state changes nothing


def compare_with_fresh(course: Course, log: JsonLog, progress: Progress = no_progress) -> Row:
    """Read the last tenth with a fresh stream, started one window earlier; log the result.

    A comparison that has already been logged is not repeated.
    """
    rows = segments(log)
    tenth = rows[-max(1, len(rows) // 10) :]
    start, stop = tenth[0]["tokens"] - course.segment, tenth[-1]["tokens"]
    for fresh in (row["fresh"] for row in log.rows if "fresh" in row):
        if (fresh["from"], fresh["to"]) == (start, stop):
            return fresh
    begin = max(0, start - course.sinks - course.window)
    ids = course.text.around(begin, stop + 1)
    nll = losses_of(course.new_stream(), ids, course.chunk, progress)
    fresh = {
        "from": start,
        "to": stop,
        "perplexity": perplexity(nll[start - begin :]),
        "stream_perplexity": mean_perplexity(tenth),
    }
    log.append({"fresh": fresh})
    return fresh


def mean_perplexity(rows: Sequence[Row]) -> float:
    """Return the overall perplexity of segments of equal length."""
    return perplexity([row["nll"] for row in rows])


def in_tenths(rows: Sequence[Row]) -> list[Row]:
    """Return up to ten rows that summarize a log, each with the figures of its last segment."""
    count = min(10, len(rows))
    bounds = [index * len(rows) // count for index in range(count + 1)]
    parts = [rows[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [
        {
            **part[-1],
            "perplexity": mean_perplexity(part),
            "tokens_per_second": len(part) / sum(1 / row["tokens_per_second"] for row in part),
        }
        for part in parts
    ]


def memory_line(rows: Sequence[Row]) -> str:
    """Return a line with the active memory after each segment, as one value or a range."""
    active = [row["active_bytes"] for row in rows]
    if len(set(active)) == 1:
        return f"active memory: {active[0]:,} bytes after every segment"
    return f"active memory: from {min(active):,} to {max(active):,} bytes"
