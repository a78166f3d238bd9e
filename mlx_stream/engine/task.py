"""A task for the engine's thread: a coroutine that runs there, and its output so far.

The worker runs the reads that the coroutine requests and gives it their results. Everything else it
yields is passed to the caller. A cancelled task ends before its next read.
"""

import copy
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition
from typing import Any

from mlx_stream.errors import ComputeError, MlxStreamError
from mlx_stream.generate.requests import Coroutine, ReadRequest, ReadResult

# How many items may wait for the caller: one is computed while the caller shows the previous one.
AHEAD = 1
# With two, a caller that is slightly late does not miss a step that it could share.
SHARED_AHEAD = 2

Work = Coroutine[Any, Any]


class Task:
    """One coroutine and its outcome.

    Args:
        lock: the worker's lock; notified whenever the task changes.
        begin: called on the engine's thread; returns the coroutine.
        publish: called on the engine's thread with None after each step, and with the task after
            the last one. It runs before the caller is notified, so the caller sees the new state.
        ahead: how many items may wait for the caller before the task pauses; None for no limit.

    Attributes:
        request: the read that the coroutine is waiting for.
        items: what the coroutine has yielded and the caller has not yet taken.
        future: holds the outcome. Cancelling it before the task starts keeps the task from running.
        error: why the task failed; set before the future is.
        superseded: whether it was cancelled in favour of another task.
        done: whether the task has ended. Unlike `future.done()`, it takes no lock, so a finalizer
            that interrupts the future cannot deadlock with a thread that waits while holding
            `lock`.
        tell: called on the engine's thread, without the lock, whenever there is an item or an
            outcome.
    """

    def __init__(
        self,
        lock: Condition,
        begin: Callable[[], Work],
        publish: "Callable[[Task | None], None]",
        ahead: int | None = AHEAD,
    ):
        self.lock, self.ahead, self._publish = lock, ahead, publish
        self.items: deque[Any] = deque()
        self.future: Future[Any] = Future()
        self.error: MlxStreamError | None = None
        self.tell: Callable[[], None] | None = None
        self.cancelled = self.superseded = self.done = False
        self._claimed: bool | None = None
        self._begin: Callable[[], Work] | None = begin
        self._work: Work | None = None
        self.request: ReadRequest | None = None

    def supersede(self) -> None:
        """Cancel the task because another one replaces it; its reader is notified."""
        with self.lock:
            self.superseded = True
            self.cancel()

    def cancel(self) -> None:
        """Stop the task before its next step, and drop its items."""
        with self.lock:
            self.cancelled = True
            self.items.clear()
            self.lock.notify_all()

    def runnable(self) -> bool:
        return self.cancelled or self.ahead is None or len(self.items) < self.ahead

    # --- on the worker's thread ---

    def step(self, result: ReadResult | Exception | None = None) -> None:
        """Run the coroutine until its next read or until it must pause.

        Args:
            result: what the pending read returned or raised.
        """
        # A completed read is always passed to the coroutine, or its ids would be read again.
        if result is None and (self.cancelled or not self._claim()):
            return self.abandon()
        try:
            if isinstance(result, Exception):
                raise result
            self._advance(result)
        except StopIteration as end:
            self._finish(end.value)
        # The engine survives any error in a task; the caller gets the error.
        except Exception as error:
            self.abandon(as_engine_error(error))

    def _claim(self) -> bool:
        """Return whether the outcome is wanted; after this, the future cannot be cancelled."""
        if self._claimed is None:
            self._claimed = self.future.set_running_or_notify_cancel()
        return self._claimed

    def _advance(self, result: ReadResult | None) -> None:
        if self._work is None:
            assert self._begin
            self._work = self._begin()
        while self.request is None and self.runnable():
            item, result = self._work.send(result), None
            self._publish(None)
            if isinstance(item, ReadRequest):
                self.request = item
            else:
                with self.lock:
                    if not self.cancelled:
                        self.items.append(item)
                self._notify()

    def abandon(self, error: MlxStreamError | None = None) -> None:
        """End the task early; the caller gets `error`."""
        self.request = None
        try:
            if self._work:
                self._work.close()
        except Exception as found:
            error = as_engine_error(found)
        self._finish(error=error)

    def _finish(self, result: Any = None, error: MlxStreamError | None = None) -> None:
        self.error = error
        self._publish(self)
        self._begin = self._work = None  # immediately frees the stream of a discarded session
        if self._claim():
            if error:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)
        self.done = True
        self._notify()

    def _notify(self) -> None:
        with self.lock:
            self.lock.notify_all()
        if self.tell:
            self.tell()


def reraise(error: MlxStreamError) -> MlxStreamError:
    """Return a copy of an error to raise on another thread, where it may be raised repeatedly."""
    found = copy.copy(error)
    found.__cause__ = error
    return found


def as_engine_error(error: Exception) -> MlxStreamError:
    """Convert an error to a package error without frames, which would keep a ring alive.

    MLX reports errors as RuntimeError, possibly late and from any call.
    """
    found = error
    if not isinstance(found, MlxStreamError):
        what = " ".join(f"{type(error).__name__}: {error}".split())
        found = ComputeError(f"the computation failed: {what}")
        found.__cause__ = error
        if error.__traceback__:
            error.add_note("".join(traceback.format_tb(error.__traceback__)))
    each: BaseException | None = error
    while each:
        each.__traceback__, each = None, each.__cause__ or each.__context__
    return found
