"""A task drives its coroutine: a read a step, no further ahead than asked, and always to an end."""

import threading

import pytest

from mlx_stream import errors
from mlx_stream.engine.task import Task
from mlx_stream.generate.requests import ReadRequest, ReadResult


class FakeStream:
    """Reads everything at once; a read of nothing fails."""

    def __init__(self):
        self.read: list[list[int]] = []

    def run(self, request):
        self.read.append([*request.ids])
        if not request.ids:
            raise RuntimeError("the device was lost")
        return ReadResult(len(request.ids), token=request.ids[-1] + 1)


class FakeWorker:
    def __init__(self):
        self.lock = threading.RLock()
        self.wake = threading.Condition(self.lock)
        self.ended = False

    def wait_for(self, condition, holds, timeout):
        return bool(holds())

    def check_elsewhere(self):
        pass

    def check(self):
        pass


@pytest.fixture
def stream():
    return FakeStream()


def task_of(coroutine, ahead: int | None = 1):
    published = []
    task = Task(FakeWorker(), coroutine, published.append, ahead)
    return task, published


def counting(stream, log, reads=(1, 2, 3)):
    """Return a coroutine that reads numbers one by one and gives two items after each."""

    def work():
        try:
            for number in reads:
                result = yield ReadRequest(stream, [number] if number else [])
                assert result is not None
                yield result.token
                yield -result.token
            return "done"
        finally:
            log.append("closed")

    return work


def test_a_step_runs_one_read_at_most_and_waits_for_who_takes_what_it_gave(stream):
    log = []
    task, published = task_of(counting(stream, log))
    given = []
    while not task.done:
        before = len(stream.read)
        if task.runnable():
            task.step()
        else:
            given.append(task.take_now())
        assert len(stream.read) <= before + 1 and len(task.items) <= 1
    assert given == [2, -2, 3, -3, 4, -4] and stream.read == [[1], [2], [3]]
    assert task.outcome() == "done" and log == ["closed"] and published[-1] is task


def test_what_a_step_computed_is_given_in_the_same_step(stream):
    task, _ = task_of(counting(stream, []), ahead=None)
    task.step()
    assert not stream.read
    task.step()
    assert stream.read == [[1]] and [*task.items] == [2, -2]


def test_a_cancelled_task_ends_before_its_next_step(stream):
    log = []
    task, published = task_of(counting(stream, log), ahead=None)
    task.step()
    task.cancel()
    assert task.runnable()
    task.step()
    assert task.done and not stream.read and log == ["closed"] and published[-1] is task
    assert task.outcome() is None


@pytest.mark.parametrize("closing", [None, errors.SessionError("the disk is full")])
def test_a_read_that_fails_closes_the_coroutine_and_is_told(stream, closing):
    log = []

    def work():
        try:
            yield from counting(stream, log, (1, 0, 3))()
        finally:
            if closing:
                raise closing

    task, _ = task_of(work, ahead=None)
    while not task.done:
        task.step()
    assert log == ["closed"] and stream.read == [[1], []] and [*task.items] == [2, -2]
    task.items.clear()
    kind = errors.ComputeError if closing is None else errors.SessionError
    with pytest.raises(kind, match="the device was lost" if closing is None else "disk"):
        task.take_now()
