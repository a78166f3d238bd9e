"""The one thread that touches MLX: sessions take turns on it, a step each; knows no model.

What is not said to run on the thread may be called from any, and holds the lock for no longer than
a look at a few lists takes.
"""

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from mlx_stream.engine.task import AHEAD, Task, Work, as_engine_error, reraise
from mlx_stream.errors import EngineClosed, MlxStreamError, QueueFull, ValueRefused
from mlx_stream.generate.stats import Stats

SECONDS_AT_EXIT = 10.0


class StreamOwner(Protocol):
    """A session or a listener as its queue sees it; runs on the thread, but for `waiting`.

    Attributes:
        published: its statistics after the last step; exchanged whole, so any thread may look.
        evicted: exchanges and tokens that left and were not reported yet; under the lock.
    """

    published: Stats
    evicted: tuple[int, int]

    @property
    def usable(self) -> bool:
        """Whether it is open, and no step has left its stream in an unknown state."""
        ...

    def open(self) -> Work:
        """Return the coroutine that opens it."""
        ...

    def after(self, task: Task | None) -> None:
        """Publish how things are: with a task after its last step, with None after others."""
        ...

    def waiting(self) -> bool:
        """Return whether it has something to do in the background; any thread, under the lock."""
        ...

    def step(self) -> None:
        """Do a little of it."""
        ...

    def close(self) -> None:
        """Let go of the stream; may be called twice."""
        ...


class SessionQueue:
    """What is asked of one session: tasks in order, one at a time.

    Attributes:
        failure: why it cannot be used any more.
        error: what closing it raised.
    """

    def __init__(self, worker: "Worker", owner: StreamOwner):
        self.worker, self.owner = worker, owner
        self.tasks: deque[Task] = deque()
        self.closing = self.closed = False
        self.failure: MlxStreamError | None = None
        self.error: MlxStreamError | None = None

    def ready(self) -> bool:
        """Return whether there is a step to do; under the lock."""
        if self.closing:
            return True
        return self.tasks[0].runnable() if self.tasks else self.owner.waiting()

    def step(self) -> None:
        with self.worker.lock:
            task = next(iter(self.tasks), None)
        if self.closing:
            self.end(EngineClosed("this session or listener was closed before this was done"))
        elif task:
            failure = self.worker.error or self.failure
            task.abandon(reraise(failure)) if failure else task.step()
            with self.worker.lock:
                if task.done:
                    self.tasks.popleft()
        else:
            try:
                self.owner.step()
            except Exception as error:  # who uses it next is told
                self._fail(as_engine_error(error))

    def after(self, task: Task | None) -> None:
        """Publish how things are after a step of a task."""
        if task and task.error and not (self.failure or self.owner.usable):
            self._fail(task.error)
        self.owner.after(task)

    def _fail(self, error: MlxStreamError) -> None:
        """Let go of a stream that cannot be used any more; who waits for room hears of it."""
        with self.worker.lock:
            self.failure = error
            self.worker.changed.notify_all()
        self.owner.close()

    def end(self, error: MlxStreamError) -> None:
        """Stop what was asked, which fails with `error`, and close."""
        while self.tasks:
            task = self.tasks.popleft()
            task.abandon(None if task.cancelled else error)
        try:
            self.owner.close()
        except Exception as found:
            self.error = as_engine_error(found)
        with self.worker.lock:
            self.closing = self.closed = True
            if self in self.worker.queues:
                self.worker.queues.remove(self)
            self.worker.changed.notify_all()

    def close(self) -> None:
        """Make the queue end, which stops what was asked before; returns at once."""
        with self.worker.lock:
            self.closing = True
            self.worker.wake.notify()
            self.worker.changed.notify_all()

    def wait_closed(self, timeout: float | None) -> bool:
        """Wait until it is closed; return whether it is. Raises what closing it raised."""
        worker = self.worker
        with worker.lock:
            done = worker.wait_for(worker.changed, lambda: self.closed, timeout)
            if self.error:
                raise reraise(self.error)
            return done


