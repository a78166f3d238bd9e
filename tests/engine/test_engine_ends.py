"""Every wait ends, either with the result or with the reason why there will be none."""

import asyncio
import threading
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

import mlx_stream
from mlx_stream import errors
from mlx_stream.engine.model_host import ModelHost
from tests.fakes.engines import DEADLINE, GREEDY, LONG, engine_of, eventually, said, together

CLOSED = "closed before the work was done"


@pytest.fixture
def engine(letters):
    with engine_of(letters) as engine:
        engine.wait(DEADLINE)
        yield engine
    assert engine.close(DEADLINE)


@contextmanager
def held_up(engine):
    """Block the engine's thread within the `with` block."""
    begun, gate = threading.Event(), threading.Event()

    def hold(_):
        begun.set()
        assert gate.wait(DEADLINE)

    with engine.session() as chat:
        chat._future(hold)
        assert begun.wait(DEADLINE)
        try:
            yield
        finally:
            gate.set()


@pytest.mark.parametrize("asked", ["wait", "flush", "save"])
def test_calls_that_wait_for_a_closed_listener_are_refused(engine, tmp_path, asked):
    path, refused = tmp_path / "stream.safetensors", []

    def ask():
        with pytest.raises(errors.EngineClosed, match=CLOSED):
            if asked == "save":
                listener.save(path, {}, timeout=DEADLINE)
            else:
                getattr(listener, asked)(DEADLINE)
        refused.append(asked)

    waiting = threading.Thread(target=ask, daemon=True)
    with held_up(engine):
        listener = engine.listen(window=300)
        listener.feed(LONG)
        waiting.start()
        eventually(lambda: len(listener._queue.tasks) == (1 if asked == "wait" else 2))
        listener.close()
    waiting.join(DEADLINE)
    assert refused and not path.exists()


def test_calls_that_wait_for_a_closed_or_forgotten_session_are_refused(engine):
    with held_up(engine):
        chat = engine.session(sampling=GREEDY)
        gone = chat.undo()
        chat.close()
        forgotten = engine.session().clear()  # nothing refers to the session
    for ask in (chat.wait, gone.result, forgotten.result):
        with pytest.raises(errors.EngineClosed, match=CLOSED):
            ask(DEADLINE)

    async def taken_back():
        with held_up(engine), engine.session() as other:
            future = asyncio.wrap_future(other.undo())
        await asyncio.wait_for(future, DEADLINE)

    with pytest.raises(errors.EngineClosed, match=CLOSED):
        asyncio.run(taken_back())


@pytest.mark.parametrize("kind", ["session", "listener"])
def test_a_reader_learns_that_another_thread_closed_the_reply(engine, kind):
    if kind == "session":
        closed = engine.session(sampling=GREEDY, max_tokens=100_000)
        replies = closed.reply("Hi"), closed.areply("Hi")
    else:
        closed = engine.listen(sampling=GREEDY, max_tokens=100_000)
        replies = closed.ask("Hi", remember=False), closed.aask("Hi", remember=False)
    closed.wait(DEADLINE)
    begun, read = threading.Event(), []

    def reading():
        with pytest.raises(errors.EngineClosed, match=CLOSED):
            for piece in replies[0]:
                read.append(piece)
                begun.set()

    def closing():
        assert begun.wait(DEADLINE)
        closed.close()

    together(reading, closing)
    assert read
    with pytest.raises(errors.EngineClosed):
        asyncio.run(asyncio.wait_for(anext(replies[1]), DEADLINE))


def test_closing_a_reply_raises_nothing_in_its_reader(engine):
    chat = engine.session(sampling=GREEDY)
    pieces = chat.reply("Hi", max_tokens=100_000)
    next(pieces)
    with engine._worker.lock:  # both happen before the next step
        chat._ask(lambda: chat._session_worker.perform(lambda _: None))
        chat.close()
    assert said(pieces) == ""
    chat = engine.session(sampling=GREEDY)
    pieces = chat.reply("Hi", max_tokens=100_000)
    next(pieces)
    chat.close()
    pieces.close()
    chat.close(DEADLINE)
    assert chat.stats.notices == [] and engine.memory[0] == engine._host.budget.weights
    eventually(lambda: not engine._worker.queues)


def test_a_closed_session_says_so_before_a_model_that_is_not_there(tmp_path):
    with mlx_stream.Engine(tmp_path / "none") as engine:
        with pytest.raises(errors.SourceError):
            engine.wait(DEADLINE)
        with engine._worker.lock:
            chat = engine.session()
            chat.close()
        with pytest.raises(errors.EngineClosed, match=CLOSED):
            chat.wait(DEADLINE)


@contextmanager
def waiting_for_room(listener, error, match=None):
    """Feed a full backlog from another thread; check that it is refused with an error."""
    refused = []

    def feed():
        with pytest.raises(error, match=match):
            listener.feed("y" * 20, timeout=10 * DEADLINE)
        refused.append(True)

    listener.feed("x " * 10)
    feeding = threading.Thread(target=feed, daemon=True)
    feeding.start()
    feeding.join(0.1)  # by now it is most likely waiting
    yield
    feeding.join(DEADLINE / 2)  # before the blocking task would end by itself
    assert refused


