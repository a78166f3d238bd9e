"""The one thread that touches MLX: lanes take turns on it, a step each; knows no model.

A lane is what is asked of one session, done in order. A job is one thing asked: a generator that
runs on the thread, and hands what it yields to whoever asked. Everything else here may be called
from any thread, and holds the lock for no longer than it takes to look at a few lists.
"""

import atexit
import copy
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Protocol

from mlx_stream.errors import ComputeError, EngineClosed, MlxStreamError, QueueFull

if TYPE_CHECKING:
    from concurrent.futures import Future

# What a job may be ahead of whoever reads its pieces: the one computed while one is shown.
AHEAD = 1
SECONDS_AT_EXIT = 10.0

Work = Generator[Any, None, Any]


class Background(Protocol):
    """What a lane does while nothing is asked of it."""

    def waiting(self) -> bool:
        """Return whether there is something to do; asked on any thread, under the lock."""
        ...

    def step(self) -> None:
        """Do a little of it."""
        ...


class Job:
    """One thing asked: what it has given so far, and whether it is wanted.

    Args:
        work: called on the thread, with nothing; None among what it yields is a step that gave
            nothing.
        ahead: how many items may wait to be taken before it pauses; None: any number.
    """

    def __init__(self, owner: "Owner", work: Callable[[], Work], ahead: int | None = AHEAD):
        self.owner, self.ahead = owner, ahead
        self.arrived = threading.Condition(owner.lock)
        self.items: deque[Any] = deque()
        self.cancelled = self.done = False
        self.result: Any = None
        self.error: MlxStreamError | None = None
        self._tell: Callable[[], None] | None = None
        self._begin, self._work = work, None

    def take(self, timeout: float | None = None) -> Any:
        """Return the next item, None when there will be none; waits for it.

        Raises:
            TimeoutError: it did not come in `timeout` seconds.
            MlxStreamError: what the work raised.
        """
        with self.owner.lock:
            if not self.arrived.wait_for(lambda: self.items or self.done, timeout):
                raise TimeoutError(f"nothing came in {timeout} seconds")
            return self.take_now()

    def take_now(self) -> Any:
        """Return the next item, None if there is none now; raises as `take`."""
        with self.owner.lock:
            if self.items:
                self.owner.wake.notify()
                return self.items.popleft()
            if self.error:
                raise again(self.error)
            return None

    def outcome(self, timeout: float | None = None) -> Any:
        """Wait for the end and return its result; raises as `take`."""
        with self.owner.lock:
            if not self.arrived.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"not done in {timeout} seconds")
            if self.error:
                raise again(self.error)
            return self.result

    def on_arrival(self, tell: Callable[[], None]) -> None:
        """Have `tell` called, on the owner's thread, whenever something has come."""
        with self.owner.lock:
            self._tell = tell

    def promise(self, future: "Future[Any]") -> None:
        """Have a future hold the outcome."""

        def tell() -> None:
            with self.owner.lock:
                # Once, whoever is first; and not if it was cancelled, which the work knows not of.
                now = self.done and self._tell is tell
                if now:
                    self._tell = None
            if now and future.set_running_or_notify_cancel():
                if self.error:
                    future.set_exception(self.error)
                else:
                    future.set_result(self.result)

        with self.owner.lock:
            self._tell = tell
        tell()

    def cancel(self) -> None:
        """Have it stopped before its next step; nothing more is taken from it."""
        with self.owner.lock:
            self.cancelled = True
            self.items.clear()
            self.owner.wake.notify()

    def runnable(self) -> bool:
        return self.cancelled or self.ahead is None or len(self.items) < self.ahead

    # --- on the owner's thread ---

    def step(self) -> None:
        """Run to the next item or the end."""
        try:
            if self.cancelled:
                return self.abandon()
            if self.owner.error:
                raise again(self.owner.error)
            if self._work is None:
                self._work = self._begin()
            item = next(self._work)
            if item is not None:
                self._give(item)
        except StopIteration as end:
            self._finish(end.value)
        # The engine outlives it, whatever it is; who asked is told.
        except Exception as error:
            self._finish(error=typed(error))

    def abandon(self, error: MlxStreamError | None = None) -> None:
        """End before the end; `error` is what whoever waits is told."""
        try:
            if self._work:
                self._work.close()
        except Exception as found:
            error = typed(found)
        self._finish(error=error)

    def _finish(self, result: Any = None, error: MlxStreamError | None = None) -> None:
        with self.owner.lock:
            self.done, self.result, self.error = True, result, error
            self._work = None
            self.arrived.notify_all()
        self._told()

    def _give(self, item: Any) -> None:
        with self.owner.lock:
            if not self.cancelled:
                self.items.append(item)
                self.arrived.notify_all()
        self._told()

    def _told(self) -> None:
        if self._tell:  # without the lock: it is not ours
            self._tell()


