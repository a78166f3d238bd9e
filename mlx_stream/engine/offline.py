"""Runs several coroutines to their ends on this thread, in shared steps; knows no sessions."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from mlx_stream.engine.scheduler import Scheduler
from mlx_stream.generate.requests import Coroutine, ReadRequest, ReadResult

T = TypeVar("T")
R = TypeVar("R")


class Running(list[T]):
    """A coroutine that has begun, and the items that it has yielded.

    Attributes:
        request: the read that it waits for; None at its end.
    """

    def __init__(self, coroutine: Coroutine[T, R]):
        super().__init__()
        self.coroutine = coroutine
        self.request: ReadRequest | None = None

    def advance(self, result: ReadResult | None = None) -> None:
        """Run the coroutine until its next read, or to its end."""
        self.request = None
        try:
            while self.request is None:
                item, result = self.coroutine.send(result), None
                if isinstance(item, ReadRequest):
                    self.request = item
                else:
                    self.append(item)
        except StopIteration:
            pass


def run_all(coroutines: Iterable[Coroutine[T, R]], most: int) -> Iterator[tuple[int, list[T]]]:
    """Run coroutines, up to `most` at a time; yield the place and the items of each that has ended.

    An error in one of them, or in a step, ends all of them.
    """
    waiting, scheduler = enumerate(coroutines), Scheduler()
    running: dict[int, Running[T]] = {}
    try:
        while True:
            while len(running) < most and (begun := next(waiting, None)):
                running[begun[0]] = Running(begun[1])
                running[begun[0]].advance()
            if ended := [at for at, one in running.items() if one.request is None]:
                for at in ended:
                    yield at, [*running.pop(at)]
                continue  # others may begin
            if not running:
                return
            places = [*running]
            requests = [one.request for one in running.values() if one.request]
            for step in scheduler.schedule(requests):
                results = scheduler.run([requests[at] for at in step])
                for at, result in zip(step, results, strict=True):
                    if isinstance(result, Exception):
                        raise result
                    running[places[at]].advance(result)
    finally:
        for one in running.values():
            one.coroutine.close()
