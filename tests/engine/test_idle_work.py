"""Work that a session does while it is idle, and sessions that restore a state."""

import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

import mlx_stream
from mlx_stream.chat.session import ChatSession
from mlx_stream.engine.handle import Session
from mlx_stream.engine.session_worker import ReplyPlan
from mlx_stream.errors import SnapshotError
from tests.fakes.conversations import said
from tests.fakes.engines import DEADLINE, GREEDY, engine_of, eventually


class Work:
    """Work that takes `most` steps and counts them; `end` says how it ended."""

    def __init__(self, most: int):
        self.most, self.steps, self.end = most, 0, ""
        self.threads = set[str]()

    def __call__(self, chat: ChatSession) -> Generator[None, None, None]:
        try:
            while self.steps < self.most:
                self.steps += 1
                self.threads.add(threading.current_thread().name)
                yield
            self.end = "done"
        except GeneratorExit:
            self.end = "dropped"
            raise


@pytest.fixture
def engine(letters: Path) -> Iterator[mlx_stream.Engine]:
    with engine_of(letters) as engine:
        yield engine


def ask(session: Session, question: str) -> None:
    """Ask as the server does."""
    reader = session.begin(ReplyPlan(question), 4, sampling=GREEDY)
    while reader.take() is not None:
        pass


def test_it_is_done_in_steps_on_the_thread(engine: mlx_stream.Engine) -> None:
    session, work = engine.session(window=60), Work(50)
    ask(session, "Hi")
    session.when_idle(work)
    eventually(lambda: work.end == "done")
    assert work.steps == 50 and work.threads == {"mlx_stream"}
    assert said(session.reply("And?", 4))


def test_another_session_replies_meanwhile(engine: mlx_stream.Engine) -> None:
    session, other, work = engine.session(window=60), engine.session(window=60), Work(10**9)
    session.wait()
    session.when_idle(work)
    assert len([*other.reply("Hi", 20)]) > 5
    before = work.steps
    eventually(lambda: work.steps > before)
    work.most = 0
    session.when_idle(Work(1))


def test_the_next_reply_ends_it(engine: mlx_stream.Engine) -> None:
    session, work, later = engine.session(window=60), Work(10**9), Work(10**9)
    ask(session, "Hi")
    session.when_idle(work)
    eventually(lambda: work.steps)
    ask(session, "And?")
    assert work.end == "dropped"
    with engine._worker.lock:  # it has not begun
        session.when_idle(later)
        session.when_idle(None)
    ask(session, "More?")
    assert later.steps == 0


def test_closing_the_session_or_the_engine_finishes_it(letters: Path) -> None:
    with engine_of(letters) as engine:
        first, second = engine.session(window=60), engine.session(window=60)
        works = Work(3_000), Work(3_000)
        for session, work in ((first, works[0]), (second, works[1])):
            session.wait()
            session.when_idle(work)
        first.close(DEADLINE)
        assert works[0].end == "done"
    assert works[1].end == "done" and works[1].steps == 3_000


def test_a_state_that_cannot_be_restored_fails_every_use(engine: mlx_stream.Engine) -> None:
    def refuse(chat: ChatSession) -> None:
        raise SnapshotError("it is damaged")

    engine.wait()
    before = engine.memory
    session = engine.session(window=60, restore=refuse)
    for _ in range(2):
        with pytest.raises(SnapshotError, match="damaged"):
            said(session.reply("Hi"))
    eventually(lambda: engine.memory == before)
    assert said(engine.session(window=60).reply("Hi", 4))
