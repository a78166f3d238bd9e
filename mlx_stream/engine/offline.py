"""Runs coroutines to completion on this thread, in shared steps; independent of sessions."""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from mlx_stream.engine.scheduler import Scheduler
from mlx_stream.errors import MlxStreamError
from mlx_stream.generate.requests import Coroutine, ReadRequest, ReadResult

T = TypeVar("T")


class Running(Generic[T]):
    """A coroutine that has started.

    Attributes:
        items: what it has yielded.
        request: the read that it is waiting for; None once it has ended.
        error: why it ended early.
    """

    def __init__(self, coroutine: Coroutine[T, None]):
        self.coroutine, self.items = coroutine, list[T]()
        self.request: ReadRequest | None = None
        self.error: MlxStreamError | None = None

    def advance(self, result: ReadResult | None = None) -> None:
        """Run the coroutine until its next read or its end."""
        self.request = None
        try:
            while self.request is None:
                item, result = self.coroutine.send(result), None
                if isinstance(item, ReadRequest):
                    self.request = item
                else:
                    self.items.append(item)
        except StopIteration:
            pass
        except MlxStreamError as error:
            self.error = error


def run_all(
    begins: Iterable[Callable[[], Coroutine[T, None]]], most: int
) -> Iterator[tuple[int, list[T] | MlxStreamError]]:
    """Run coroutines, up to `most` at a time.

    An error in a step ends all of them.

    Args:
        begins: functions that each return a coroutine.

    Yields:
        The index of each coroutine that has ended, and its items or its own error.
    """
    waiting, scheduler = enumerate(begins), Scheduler()
    running: dict[int, Running[T]] = {}
    try:
        while True:
            while len(running) < most and (begun := next(waiting, None)):
                running[begun[0]] = Running(begun[1]())
                running[begun[0]].advance()
            if ended := [at for at, one in running.items() if one.request is None]:
                for at in ended:
                    one = running.pop(at)
                    yield at, one.error or one.items
                continue  # others may start
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