class Lane:
    """What is asked of one session: jobs in order, one at a time.

    Args:
        after: called on the thread after every step, to say what has changed, with the job that
            was done.
        close: called there when the lane ends, whatever it ends for.
    """

    def __init__(
        self,
        owner: "Owner",
        after: Callable[[Job | None], None],
        close: Callable[[], None],
        background: Background | None = None,
    ):
        self.owner, self.after, self.background = owner, after, background
        self.jobs: deque[Job] = deque()
        self.closing = self.closed = False
        self.error: MlxStreamError | None = None  # of closing
        self._close = close

    def ready(self) -> bool:
        """Return whether there is a step to do; under the lock."""
        if self.jobs:
            return self.jobs[0].runnable()
        return self.closing or bool(self.background and self.background.waiting())

    def step(self) -> None:
        job = next(iter(self.jobs), None)
        if job:
            job.step()
            with self.owner.lock:
                if job.done:
                    self.jobs.popleft()
        elif self.closing:
            return self.end()
        elif self.background:
            self.background.step()
        self.after(job if job and job.done else None)

    def end(self, error: MlxStreamError | None = None) -> None:
        """Stop what was asked, which fails with `error`, and close."""
        while self.jobs:
            self.jobs.popleft().abandon(error)
        try:
            self._close()
        except Exception as found:
            self.error = typed(found)
        with self.owner.lock:
            self.closing = self.closed = True
            if self in self.owner.lanes:
                self.owner.lanes.remove(self)
            self.owner.prepared.notify_all()

    def cancel(self) -> None:
        """Have everything that was asked stopped."""
        for job in [*self.jobs]:
            job.cancel()

    def close(self) -> None:
        """Have the lane end, after what was asked before is stopped; returns at once."""
        with self.owner.lock:
            self.cancel()
            self.closing = True
            self.owner.wake.notify()

    def wait_closed(self, timeout: float | None) -> bool:
        """Wait until it is closed; return whether it is. Raises what closing it raised."""
        with self.owner.lock:
            done = self.owner.prepared.wait_for(lambda: self.closed or self.owner.ended, timeout)
            if self.error:
                raise again(self.error)
            return bool(done)


