"""The requests a reply makes of its driver, and a driver for one reply; independent of streams.

A reply is a coroutine: it yields a request and is sent the result. It knows nothing about threads
or schedulers. `drive` runs a single reply; an engine runs many.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import mlx.core as mx

from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.sampling import Sampler

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


class Want(Enum):
    """What a request to read ids returns."""

    NOTHING = auto()
    LOGITS = auto()  # (vocabulary,), after the last id
    ROWS = auto()  # (T, vocabulary), after each id; all ids but the first may be rolled back
    TOKEN = auto()  # the next token, plus the logits if its sampler has `logprobs`


class Readable(Protocol):
    """A stream as a driver sees it."""

    def run(self, request: "ReadRequest") -> "ReadResult":
        """Read a request's ids, or as many of them as fit in one step."""
        ...

    def plan(self, request: "ReadRequest") -> Any:
        """Plan a request's step, which other streams' requests will share; see `shared_step`."""
        ...


@dataclass(slots=True)
class ReadRequest:
    """Ids to read in one step: all of them, or the first ones that fit.

    Attributes:
        chunk: the maximum number of ids to read in the step.
        sampler, more: for `TOKEN`; see `TokenStream.next`.
        settling: whether no caller is waiting for it; see `chat/settle.py`.
    """

    stream: Readable
    ids: Sequence[int]
    want: Want = Want.NOTHING
    chunk: int = PREFILL_CHUNK
    sampler: Sampler | None = None
    more: bool = True
    settling: bool = False


@dataclass(slots=True)
class ReadResult:
    """The result of a step.

    Attributes:
        count: how many of the ids were read. Logits or a token are set only if all were.
        seconds: how long the step took.
        shared: whether other streams read in the same step.
    """

    count: int
    seconds: float = 0.0
    logits: mx.array | None = None
    token: int = -1
    shared: bool = False


# Yields requests and other items, and is sent the result of each request.
Coroutine = Generator[ReadRequest | T, ReadResult | None, R]


def read_ids(
    stream: Readable,
    ids: Sequence[int],
    want: Want = Want.NOTHING,
    progress: Callable[[int], None] | None = None,
    chunk: int = PREFILL_CHUNK,
    settling: bool = False,
) -> Generator[ReadRequest, ReadResult | None, ReadResult]:
    """Request that one or more ids be read, in as many steps as necessary.

    Args:
        progress: called after each step with the number of ids it read.

    Returns:
        The last step's result, with the total count and seconds of all steps.
    """
    count, seconds = 0, 0.0
    while True:
        result = yield ReadRequest(stream, ids[count:], want, chunk, settling=settling)
        assert result is not None
        count, seconds = count + result.count, seconds + result.seconds
        if progress:
            progress(result.count)
        if count == len(ids):
            return ReadResult(count, seconds, result.logits, result.token)


def drive(reply: Coroutine[T, R]) -> Generator[T, None, R]:
    """Run each step that a reply requests, and yield its other items.

    Closing the generator closes the reply, as does an error in a step.
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


def driven(steps: Callable[P, Coroutine[T, R]]) -> Callable[P, Generator[T, None, R]]:
    """Return a function, named without `_steps`, that drives the coroutine that `steps` returns."""

    @wraps(steps)
    def drive_steps(*args: P.args, **kwargs: P.kwargs) -> Generator[T, None, R]:
        return drive(steps(*args, **kwargs))

    drive_steps.__name__ = steps.__name__.removesuffix("_steps")
    return drive_steps


def run_coroutine(reply: Coroutine[T, R]) -> R:
    """Drive a coroutine to completion and return its result."""
    steps = drive(reply)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
