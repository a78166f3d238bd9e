"""The one thread that touches MLX: sessions share its steps, or take turns. Independent of models.

Unless a comment says that a method runs on the thread, any thread may call it, and it holds the
lock only briefly.
"""

import atexit
import copy
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from mlx_stream.engine.scheduler import Scheduler
from mlx_stream.engine.task import AHEAD, Task, Work, as_engine_error, reraise
from mlx_stream.errors import EngineClosed, EngineOpen, MlxStreamError, QueueFull, ValueRefused
from mlx_stream.generate.requests import ReadRequest, ReadResult
from mlx_stream.generate.stats import Stats

SECONDS_AT_EXIT = 10.0


class StreamOwner(Protocol):
    """A session's or listener's stream. Everything but `waiting` runs on the thread.

    Attributes:
        evicted: how many exchanges and tokens have been evicted but not yet reported; guarded by
            the lock.
        shared: whether its reads may share a step with those of other streams.
    """

    evicted: tuple[int, int]
    shared: bool

    @property
    def usable(self) -> bool:
        """Whether the stream is open, and no failed step has left it in an unknown state."""
        ...

    def open(self) -> Work:
        """Return the coroutine that opens the stream."""
        ...

    def update(self, task_ended: bool) -> Stats | None:
        """Return the current statistics after a step, or None if there is no stream."""
        ...

    def waiting(self) -> bool:
        """Return whether there is background work; called under the lock."""
        ...

    def step(self) -> None:
        """Do one step of background work."""
        ...

    def close(self) -> None:
        """Release the stream; a second call does nothing."""
        ...


class SessionQueue:
    """The tasks of one session, run one at a time and in order.

    Attributes:
        published: a copy of the statistics after the last step. It is replaced, never changed, so
            any thread may read it.
        failure: why the session can no longer be used.
        error: the error raised while closing the session, if any.
    """

    def __init__(self, worker: "Worker", owner: StreamOwner):
        self.worker, self.owner = worker, owner
        self.tasks: deque[Task] = deque()
        self.published = Stats()
        self.closing = self.closed = False
        self.failure: MlxStreamError | None = None
        self.error: MlxStreamError | None = None

    def ready(self) -> bool:
        """Return whether there is a step to do; called under the lock."""
        if self.closing:
            return True
        return self.tasks[0].runnable() if self.tasks else self.owner.waiting()

    def close(self) -> None:
        """Stop the session's tasks and close it; returns immediately."""
        with self.worker.lock:
            self.closing = True
            self.worker.lock.notify_all()

    def wait_closed(self, timeout: float) -> None:
        """Wait until the session is closed; raise any error from closing it."""
        with self.worker.lock:
            self.worker.wait_for(lambda: self.closed, timeout)
            if self.error:
                raise reraise(self.error)

    # --- on the thread ---

    def step(self) -> None:
        """Run the session up to its next `request`, or do other work."""
        with self.worker.lock:
            task = next(iter(self.tasks), None)
        if self.closing:
            self.end(EngineClosed("this session or listener was closed before the work was done"))
        elif task:
            if task.request is None or task.cancelled:
                self._advance(task)
        else:
            try:
                self.owner.step()
                self.after(None)
            except Exception as error:  # raised by the next use of the session
                self._fail(as_engine_error(error))

    @property
    def request(self) -> ReadRequest | None:
        """The read that the session is waiting for."""
        return self.tasks[0].request if self.tasks else None

    def take_request(self) -> ReadRequest:
        """Return the read that the session is waiting for, and drop it: it keeps a stream alive."""
        request, self.tasks[0].request = self.tasks[0].request, None
        assert request
        return request

    def give(self, result: ReadResult | Exception) -> None:
        """Continue with the result, or the error, of the read that was taken."""
        self._advance(self.tasks[0], result)

    def _advance(self, task: Task, result: ReadResult | Exception | None = None) -> None:
        failure = self.worker.error or self.failure
        task.abandon(reraise(failure)) if failure else task.step(result)
        with self.worker.lock:
            if task.done:
                self.tasks.popleft()

    def after(self, task: Task | None) -> None:
        """Publish the statistics after a step; `task` is the one that has just ended, if any."""
        if task and task.error and not (self.failure or self.owner.usable):
            self._fail(task.error)
        stats = self.owner.update(task is not None)
        if stats is None:
            return
        if task and task.cancelled and task.error:  # nothing else would report it
            stats.add_notices(str(task.error))
        self.published = copy.copy(stats)

    def _fail(self, error: MlxStreamError) -> None:
        """Release a stream that can no longer be used, and wake threads waiting for room."""
        with self.worker.lock:
            self.failure = error
            self.worker.lock.notify_all()
        self.owner.close()

    def end(self, error: MlxStreamError) -> None:
        """End every task with `error`, and close."""
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
            self.worker.lock.notify_all()