class Owner:
    """A thread, the lanes that take turns on it, and how it ends.

    Args:
        prepare: called first, on the thread; what it raises is raised by every job.
        leave: called last, on the thread.
        queue_size: jobs that may be asked for and not done.
    """

    def __init__(self, prepare: Callable[[], None], leave: Callable[[], None], queue_size: int):
        # A cancel may come from a finalizer, in the middle of anything the same thread does here.
        self.lock = threading.RLock()
        self.wake = threading.Condition(self.lock)
        self.prepared = threading.Condition(self.lock)
        self.ready = self.closing = self.ended = False
        self.error: MlxStreamError | None = None
        self.lanes: list[Lane] = []
        self.queue_size = queue_size
        self._prepare, self._leave = prepare, leave
        self._process = os.getpid()
        self._before = claim(self)
        self._thread = threading.Thread(target=self._run, name="mlx_stream", daemon=True)
        self._thread.start()

    def add(self, lane: Lane) -> Lane:
        with self.lock:
            self._check()
            self.lanes.append(lane)
        return lane

    def submit(self, lane: Lane, work: Callable[[], Work], ahead: int | None = AHEAD) -> Job:
        """Ask for `work`, after what was asked of the lane before.

        Raises:
            QueueFull: too much was asked for that is not done.
            EngineClosed: the engine or the lane is closed.
        """
        job = Job(self, work, ahead)
        with self.lock:
            self._check()
            if lane.closing:
                raise EngineClosed("this session is closed: begin another one")
            asked = sum(len(lane.jobs) for lane in self.lanes)
            if asked >= self.queue_size:
                raise QueueFull(
                    f"{asked:,} commands are waiting or in progress, and the queue holds "
                    f"{self.queue_size:,}: try again later, or give the engine a larger queue_size"
                )
            lane.jobs.append(job)
            self.wake.notify()
        return job

    def wait(self, timeout: float | None) -> None:
        """Wait until it is prepared.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds.
            MlxStreamError: it cannot be, or it was closed before.
        """
        with self.lock:
            if not self.prepared.wait_for(lambda: self.ready or self.error or self.ended, timeout):
                raise TimeoutError(f"the model is not loaded after {timeout} seconds")
            if self.error:
                raise again(self.error)
            if not self.ready:
                raise EngineClosed("the engine was closed before the model was loaded")

    def end(self) -> None:
        """Have the thread end; returns at once."""
        with self.lock:
            self.closing = True
            self.wake.notify_all()

    def join(self, timeout: float | None) -> bool:
        """Wait for its end; return whether it has come."""
        if os.getpid() == self._process and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return self.ended

    def busy(self, but: Lane) -> bool:
        """Return whether something was asked of another lane than `but`."""
        with self.lock:
            return any(lane.jobs for lane in self.lanes if lane is not but)

    def _check(self) -> None:
        if self.closing or self.ended:
            raise EngineClosed("the engine is closed: make another one")
        if os.getpid() != self._process:
            raise EngineClosed(
                "an engine does not survive a fork: make it in the new process, or start "
                "processes by spawning"
            )

    def _run(self) -> None:
        try:
            for other in self._before:
                other.join(None)
            self._begin()
            while lanes := self._round():
                for lane in lanes:
                    if self.closing:
                        break
                    lane.step()
        finally:
            self._finish()

    def _begin(self) -> None:
        error = None
        try:
            if not self.closing:
                self._prepare()
        # Whatever keeps a model from being loaded is told to everyone who asks.
        except Exception as found:
            error = typed(found)
        with self.lock:
            self.error, self.ready = error, error is None
            self.prepared.notify_all()

    def _round(self) -> list[Lane]:
        """Return the lanes that have a step to do, once there are any; none at the end."""
        with self.lock:
            while not self.closing:
                if lanes := [lane for lane in self.lanes if lane.ready()]:
                    return lanes
                self.wake.wait()
        return []

    def _finish(self) -> None:
        """Stop what is going on and close what is open; whoever waits is told."""
        with self.lock:
            self.closing = True
        try:
            while self.lanes:
                self.lanes[0].end(EngineClosed("the engine was closed before this was done"))
            self._leave()
        finally:
            with self.lock:
                self.ended = True
                self.prepared.notify_all()


def again(error: MlxStreamError) -> MlxStreamError:
    """Return an error to raise on another thread, maybe not for the first time."""
    found = copy.copy(error)
    found.__cause__ = error
    return found


def typed(error: Exception) -> MlxStreamError:
    """Return an error as one of ours: those of MLX come as RuntimeError, late and from anywhere."""
    if isinstance(error, MlxStreamError):
        return error
    what = " ".join(f"{type(error).__name__}: {error}".split())
    found = ComputeError(f"it could not be computed: {what}")
    found.__cause__ = error
    return found


# --- one per process, and its end ---

_all: "weakref.WeakSet[Owner]" = weakref.WeakSet()
_claims = threading.RLock()


def claim(owner: Owner) -> list[Owner]:
    """Make `owner` the one thread of MLX; return those before, whose end it must await.

    Raises:
        EngineClosed: there is one that nobody has asked to end.
    """
    with _claims:
        alive = [other for other in _all if not other.ended and other._process == os.getpid()]
        if any(not other.closing for other in alive):
            raise EngineClosed(
                "an engine is open in this process, and MLX belongs on one thread: close it first"
            )
        _all.add(owner)
        return alive


@atexit.register
def end_all() -> None:
    """Have every thread end before the interpreter does, which would pull MLX from under it."""
    owners = [*_all]
    for owner in owners:
        owner.end()
    until = time.monotonic() + SECONDS_AT_EXIT
    for owner in owners:
        owner.join(max(0.0, until - time.monotonic()))
