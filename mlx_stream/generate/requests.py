"""What a reply needs read, as a value, and how a reply is driven; knows no stream.

A reply is a coroutine: it yields a request and is sent the result. It knows no thread and no
scheduler. Alone it is driven by `drive`; an engine drives many.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, TypeVar

import mlx.core as mx

from mlx_stream.sampling import Sampler
from mlx_stream.window import PREFILL_CHUNK

T = TypeVar("T")
R = TypeVar("R")


class Want(Enum):
    """What is wanted back of ids that are read."""

    NOTHING = auto()
    LOGITS = auto()  # (vocabulary,) after the last of them
    ROWS = auto()  # (T, vocabulary), after each: all but the first may be taken back
    TOKEN = auto()  # the next token


class Readable(Protocol):
    """A stream, as a driver sees it."""

    def run(self, request: "ReadRequest") -> "ReadResult":
        """Read a request's ids, or as many of them as one step takes."""
        ...


@dataclass(slots=True)
class ReadRequest:
    """Ids to be read in a step: all of them, or as many of the first as one step takes.

    Attributes:
        chunk: how many at most.
        sampler, more: for `TOKEN`, as of `TokenStream.next`.
    """

    stream: Readable
    ids: Sequence[int]
    want: Want = Want.NOTHING
    chunk: int = PREFILL_CHUNK
    sampler: Sampler | None = None
    more: bool = True


@dataclass(slots=True)
class ReadResult:
    """What a step gave.

    Attributes:
        count: how many of the ids were read. What was wanted is there if it was all of them.
        seconds: what the step took.
    """

    count: int
    seconds: float = 0.0
    logits: mx.array | None = None
    token: int = -1


# A reply: it yields requests, and items of its own, and is sent each request's result.
Coroutine = Generator[ReadRequest | T, ReadResult | None, R]


def read_ids(
    stream: Readable,
    ids: Sequence[int],
    want: Want = Want.NOTHING,
    progress: Callable[[int], None] | None = None,
    chunk: int = PREFILL_CHUNK,
) -> Generator[ReadRequest, ReadResult | None, ReadResult]:
    """Have ids read, at least one, in as many steps as it takes.

    Args:
        progress: called after each step with the number of ids it read.

    Returns:
        What the last step gave, with the count and the seconds of all of them.
    """
    count, seconds = 0, 0.0
    while True:
        result = yield ReadRequest(stream, ids[count:], want, chunk)
        assert result is not None
        count, seconds = count + result.count, seconds + result.seconds
        if progress:
            progress(result.count)
        if count == len(ids):
            return ReadResult(count, seconds, result.logits, result.token)


def drive(reply: Coroutine[T, R]) -> Generator[T, None, R]:
    """Drive one reply: run each step it asks for, and yield what else it gives.

    Closing the generator, or an error in a step, closes the reply.
    """
    result: ReadResult | None = None
    try:
        while True:
            try:
                item = reply.send(result)
            except StopIteration as end:
                return end.value
            result = None
            if isinstance(item, ReadRequest):
                result = item.stream.run(item)
            else:
                yield item
    finally:
        reply.close()


def run_coroutine(reply: Coroutine[T, R]) -> R:
    """Drive a reply to its end, and return what it returns."""
    steps = drive(reply)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