class Worker:
    """The thread, and the queues that take turns on it.

    Args:
        prepare: runs first on the thread; if it fails, every task raises its error.
        leave: runs last on the thread.
        queue_size: how many tasks may be waiting or in progress.

    Attributes:
        lock: guards everything that threads share; notified of every change.
        loading: the task of `prepare`.
        ended: whether the thread has ended, or does not exist in this process after a fork.
        round_started: when the round in progress began, by `time.monotonic`; None between rounds.
    """

    def __init__(self, prepare: Callable[[], None], leave: Callable[[], None], queue_size: int):
        # Reentrant: a finalizer may cancel a task on a thread that holds the lock.
        self.lock = threading.Condition(threading.RLock())
        self.closing = self.ended = False
        self.queues: list[SessionQueue] = []
        self.queue_size, self._leave, self._scheduler = queue_size, leave, Scheduler()
        self.round_started: float | None = None
        self._pings: deque[Future[None]] = deque()
        self.loading = Task(self.lock, lambda: as_coroutine(prepare), lambda _: None)
        self._process = os.getpid()
        self._before = claim(self)
        self._thread = threading.Thread(target=self._run, name="mlx_stream", daemon=True)
        self._thread.start()

    @property
    def error(self) -> MlxStreamError | None:
        """Why `prepare` failed, unless the engine was closed first."""
        return None if isinstance(self.loading.error, EngineClosed) else self.loading.error

    # --- tasks ---

    def open(self, owner: StreamOwner) -> tuple[SessionQueue, Task]:
        """Return a new session's queue and the task that opens the session.

        Raises:
            QueueFull, EngineClosed: see `submit`.
        """
        queue = SessionQueue(self, owner)
        with self.lock:
            opening = self.submit(queue, owner.open, None)
            self.queues.append(queue)
        return queue, opening

    def submit(
        self, queue: SessionQueue, begin: Callable[[], Work], ahead: int | None = AHEAD
    ) -> Task:
        """Add a task to a queue; see `Task`.

        Raises:
            QueueFull: too many tasks are waiting or in progress.
            EngineClosed: the engine or the queue is closed.
        """
        task = Task(self.lock, begin, queue.after, ahead)
        with self.lock:
            self.check(queue)
            count = sum(len(queue.tasks) for queue in self.queues)
            if count >= self.queue_size:
                raise QueueFull(
                    f"{count:,} commands are waiting or in progress, and the queue holds "
                    f"{self.queue_size:,}: try again later, or give the engine a larger queue_size"
                )
            queue.tasks.append(task)
            self.lock.notify_all()
        return task

    def take(self, task: Task) -> Any:
        """Wait for a task's next item and return it; None after the last one.

        Raises:
            ValueRefused: called on the engine's thread.
            EngineClosed: the process was forked.
            MlxStreamError: the task failed.
        """
        with self.lock:
            self.wait_for(lambda: task.items or task.done)
            return self.take_now(task)

    def take_now(self, task: Task) -> Any:
        """Return a task's next item; None if there is none yet, or after the last one."""
        with self.lock:
            if task.items:
                self.lock.notify_all()
                return task.items.popleft()
            self._check_task(task)
            return None

    def outcome(self, task: Task, timeout: float | None = None) -> Any:
        """Wait for a task to end and return its result.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds.
            ValueRefused, EngineClosed, MlxStreamError: as for `take`.
        """
        with self.lock:
            if not self.wait_for(lambda: task.done, timeout):
                raise TimeoutError(f"the request did not finish in {timeout} seconds")
            self._check_task(task)
        return task.future.result()

    def _check_task(self, task: Task) -> None:
        """Raise the error of a task that has failed, or that will never end."""
        if task.error and task.done:
            raise reraise(task.error)
        if self.ended and not task.done:
            self.check()

    def busy(self) -> bool:
        """Return whether there are tasks, apart from background work."""
        with self.lock:
            return any(queue.tasks for queue in self.queues)

    def ping(self) -> Future[None]:
        """Return a future that is done when the thread begins its next round.

        Raises:
            EngineClosed: the engine is closed.
        """
        found: Future[None] = Future()
        with self.lock:
            self.check()
            self._pings.append(found)
            self.lock.notify_all()
        return found

    # --- waiting and closing ---

    def wait_for(self, holds: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait, under the lock, until `holds()` is true or the thread ends.

        Return whether either happened.

        Raises:
            ValueRefused: called on the engine's thread, where it would wait forever.
        """
        if holds() or self.ended:
            return True
        if timeout is None or timeout > 0:
            self.check_elsewhere()
        return bool(self.lock.wait_for(lambda: holds() or self.ended, timeout))

    def check_elsewhere(self) -> None:
        """Raise `ValueRefused` if called on the engine's thread."""
        if threading.current_thread() is self._thread:
            raise ValueRefused(
                "a future's callback runs on the engine's thread and must not wait for the engine: "
                "wait on another thread"
            )

    def check(self, queue: SessionQueue | None = None) -> None:
        """Raise `EngineClosed` if the engine, or a queue, no longer accepts tasks."""
        if os.getpid() != self._process:
            raise EngineClosed(
                "an engine does not survive a fork: create it in the new process, or use the "
                "spawn start method"
            )
        if self.closing or self.ended:
            raise EngineClosed("the engine is closed: create a new one")
        if queue and queue.closing:
            raise EngineClosed("this session or listener is closed: start a new one")

    def end(self) -> None:
        """Tell the thread to end; returns immediately."""
        with self.lock:
            self.closing = True
            self.lock.notify_all()

    def join(self, timeout: float | None) -> bool:
        """Wait for the thread to end; return whether it has."""
        if os.getpid() == self._process and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return self.ended

    # --- on the thread ---

    def _run(self) -> None:
        try:
            for other in self._before:
                other.join(None)
            if not self.closing:
                self.loading.step()
            while (queues := self._round()) is not None:
                self.round_started = time.monotonic()
                self._run_round(queues)
                self.round_started = None
        finally:
            self._finish()

    def _run_round(self, queues: Sequence[SessionQueue]) -> None:
        while self._pings:
            ping = self._pings.popleft()
            if ping.set_running_or_notify_cancel():
                ping.set_result(None)
        for queue in queues:
            if not self.closing:
                queue.step()
        for step in self._schedule(queues):
            if not self.closing:
                requests = [queue.take_request() for queue in step]
                results = self._scheduler.run(requests, measure=step[0].owner.shared)
                del requests  # they keep streams alive
                for queue, result in zip(step, results, strict=True):
                    queue.give(result)

    def _schedule(self, queues: Sequence[SessionQueue]) -> list[list[SessionQueue]]:
        """Return the queues whose reads make up each step of a round."""
        waiting = [queue for queue in queues if queue.request]
        alone = [[queue] for queue in waiting if not queue.owner.shared]
        shared = [queue for queue in waiting if queue.owner.shared]
        steps = self._scheduler.schedule([queue.request for queue in shared if queue.request])
        return [*alone, *([shared[at] for at in step] for step in steps)]

    def _round(self) -> list[SessionQueue] | None:
        """Wait for queues that have a step to do, or for a ping; None when closing."""
        with self.lock:
            while not self.closing:
                queues = [queue for queue in self.queues if queue.ready()]
                if queues or self._pings:
                    return queues
                self.lock.wait()
        return None

    def _finish(self) -> None:
        """Close every session, and wake every waiting thread."""
        with self.lock:
            self.closing = True
        try:
            closed = EngineClosed("the engine was closed before the work was done")
            if not self.loading.done:
                self.loading.abandon(closed)
            while self.queues:
                self.queues[0].end(closed)
            while self._pings:
                ping = self._pings.popleft()
                if ping.set_running_or_notify_cancel():
                    ping.set_exception(closed)
            self._leave()
        finally:
            with self.lock:
                self.ended = True
                self.lock.notify_all()


def as_coroutine(function: Callable[[], Any]) -> Work:
    """Call a function, as a coroutine."""
    yield from ()
    return function()


# --- one worker per process, and its shutdown ---

_all: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_claims = threading.RLock()


def claim(worker: Worker) -> list[Worker]:
    """Make `worker` the only one to use MLX; return the workers that must end before it starts.

    Raises:
        EngineOpen: another engine is open and not closing.
    """
    with _claims:
        alive = [other for other in _all if not other.ended and other._process == os.getpid()]
        if any(not other.closing for other in alive):
            raise EngineOpen(
                "an engine is open in this process, and MLX must stay on its thread: close the "
                "engine first"
            )
        _all.add(worker)
        return alive


def acquire_all() -> None:
    """Take every lock before a fork: a lock that another thread holds stays locked in the child."""
    for worker in [*_all]:
        worker.lock.acquire()


def release_all() -> None:
    for worker in [*_all]:
        worker.lock.release()


def release_in_child() -> None:
    """Mark every worker as ended: its thread does not exist in this process."""
    for worker in [*_all]:
        worker.closing = worker.ended = True
    release_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=acquire_all, after_in_parent=release_all, after_in_child=release_in_child
    )


@atexit.register
def end_all() -> None:
    """End every thread before the interpreter exits and unloads MLX."""
    workers = [*_all]
    for worker in workers:
        worker.end()
    until = time.monotonic() + SECONDS_AT_EXIT
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