class Worker:
    """A thread, the queues that take turns on it, and how it ends.

    Args:
        prepare: called first, on the thread; what it raises is raised by every task.
        leave: called last, on the thread.
        queue_size: tasks that may be asked for and not done.
    """

    def __init__(self, prepare: Callable[[], None], leave: Callable[[], None], queue_size: int):
        # A cancel may come from a finalizer, in the middle of anything the same thread does here.
        self.lock = threading.RLock()
        self.wake = threading.Condition(self.lock)
        self.changed = threading.Condition(self.lock)
        self.ready = self.closing = self.ended = False
        self.error: MlxStreamError | None = None
        self.queues: list[SessionQueue] = []
        self.queue_size = queue_size
        self._prepare, self._leave = prepare, leave
        self._process = os.getpid()
        self._before = claim(self)
        self._thread = threading.Thread(target=self._run, name="mlx_stream", daemon=True)
        self._thread.start()

    def open(self, owner: StreamOwner) -> tuple[SessionQueue, Task]:
        """Make a session's queue; return it, and the task that opens the session.

        Raises:
            QueueFull, EngineClosed: as `submit`.
        """
        queue = SessionQueue(self, owner)
        with self.lock:
            opening = self.submit(queue, owner.open, None)
            self.queues.append(queue)
        return queue, opening

    def submit(
        self, queue: SessionQueue, begin: Callable[[], Work], ahead: int | None = AHEAD
    ) -> Task:
        """Ask for a coroutine to be driven, after what was asked of the queue before.

        Raises:
            QueueFull: too much was asked for that is not done.
            EngineClosed: the engine or the queue is closed.
        """
        task = Task(self, begin, queue.after, ahead)
        with self.lock:
            self.check(queue)
            asked = sum(len(queue.tasks) for queue in self.queues)
            if asked >= self.queue_size:
                raise QueueFull(
                    f"{asked:,} commands are waiting or in progress, and the queue holds "
                    f"{self.queue_size:,}: try again later, or give the engine a larger queue_size"
                )
            queue.tasks.append(task)
            self.wake.notify()
        return task

    def wait(self, timeout: float | None) -> None:
        """Wait until it is prepared.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds.
            MlxStreamError: it cannot be, or it was closed before.
        """
        with self.lock:
            if not self.wait_for(self.changed, lambda: self.ready or self.error, timeout):
                raise TimeoutError(f"the model is not loaded after {timeout} seconds")
            if self.error:
                raise reraise(self.error)
            if not self.ready:
                raise EngineClosed("the engine was closed before the model was loaded")

    def wait_for(
        self, condition: threading.Condition, holds: Callable[[], object], timeout: float | None
    ) -> bool:
        """Wait until something holds, or there is no thread any more; return whether that is so.

        Under the lock, which `condition` has too.

        Raises:
            ValueRefused: this is the thread, on which it would be waited for in vain.
        """
        if holds() or self.ended:
            return True
        if timeout is None or timeout > 0:
            self.check_elsewhere()
        return bool(condition.wait_for(lambda: holds() or self.ended, timeout))

    def check_elsewhere(self) -> None:
        """Raise `ValueRefused` on the thread itself."""
        if threading.current_thread() is self._thread:
            raise ValueRefused(
                "what a future calls back runs on the engine's thread, and must not wait there for "
                "the engine: have another thread do that"
            )

    def end(self) -> None:
        """Have the thread end; returns at once."""
        with self.lock:
            self.closing = True
            self.wake.notify_all()
            self.changed.notify_all()

    def join(self, timeout: float | None) -> bool:
        """Wait for its end; return whether it has come."""
        if os.getpid() == self._process and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return self.ended

    def busy(self) -> bool:
        """Return whether there is more to do than what goes on in the background."""
        with self.lock:
            return any(queue.tasks for queue in self.queues)

    def check(self, queue: SessionQueue | None = None) -> None:
        """Raise `EngineClosed` if nothing can be asked, of a queue or at all."""
        if os.getpid() != self._process:
            raise EngineClosed(
                "an engine does not survive a fork: make it in the new process, or start "
                "processes by spawning"
            )
        if self.closing or self.ended:
            raise EngineClosed("the engine is closed: make another one")
        if queue and queue.closing:
            raise EngineClosed("this session or listener is closed: begin another one")

    def _run(self) -> None:
        try:
            for other in self._before:
                other.join(None)
            self._begin()
            while queues := self._round():
                for queue in queues:
                    if self.closing:
                        break
                    queue.step()
        finally:
            self._finish()

    def _begin(self) -> None:
        error = None
        try:
            if not self.closing:
                self._prepare()
        # Whatever keeps a model from being loaded is told to everyone who asks.
        except Exception as found:
            error = as_engine_error(found)
        with self.lock:
            self.error, self.ready = error, error is None
            self.changed.notify_all()

    def _round(self) -> list[SessionQueue]:
        """Return the queues that have a step to do, once there are any; none at the end."""
        with self.lock:
            while not self.closing:
                if queues := [queue for queue in self.queues if queue.ready()]:
                    return queues
                self.wake.wait()
        return []

    def _finish(self) -> None:
        """Stop what is going on and close what is open; whoever waits is told."""
        with self.lock:
            self.closing = True
        try:
            while self.queues:
                self.queues[0].end(EngineClosed("the engine was closed before this was done"))
            self._leave()
        finally:
            with self.lock:
                self.ended = True
                self.changed.notify_all()


# --- one per process, and its end ---

_all: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_claims = threading.RLock()


def claim(worker: Worker) -> list[Worker]:
    """Make `worker` the one thread of MLX; return those before, whose end it must await.

    Raises:
        EngineClosed: there is one that nobody has asked to end.
    """
    with _claims:
        alive = [other for other in _all if not other.ended and other._process == os.getpid()]
        if any(not other.closing for other in alive):
            raise EngineClosed(
                "an engine is open in this process, and MLX belongs on one thread: close it first"
            )
        _all.add(worker)
        return alive


def acquire_all() -> None:
    """Let no other thread hold a lock while this process is forked: nobody would release it."""
    for worker in [*_all]:
        worker.lock.acquire()


def release_all() -> None:
    for worker in [*_all]:
        worker.lock.release()


def release_in_child() -> None:
    """Have what waits for a thread that is not here any more wait no longer."""
    for worker in [*_all]:
        worker.closing = worker.ended = True
    release_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=acquire_all, after_in_parent=release_all, after_in_child=release_in_child
    )


@atexit.register
def end_all() -> None:
    """Have every thread end before the interpreter does, which would pull MLX from under it."""
    workers = [*_all]
    for worker in workers:
        worker.end()
    until = time.monotonic() + SECONDS_AT_EXIT
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
