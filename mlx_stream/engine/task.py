"""One thing asked of the engine's thread: a coroutine that is driven there, and what it has given.

The reads it asks for are run, a step each; what else it yields is handed to whoever asked. A task
that is cancelled ends before its next step.
"""

import copy
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from mlx_stream.errors import ComputeError, MlxStreamError
from mlx_stream.generate.requests import Coroutine, ReadRequest

if TYPE_CHECKING:
    from concurrent.futures import Future

# How far a task may be ahead of whoever reads its pieces: one is computed while one is shown.
AHEAD = 1

Work = Coroutine[Any, Any]


class WorkerThread(Protocol):
    """What a task knows of the thread it runs on.

    Attributes:
        lock: guards what both sides look at.
        wake: notified when there may be something to do.
        ended: whether there is no such thread any more: what is not done never will be.
    """

    lock: Any
    wake: threading.Condition
    ended: bool

    def wait_for(
        self, condition: threading.Condition, holds: Callable[[], object], timeout: float | None
    ) -> bool:
        """Wait until something holds or it has ended; under the lock. Refused on the thread."""
        ...

    def check_elsewhere(self) -> None:
        """Raise if this is the thread itself."""
        ...

    def check(self) -> None:
        """Raise `EngineClosed` if it has ended."""
        ...


class Task:
    """One thing asked: what it has given so far, and whether it is wanted.

    Args:
        begin: called on the thread; returns the coroutine.
        publish: called on the thread after each step, with None, and at the end, with the task;
            before whoever asked hears of it, who then sees how things are.
        ahead: how many items may wait to be taken before it pauses; None: any number.
    """

    def __init__(
        self,
        worker: WorkerThread,
        begin: Callable[[], Work],
        publish: "Callable[[Task | None], None]",
        ahead: int | None = AHEAD,
    ):
        self.worker, self.ahead, self._publish = worker, ahead, publish
        self.arrived = threading.Condition(worker.lock)
        self.items: deque[Any] = deque()
        self.cancelled = self.done = False
        self.result: Any = None
        self.error: MlxStreamError | None = None
        self._tell: Callable[[], None] | None = None
        self._begin: Callable[[], Work] | None = begin
        self._work: Work | None = None
        self._request: ReadRequest | None = None  # what the work waits for

    def take(self, timeout: float | None = None) -> Any:
        """Return the next item, None when there will be none; waits for it.

        Raises:
            TimeoutError: it did not come in `timeout` seconds.
            ValueRefused: this is the thread that it would have to come from.
            EngineClosed: it never will come.
            MlxStreamError: what the work raised.
        """
        with self.worker.lock:
            if not self.worker.wait_for(self.arrived, lambda: self.items or self.done, timeout):
                raise TimeoutError(f"nothing came in {timeout} seconds")
            return self.take_now()

    def take_now(self) -> Any:
        """Return the next item, None if there is none now; raises as `take`."""
        with self.worker.lock:
            if self.items:
                self.worker.wake.notify()
                return self.items.popleft()
            self._check()
            return None

    def outcome(self, timeout: float | None = None) -> Any:
        """Wait for the end and return its result; raises as `take`."""
        with self.worker.lock:
            if not self.worker.wait_for(self.arrived, lambda: self.done, timeout):
                raise TimeoutError(f"not done in {timeout} seconds")
            self._check()
            return self.result

    def _check(self) -> None:
        """Raise what keeps more from coming, if that is an error."""
        if self.done and self.error:
            raise reraise(self.error)
        if self.worker.ended and not self.done:
            self.worker.check()

    def on_arrival(self, tell: Callable[[], None]) -> None:
        """Have `tell` called, on the worker's thread, whenever something has come; to wait for it.

        Raises:
            ValueRefused: this is that thread.
        """
        self.worker.check_elsewhere()
        with self.worker.lock:
            self._tell = tell

    def promise(self, future: "Future[Any]") -> None:
        """Have a future hold the outcome; what is called back by it is on the worker's thread."""

        def tell() -> None:
            with self.worker.lock:
                # Once, whoever is first; and not if it was cancelled, which the work knows not of.
                now = self.done and self._tell is tell
                if now:
                    self._tell = None
            if now and future.set_running_or_notify_cancel():
                if self.error:
                    future.set_exception(self.error)
                else:
                    future.set_result(self.result)

        with self.worker.lock:
            self._tell = tell
        tell()

    def cancel(self) -> None:
        """Have it stopped before its next step; nothing more is taken from it."""
        with self.worker.lock:
            self.cancelled = True
            self.items.clear()
            self.worker.wake.notify()

    def runnable(self) -> bool:
        return self.cancelled or self.ahead is None or len(self.items) < self.ahead

    # --- on the worker's thread ---

    def step(self) -> None:
        """Run the read it waits for, and go on to the next one, or until it is far enough ahead."""
        if self.cancelled:
            return self.abandon()
        try:
            self._advance()
        except StopIteration as end:
            self._finish(end.value)
        # The engine outlives it, whatever it is; who asked is told.
        except Exception as error:
            self.abandon(as_engine_error(error))

    def _advance(self) -> None:
        if self._work is None:
            assert self._begin
            self._work = self._begin()
        result = None
        if self._request:  # no other name for it: it keeps a stream
            result, self._request = self._request.stream.run(self._request), None
        while self._request is None and self.runnable():
            item, result = self._work.send(result), None
            self._publish(None)
            if isinstance(item, ReadRequest):
                self._request = item
            else:
                self._give(item)

    def abandon(self, error: MlxStreamError | None = None) -> None:
        """End before the end; `error` is what whoever waits is told."""
        self._request = None
        try:
            if self._work:
                self._work.close()
        except Exception as found:
            error = as_engine_error(found)
        self._finish(error=error)

    def _finish(self, result: Any = None, error: MlxStreamError | None = None) -> None:
        self.result, self.error = result, error
        self._publish(self)
        with self.worker.lock:
            self.done = True
            self._begin = self._work = None  # a session that is forgotten is let go of at once
            self.arrived.notify_all()
        self._tell_waiting()

    def _give(self, item: Any) -> None:
        with self.worker.lock:
            if not self.cancelled:
                self.items.append(item)
                self.arrived.notify_all()
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        if self._tell:  # without the lock: it is not ours
            self._tell()


def reraise(error: MlxStreamError) -> MlxStreamError:
    """Return an error to raise on another thread, maybe not for the first time."""
    found = copy.copy(error)
    found.__cause__ = error
    return found


def as_engine_error(error: Exception) -> MlxStreamError:
    """Return an error as one of ours, without its frames: it is kept, and they hold a ring.

    Errors of MLX come as RuntimeError, late and from anywhere.
    """
    found = error
    if not isinstance(found, MlxStreamError):
        what = " ".join(f"{type(error).__name__}: {error}".split())
        found = ComputeError(f"it could not be computed: {what}")
        found.__cause__ = error
        if error.__traceback__:
            error.add_note("".join(traceback.format_tb(error.__traceback__)))
    each: BaseException | None = error
    while each:
        each.__traceback__, each = None, each.__cause__ or each.__context__
    return found
