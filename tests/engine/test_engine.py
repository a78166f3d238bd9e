"""An engine: each session writes what it would alone, stops immediately, fails independently."""

import asyncio
import contextlib
import gc
import threading
import weakref
from itertools import pairwise

import pytest

import mlx_stream
from mlx_stream import errors
from mlx_stream.generate.token_stream import TokenStream
from tests.fakes.engines import DEADLINE, GREEDY, LONG, alone, engine_of, eventually, said, together

QUESTIONS = {0: ("Hello.", LONG, "And?"), 1: ("Hi there", "What?", LONG), 2: (LONG, LONG)}
OPTIONS = {"window": 200, "max_tokens": 40}


@pytest.fixture
def engine(letters):
    with engine_of(letters) as engine:
        yield engine
    assert engine.close(DEADLINE)


def hold(chat, questions):
    """Ask, retry the last question, edit it, and ask another; return what was said."""
    replies = [said(chat.reply(question)) for question in questions]
    return [*replies, said(chat.retry()), said(chat.edit("Two?")), said(chat.reply("Three?"))]


@pytest.mark.parametrize("shared", [False, True])
def test_sessions_at_once_say_what_each_says_alone(letters, engine, shared):
    """They are equal bit for bit unless steps are shared; greedy letters are equal even then."""
    chats = {n: engine.session(sampling=GREEDY, shared=shared, **OPTIONS) for n in QUESTIONS}
    model, found = mlx_stream.load(letters, dtype="float32", keep_quantized=False), {}

    def talk(n):
        found[n] = hold(chats[n], QUESTIONS[n])

    together(*(lambda n=n: talk(n) for n in QUESTIONS))
    for n, questions in QUESTIONS.items():
        slow = mlx_stream.ChatSession(model, sampling=GREEDY, **OPTIONS)  # type: ignore[arg-type]
        assert found[n] == hold(slow, questions)
        assert chats[n].undo().result(DEADLINE) == slow.undo()
        assert chats[n].exchanges == slow.exchanges  # ids and all
        assert chats[n].stats.evicted > 0


def test_replies_take_turns_token_by_token(engine):
    """No session gets a second token before each has had one, even during a long question."""
    order, options = [], {"sampling": GREEDY, "window": 400, "max_tokens": 12, "shared": False}
    chats = {n: engine.session(**options) for n in range(3)}
    for chat in chats.values():
        chat.wait(DEADLINE)
    step, following = TokenStream._read, TokenStream.next
    streams = {id(chat._session_worker.chat.tokens): n for n, chat in chats.items()}

    def read(self, part, prefill=False):
        order.append((streams[id(self)], len(part)))
        return step(self, part, prefill)

    def one(self, *arguments, **options):
        order.append((streams[id(self)], 1))
        return following(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenStream, "_read", read)
        patch.setattr(TokenStream, "next", one)
        # All of them have arrived before the first step of any.
        with engine._worker.lock:
            replies = [chat.reply(LONG if n == 2 else "Hi") for n, chat in chats.items()]
            jobs = [threading.Thread(target=said, args=(r,), daemon=True) for r in replies]
            for job in jobs:
                job.start()
            eventually_asked(engine, 3)
        for job in jobs:
            job.join(DEADLINE)
    reading = [at for at, (n, _) in enumerate(order) if n == 2][:4]
    between = [{n for n, _ in order[a + 1 : b]} for a, b in pairwise(reading)]
    # While the third reads its question, in chunks, the others answer.
    assert len(between) == 3 and all(order[at][1] > 1 for at in reading[:3])
    assert all(len(order[a + 1 : b]) <= 2 for a, b in pairwise(reading))
    assert any(between)


def eventually_asked(engine, count):
    """Let other threads, which need the lock held here, submit until there are `count` tasks."""
    wait = threading.Condition(engine._worker.lock)
    for _ in range(10_000):
        if sum(len(queue.tasks) for queue in engine._worker.queues) == count:
            return
        wait.wait(0.001)
    raise AssertionError("no tasks came")


def test_a_reply_in_asyncio_is_the_same_and_does_not_block_the_loop(letters, engine):
    chat, other = (engine.session(sampling=GREEDY, **OPTIONS) for _ in range(2))
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def talk(chat, questions):
        return [said([piece async for piece in chat.areply(q)]) for q in questions]

    async def main():
        ticking = asyncio.create_task(tick())
        both = asyncio.gather(talk(chat, QUESTIONS[0]), talk(other, QUESTIONS[1]))
        found = await asyncio.wait_for(both, DEADLINE)
        ticking.cancel()
        return found

    first, second = asyncio.run(main())
    assert first == alone(letters, QUESTIONS[0], **OPTIONS)[0]
    assert second == alone(letters, QUESTIONS[1], **OPTIONS)[0]
    assert ticks > 100


