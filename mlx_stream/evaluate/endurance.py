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

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.errors import SnapshotError, TextError, ValueRefused
from mlx_stream.evaluate.corpus import Corpus
from mlx_stream.evaluate.jsonl import JsonLog
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
        for option, number in (("--segment", self.segment), ("--chunk", self.chunk)):
            if number < 1:
                raise ValueRefused(f"{option} must be at least 1, not {number}")
        if not 0 <= self.save_every < math.inf:
            raise ValueRefused(f"--save-every must be 0 or more seconds, not {self.save_every}")
        self.text.require(self.segment, "--segment")

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
    """A stream on its way, and the losses and seconds of the segment it is in."""

    stream: TokenStream
    nll: list[float] = field(default_factory=list)
    seconds: float = 0.0


def state_path(log: Path) -> Path:
    """Return where the state of a log's stream is saved: beside it."""
    return Path(f"{log}.state")


def segments(log: JsonLog) -> list[Row]:
    return [row for row in log.rows if "segment" in row]


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
        ValueRefused: fewer than one token, or another file where the state goes.
        TextError, SnapshotError: log or state cannot be written; what was logged is kept.
    """
    if tokens < 1:
        raise ValueRefused(f"--tokens must be at least 1, not {tokens}")
    state = state_path(log.path)
    if state.exists() and not snapshot.is_snapshot(state):
        raise ValueRefused(f"{state}: the state goes there: move this file, or use another --log")
    target = math.ceil(tokens / course.segment) * course.segment
    if len(segments(log)) * course.segment >= target:
        return True
    reading = resume_state(course, log, notify)
    begun, saved = reading.stream.length, time.monotonic()
    if begun:
        notify(f"{log.path}: continuing from token {begun:,}")
    try:
        if len(reading.nll) == course.segment:
            end_segment(course, reading, log, notify)  # the disk was full for its line
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
        # The log's disk is full. If there is still room for the state, nothing is read twice.
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
        for losses in losses_of(stream, course.text.around(start, stop + 1), course.chunk):
            reading.nll.extend(losses)
        reading.seconds += time.perf_counter() - begun
        yield stop - start == left


def end_segment(course: Course, reading: EnduranceState, log: JsonLog, notify: Notify) -> None:
    """Log the segment that has just ended, or compare it with the line that is there already."""
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
    elif row["nll"] != done[row["segment"]]["nll"]:
        notify(
            f"segment {row['segment']} gives other bits than are logged: another machine, or "
            "another version of MLX"
        )
    reading.nll, reading.seconds = [], 0.0


def save_state(reading: EnduranceState, log: JsonLog) -> None:
    key = log.header["key"]
    about = {"key": key, "nll": reading.nll, "seconds": reading.seconds}
    snapshot.save_snapshot(state_path(log.path), reading.stream, key["model"], about)


def resume_state(course: Course, log: JsonLog, notify: Notify) -> EnduranceState:
    """Return the stream as it was saved, or from the beginning if there is no state to use."""
    stream = TokenStream(course.model, course.model.new_cache(course.sinks, course.window))
    path, logged = state_path(log.path), len(segments(log))
    if not logged and not path.exists():
        return EnduranceState(stream)
    try:
        found = snapshot.load_snapshot(path)
        if found.about["key"] != log.header["key"]:
            raise SnapshotError(f"{path}: is the state of another log")
        nll, length = found.about["nll"], found.state["length"]
        assert isinstance(length, int)
        if not 0 <= length - len(nll) <= logged * course.segment:
            raise SnapshotError(f"{path}: does not fit the log, which has {logged} segments")
        stream.restore(found.state)
        return EnduranceState(stream, nll, found.about["seconds"])
    except (SnapshotError, ValueRefused, KeyError) as error:
        notify(f"{error}; reading {logged * course.segment:,} logged tokens again")
        return EnduranceState(stream)  # a state that is refused changes nothing


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
        if FRESH in line and (line[FRESH]["from"], line[FRESH]["to"]) == (start, stop):
            return line[FRESH]
    begin = max(0, start - course.sinks - course.window)
    ids = course.text.around(begin, stop + 1)
    stream = TokenStream(course.model, course.model.new_cache(course.sinks, course.window))
    nll: list[float] = []
    for losses in losses_of(stream, ids, course.chunk):
        nll.extend(losses)
        progress(len(nll), len(ids) - 1)
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
    """Return up to ten rows that sum up a log, each with the figures of its last segment."""
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
    """Return what the active memory after each segment was, equal to the byte or not."""
    active = [row["active_bytes"] for row in rows]
    if len(set(active)) == 1:
        return f"active memory: {active[0]:,} bytes after every segment"
    return f"active memory: from {min(active):,} to {max(active):,} bytes"
