"""Sessions that share steps: who shares, what a failed step costs, and that nothing mixes."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import mlx_stream
from mlx_stream import errors
from mlx_stream.generate.requests import Want
from mlx_stream.sampling import Sampling
from tests.fakes.engines import DEADLINE, GREEDY, LONG, engine_of, eventually, said, together
from tests.fakes.failing import failing

OPTIONS: Any = {"window": 200, "max_tokens": 30, "sampling": GREEDY}


@pytest.fixture
def engine(letters):
    with engine_of(letters) as engine:
        engine.wait(DEADLINE)
        # Timing a tiny model on a busy machine shows nothing worth testing.
        engine._worker._scheduler.times.sharing_pays = lambda replies, probe: True
        yield engine
    assert engine.close(DEADLINE)


@contextmanager
def steps_of(engine: mlx_stream.Engine) -> Iterator[list[Any]]:
    """Record the requests of every step: what each wants, and how many ids it may read."""
    scheduler, steps = engine._worker._scheduler, []
    run = scheduler.run

    def recorded(requests: Any, measure: bool = True) -> Any:
        steps.append([(request.want, request.chunk) for request in requests])
        return run(requests, measure)

    scheduler.run = recorded  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        scheduler.run = run  # type: ignore[method-assign]


def at_once(*replies: Any) -> list[str]:
    """Read each reply on its own thread, and return them all."""
    found: dict[int, str] = {}

    def read(at: int) -> None:
        found[at] = said(replies[at])

    together(*(lambda at=at: read(at) for at in range(len(replies))))
    return [found[at] for at in range(len(replies))]


def test_replies_at_once_share_their_steps(engine):
    chats = [engine.session(**OPTIONS) for _ in range(4)]
    for chat in chats:
        chat.wait(DEADLINE)
    with steps_of(engine) as steps:
        replies = at_once(*(chat.reply("Hi") for chat in chats))
    assert [len(reply) for reply in replies] == [30] * 4
    # Not every step is shared: a tiny one ends before each caller asks again.
    assert sum(map(len, steps)) > 1.2 * len(steps) and max(map(len, steps)) == 4


def test_a_session_with_a_seed_shares_nothing_unless_asked(engine):
    seeded = Sampling(temperature=0.8, seed=3)
    options = [
        {"sampling": seeded},
        {"sampling": seeded, "shared": True},
        {"sampling": GREEDY},
        {"sampling": GREEDY, "shared": False},
    ]
    chats = [engine.session(window=200, max_tokens=30, **each) for each in options]
    shared = [chat._session_worker.shared for chat in chats]
    assert shared == [False, True, True, False]
    replies = at_once(*(chat.reply("Hi") for chat in chats))
    assert replies[0] == replies[1] and replies[2] == replies[3]


def test_a_failed_step_costs_only_those_in_it_their_rings(engine):
    two = [engine.session(**OPTIONS) for _ in range(2)]
    apart = engine.session(**OPTIONS, shared=False)
    for chat in (*two, apart):
        said(chat.reply("Hi"))
    rings = [chat._session_worker.chat.tokens for chat in (*two, apart)]
    network = engine._host.model.network
    run = engine._worker._scheduler._run

    def fail_once(requests):
        engine._worker._scheduler._run = run
        with failing(network):
            return run(requests)

    engine._worker._scheduler._run = fail_once
    raised = []

    def ask(chat):
        try:
            said(chat.reply("And?"))
        except errors.ComputeError as error:
            raised.append(error)

    together(*(lambda chat=chat: ask(chat) for chat in (*two, apart)))
    assert len(raised) == 2
    assert [ring.failed for ring in rings] == [True, True, False]
    for chat in (*two, apart):  # two of them read their turns again
        assert len(said(chat.reply("Go on."))) == 30
    assert [e.question for e in two[0].exchanges] == ["Hi", "And?", "Go on."]


def test_a_question_is_read_between_the_tokens_of_others(engine):
    talking = [engine.session(**OPTIONS) for _ in range(3)]
    pieces = [chat.reply("Hi", max_tokens=100_000) for chat in talking]
    stop = threading.Event()

    def read(reply):
        for _ in reply:
            if stop.is_set():
                return

    threads = [threading.Thread(target=read, args=(each,), daemon=True) for each in pieces]
    for thread in threads:
        thread.start()
    late = engine.session(window=400, max_tokens=5, sampling=GREEDY)
    late.wait(DEADLINE)
    with steps_of(engine) as steps:
        said(late.reply(LONG))
    stop.set()
    for thread in threads:
        thread.join(DEADLINE)
    tokens = {Want.TOKEN, Want.ROWS}
    reading = [{want for want, _ in step} for step in steps]
    reading = [wants for wants in reading if wants - tokens]
    assert len(reading) > 3
    assert sum(bool(wants & tokens) for wants in reading) > len(reading) / 2


@pytest.mark.parametrize("seed", range(4))
def test_sessions_that_share_are_cut_anywhere_and_keep_to_themselves(letters, engine, seed):
    """Each one gets the same ids for every reply as it would alone."""
    rng, lives = random.Random(seed), {}

    def live(number):
        own = random.Random(rng.random())
        chat, life = engine.session(**OPTIONS), []
        for turn in range(6):
            question = f"{number} {turn}: {own.choice(('x', 'Go on.', LONG[:300]))}"
            act = own.choice(("reply", "reply", "retry", "edit")) if turn else "reply"
            reply = chat.retry() if act == "retry" else getattr(chat, act)(question)
            cut = own.choice((None, 1, 7))
            for count, _ in enumerate(reply, 1):
                if count == cut:
                    break
            reply.close()
            last = chat._future(lambda chat: chat.exchanges[-1]).result(DEADLINE)
            life.append((act, question, last))
        lives[number] = life

    together(*(lambda number=number: live(number) for number in range(5)))
    model = mlx_stream.load(letters, dtype="float32", keep_quantized=False)
    for life in lives.values():
        alone = mlx_stream.ChatSession(model, **OPTIONS)
        for act, question, last in life:
            reply = alone.retry() if act == "retry" else getattr(alone, act)(question)
            for count, _ in enumerate(reply, 1):
                if last.finish == "interrupted" and count == len(last.reply_ids):
                    break
            reply.close()
            assert alone.exchanges[-1].reply_ids == last.reply_ids
    eventually(lambda: not engine._worker.busy())