@pytest.mark.parametrize("shared", [False, True])
def test_closing_a_reply_stops_it_within_a_token(engine, shared):
    """If steps are shared, within three tokens: two pieces may wait, and one may be in progress."""
    chat = engine.session(sampling=GREEDY, window=200, shared=shared)
    pieces = chat.reply("Hi", max_tokens=100_000)
    shown = next(pieces).text + next(pieces).text
    pieces.close()
    eventually(lambda: chat.exchanges)
    (exchange,) = chat.exchanges
    assert exchange.reply.startswith(shown) and len(exchange.reply_ids) <= 2 + 1 + 2 * shared
    assert exchange.finish == "interrupted"


def test_an_unread_reply_waits(engine):
    chat, other = engine.session(sampling=GREEDY), engine.session(sampling=GREEDY)
    pieces = chat.reply("Hi", max_tokens=100_000)
    next(pieces)
    said(other.reply("Hi", max_tokens=50))
    assert chat.stats.reply_tokens <= 3
    said_before = chat.stats.reply_tokens
    assert next(pieces).text and said_before


def test_asking_for_the_next_reply_ends_the_one_before(engine):
    chat = engine.session(sampling=GREEDY)
    first = chat.reply("One?", max_tokens=100_000)
    next(first)
    second = said(chat.reply("Two?", max_tokens=5))
    assert len(second) == 5 and len(said(first)) <= 1
    assert [exchange.question for exchange in chat.exchanges] == ["One?", "Two?"]


def test_commands_given_at_once_run_in_order(engine):
    chat = engine.session(sampling=GREEDY, **OPTIONS)

    async def again():
        await asyncio.wrap_future(chat.clear())
        return [piece.text async for piece in chat.aedit("x")]

    said(chat.reply("Three?"))
    with pytest.raises(errors.ValueRefused, match="nothing to edit"):
        asyncio.run(again())
    said(chat.reply("Four?"))
    chat.undo()
    said(chat.reply("Five?"))
    assert [exchange.question for exchange in chat.exchanges] == ["Five?"]


def test_callbacks_run_where_the_reply_is_read(engine):
    threads, evicted, pieces = set(), [], []

    def on_evict(*left):
        threads.add(threading.current_thread())
        evicted.append(left)

    def on_token(piece):
        threads.add(threading.current_thread())
        pieces.append(piece)

    chat = engine.session(
        sampling=GREEDY, window=60, max_tokens=20, on_evict=on_evict, on_token=on_token
    )
    yielded = [piece for _ in range(5) for piece in chat.reply("Go on.")]
    assert pieces == yielded
    assert threads == {threading.current_thread()}
    stats = chat.stats
    assert sum(exchanges for exchanges, _ in evicted) == stats.evicted_exchanges > 0
    assert sum(tokens for _, tokens in evicted) == stats.evicted > 0


def test_an_error_is_raised_only_in_its_own_session(engine, monkeypatch):
    good, bad = (engine.session(sampling=GREEDY, max_tokens=9) for _ in range(2))
    bad.wait(DEADLINE)
    stream = bad._session_worker.chat.tokens

    def broken(*_):
        raise RuntimeError("[metal] the device was lost")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "network", broken)
        with pytest.raises(errors.ComputeError, match="the device was lost"):
            said(bad.reply("Hi"))
    assert len(said(good.reply("Hi"))) == 9
    assert len(said(bad.reply("And now?"))) == 9  # this uses a new stream
    assert [exchange.question for exchange in bad.exchanges] == ["Hi", "And now?"]
    with pytest.raises(errors.ValueRefused, match="window"):
        said(engine.session(window=0).reply("Hi"))
    with pytest.raises(errors.ValueRefused, match="window"):
        engine.session(window=0).wait(DEADLINE)
    texts = errors.TextError
    for wrong, error in ((("",), texts), ((b"x",), texts), (("x", 0), errors.ValueRefused)):
        with pytest.raises(error):
            good.reply(*wrong)
    assert len(said(good.reply("Hi"))) == 9


def test_a_full_queue_refuses_with_the_numbers_and_continues(letters):
    with engine_of(letters, queue_size=2) as engine:
        chats = [engine.session(sampling=GREEDY) for _ in range(2)]
        with pytest.raises(errors.QueueFull, match="holds 2"):
            engine.session()
        for chat in chats:
            chat.wait(DEADLINE)
        replies = [chat.reply("Hi", max_tokens=1_000) for chat in chats]
        for reply in replies:
            next(reply)
        with pytest.raises(errors.QueueFull, match="2 commands"):
            next(chats[0].reply("Hi"))
        assert next(replies[1]).text  # the other reply is still in progress
        replies[0].close()
        eventually(lambda: chats[0].exchanges)
        assert next(chats[0].reply("Again"))