@pytest.mark.parametrize(
    ("wrong", "error"), [("source", errors.SourceError), ("window", errors.ValueRefused)]
)
def test_a_feeder_that_waits_for_room_learns_that_opening_failed(
    letters, tmp_path, monkeypatch, wrong, error
):
    gate, load = threading.Event(), ModelHost.load

    def late(host):
        assert gate.wait(DEADLINE)
        load(host)

    monkeypatch.setattr(ModelHost, "load", late)
    folder = tmp_path / "none" if wrong == "source" else letters
    with engine_of(folder) as engine:
        listener = engine.listen(backlog=20, window=10**7)
        with waiting_for_room(listener, error):
            gate.set()
        assert isinstance(listener.error, error)


def test_a_feeder_that_waits_for_room_learns_of_a_failed_step(engine, monkeypatch):
    def broken(*_):
        raise RuntimeError("[metal] the device was lost")

    listener = engine.listen(backlog=20)
    listener.wait(DEADLINE)
    with ExitStack() as held:
        held.enter_context(held_up(engine))
        tokens = listener._listener_worker.stream.tokens
        monkeypatch.setattr(tokens, "network", SimpleNamespace(prefill=broken))
        with waiting_for_room(listener, errors.ComputeError, "the device was lost"):
            held.close()


@pytest.mark.parametrize("closed", ["listener", "engine"])
def test_a_feeder_that_waits_for_room_learns_of_a_close_at_once(engine, closed):
    with held_up(engine):
        listener = engine.listen(backlog=20)
        with waiting_for_room(listener, errors.EngineClosed, "closed"):
            listener.close() if closed == "listener" else engine.close(0)


def test_a_future_s_callback_may_not_wait_for_the_engine(engine):
    chat, other = (engine.session(sampling=GREEDY, max_tokens=3) for _ in range(2))
    listener = engine.listen(backlog=20)
    for one in (chat, other, listener):
        one.wait(DEADLINE)
    said(chat.reply("Hi"))

    async def read_in_asyncio():
        return [piece async for piece in chat.areply("Hi")]

    asks = {
        "reply": lambda: said(chat.reply("Hi")),
        "asyncio": lambda: asyncio.run(asyncio.wait_for(read_in_asyncio(), DEADLINE)),
        "session": lambda: engine.session().wait(),
        "flush": listener.flush,
        "feed": lambda: [listener.feed("x" * 15, timeout=DEADLINE) for _ in range(2)],
        "close": lambda: other.close(DEADLINE),
    }
    refused = {}

    def call_back(_):
        for name, ask in asks.items():
            try:
                ask()
            except errors.ValueRefused as error:
                refused[name] = str(error)
        listener.wait()  # waiting for what is already done returns immediately
        engine.wait()
        called.set()

    called = threading.Event()
    with held_up(engine):  # otherwise the callback runs on this thread
        chat.undo().add_done_callback(call_back)
    assert called.wait(DEADLINE / 2)
    assert refused.keys() == asks.keys()
    assert all("another thread" in line for line in refused.values())
    assert len(said(chat.reply("Hi"))) == 3


def test_cancelling_an_undo_before_its_turn_keeps_the_exchange(engine):
    chat, closed = (engine.session(sampling=GREEDY, max_tokens=3) for _ in range(2))
    said(chat.reply("Hi"))
    with held_up(engine):
        futures = [chat.undo(), chat.clear(), closed.undo()]
        assert all(future.cancel() for future in futures)
        closed.close()
    assert not wait(futures, DEADLINE).not_done
    said(chat.reply("Still there?"))
    assert [exchange.question for exchange in chat.exchanges] == ["Hi", "Still there?"]
    done = chat.undo()
    assert done.result(DEADLINE).question == "Still there?" and not done.cancel()


def test_an_engine_closed_before_it_loads_has_no_error(engine, letters):
    with held_up(engine):
        engine.close(0)
        other = engine_of(letters)  # it loads once the first engine has ended
        other.close(0)
    with pytest.raises(errors.EngineClosed, match=CLOSED):
        other.wait(DEADLINE)
    assert other.error is None and not other.ready


def test_a_limit_that_is_not_a_whole_number_is_refused(engine):
    chat = engine.session(sampling=GREEDY)
    for wrong in (1.5, "9", 2.0, b""):
        for ask in (chat.reply, chat.areply, chat.edit, engine.listen().ask):
            with pytest.raises(errors.ValueRefused, match="whole number"):
                ask("Hi", max_tokens=wrong)
        for ask in (chat.retry, chat.aretry, engine.listen, engine.session):
            with pytest.raises(errors.ValueRefused, match="whole number"):
                ask(max_tokens=wrong).wait(DEADLINE)