def test_the_budget_counts_every_ring_and_refuses_with_the_numbers(letters):
    with engine_of(letters) as engine:
        engine.wait(DEADLINE)
        weights, _ = engine.memory
        chat = engine.session(window=100)
        chat.wait(DEADLINE)
        ring = chat.stats.cache_bytes
        assert engine.memory[0] == weights + ring
    with engine_of(letters, memory_budget=weights + 2 * ring + ring // 2) as engine:
        chats = [engine.session(window=100) for _ in range(3)]
        for chat in chats[:2]:
            chat.wait(DEADLINE)
        with pytest.raises(errors.MemoryRefused, match=r"the weights.*MB.*keys.*MB.*budget of"):
            said(chats[2].reply("Hi"))
        assert engine.memory == (weights + 2 * ring, weights + 2 * ring + ring // 2)
        chats[0].close(DEADLINE)
        engine.session(window=100).wait(DEADLINE)
        # Dropped sessions are closed immediately, too, without waiting for garbage collection.
        gc.disable()
        said(chats[1].reply("Hi", max_tokens=2))
        chats[1].undo().result(DEADLINE)
        del chats[1:], chat
        eventually(lambda: engine.memory[0] == weights)
        gc.enable()
    with engine_of(letters, memory_budget=weights - 1) as engine:
        with pytest.raises(errors.MemoryRefused, match="weights"):
            engine.wait(DEADLINE)
        assert isinstance(engine.error, errors.MemoryRefused) and not engine.ready
        with pytest.raises(errors.MemoryRefused):
            said(engine.session().reply("Hi"))


def test_a_saved_conversation_continues(letters, engine):
    with engine.session(name="work", sampling=GREEDY, max_tokens=9, window=200) as chat:
        replies = [said(chat.reply(question)) for question in ("One?", "Two?")]
        held = chat.exchanges
        with pytest.raises(errors.SessionError, match="open"):
            engine.session(name="work").wait(DEADLINE)
    chat.close(DEADLINE)
    again = engine.session(name="work", sampling=GREEDY, max_tokens=9)
    again.wait(DEADLINE)
    assert again.exchanges == held and [e.reply for e in held] == replies
    assert (
        said(again.reply("Three?"))
        == alone(letters, ("One?", "Two?", "Three?"), max_tokens=9, window=200)[0].pop()
    )


def test_one_engine_at_a_time_and_none_after_its_end(letters):
    engine = engine_of(letters)
    with pytest.raises(errors.EngineOpen, match="close the engine first"):
        engine_of(letters)
    chat = engine.session(sampling=GREEDY)
    going_on = chat.reply("Hi", max_tokens=100_000)
    next(going_on)
    engine.close(0)
    with engine_of(letters) as other:  # this waits until the other engine has ended
        other.wait(DEADLINE)
        assert engine.close(DEADLINE) and not engine.ready
        with pytest.raises(errors.EngineClosed):
            said(going_on)
        with pytest.raises(errors.EngineClosed):
            engine.session()
        with pytest.raises(errors.EngineClosed):
            said(chat.reply("Hi"))
        assert engine.memory[0] == 0


def test_a_forgotten_engine_ends(letters):
    engine = engine_of(letters)
    said(engine.session(sampling=GREEDY).reply("Hi", max_tokens=3))
    worker = engine._worker
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None and worker.join(DEADLINE)


def test_a_missing_model_is_an_error_of_every_call(tmp_path):
    with mlx_stream.Engine(tmp_path / "none") as engine:
        chat = engine.session()
        for ask in (engine.wait, chat.wait, lambda _: said(chat.reply("Hi"))):
            with pytest.raises(errors.SourceError):
                ask(DEADLINE)
        assert isinstance(engine.error, errors.SourceError)
        assert engine.model_name == str(tmp_path / "none")


def test_cancelling_a_task_stops_its_reply(engine):
    chat = engine.session(sampling=GREEDY, window=200)
    shown = []

    async def talk():
        async for piece in chat.areply("Hi", max_tokens=100_000):
            shown.append(piece.text)

    async def main():
        task = asyncio.create_task(talk())
        while len(shown) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    eventually(lambda: chat.exchanges)
    # Two pieces may wait for the caller, and one may be in progress.
    assert len(chat.exchanges[0].reply_ids) <= len(shown) + 3
