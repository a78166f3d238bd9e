"""Messages, histories, forks and progress work the same with an engine as without one."""

import asyncio
import threading
from typing import Any

import pytest

import mlx_stream
from mlx_stream import errors
from mlx_stream.chat.messages import Message
from mlx_stream.engine.session_worker import ReplyEnd, ReplyPlan, ReplyStart
from tests.fakes.engines import DEADLINE, GREEDY, LONG, engine_of, eventually, said
from tests.fakes.thinkers import write_random
from tests.fakes.tool_models import LLAMA, TOOLS

HISTORY = [Message("user", "Hi"), Message("assistant", "the thin man")] * 3
OPTIONS = {"sampling": GREEDY, "window": 300, "max_tokens": 12}


@pytest.fixture
def engine(letters):
    with engine_of(letters) as engine:
        yield engine
    assert engine.close(DEADLINE)


def plain(letters, history=HISTORY):
    model = mlx_stream.load(letters, dtype="float32", keep_quantized=False)
    return mlx_stream.ChatSession(model, history=history, **OPTIONS)  # type: ignore[arg-type]


def test_a_session_takes_a_history_and_messages(letters, engine):
    chat, slow = engine.session(history=HISTORY, shared=False, **OPTIONS), plain(letters)
    turn = [Message("system", "Be brief."), Message("user", ""), Message("assistant", "So")]
    for question in ("Next?", turn):
        assert [*chat.reply(question)] == [*slow.reply(question)]
    assert chat.exchanges == slow.exchanges and len(chat.exchanges) == 5
    with pytest.raises(errors.ValueRefused, match="at least one"):
        chat.reply([])
    bad = engine.session(history=HISTORY[:1])
    with pytest.raises(errors.ValueRefused, match="end with a reply"):
        bad.wait(DEADLINE)


def test_a_fork_continues_alone(letters, engine):
    chat, slow = engine.session(history=HISTORY, shared=False, **OPTIONS), plain(letters)
    assert said(chat.reply("Next?")) == said(slow.reply("Next?"))
    used = engine.memory[0]
    pieces = chat.reply("Long?")
    next(pieces)  # the reply in progress ends
    forks = [chat.fork(), chat.fork(back=2)]
    undone = chat.undo()
    said(slow.reply("Long?", 1))
    for fork, back in zip(forks, (0, 2), strict=True):
        fork.wait(DEADLINE)
        assert len(fork.exchanges or chat.exchanges) and fork.name is None
        assert said(fork.reply("And?")) == said(slow.fork(back).reply("And?"))
        assert len(fork.exchanges) == 6 - back
    assert undone.result(DEADLINE).question == "Long?"
    assert engine.memory[0] == used + 2 * chat.stats.cache_bytes
    for fork in forks:
        fork.close(DEADLINE)
    assert engine.memory[0] == used
    far = chat.fork(back=9)
    with pytest.raises(errors.ValueRefused, match="cannot undo"):
        far.wait(DEADLINE)
    assert said(chat.reply("Still there?"))


def test_a_fork_that_does_not_fit_is_refused_and_frees_what_it_took(letters):
    with engine_of(letters) as first:
        chat = first.session(**OPTIONS)
        chat.wait(DEADLINE)
        budget = first.memory[0] + chat.stats.cache_bytes // 2
    with engine_of(letters, memory_budget=budget) as engine:
        chat = engine.session(**OPTIONS)
        said(chat.reply("Hi"))
        used = engine.memory[0]
        with pytest.raises(errors.MemoryRefused):
            chat.fork().wait(DEADLINE)
        assert engine.memory[0] == used and said(chat.reply("And?"))
    with engine_of(letters) as engine:
        chat = engine.session(**OPTIONS)
        said(chat.reply("Hi"))
        used = engine.memory[0]
        with engine._worker.lock:  # closed while an earlier command is still queued
            chat.clear()
            fork = chat.fork()
            fork.close()
        said(chat.reply("And?"))
        assert engine.memory[0] == used


def test_progress_is_told_where_the_reply_is_read(engine):
    chat, told = engine.session(history=HISTORY, **OPTIONS), []

    def progress(done, total):
        told.append((done, total, threading.current_thread()))

    said(chat.reply(LONG, progress=progress))
    assert {thread for *_, thread in told} == {threading.current_thread()}
    firsts, prompts = (
        [t[:2] for t in told if t[1] == total] for total in (told[0][1], told[-1][1])
    )
    assert firsts[-1][0] == firsts[-1][1] and prompts[-1][0] == prompts[-1][1]
    assert [done for done, _ in prompts] == sorted({done for done, _ in prompts}) and prompts[1:]

    async def ask():
        return [piece async for piece in chat.areply("Hi", progress=progress)]

    count = len(told)
    pieces = asyncio.run(ask())
    assert told[count:] and all(isinstance(piece, mlx_stream.Piece) for piece in pieces)
    assert pieces[-1].read == told[-1][1]
    said(chat.retry(progress=progress))
    assert told[-1][:2] == (1, 1)


def test_tools_reach_the_head(tmp_path):
    path, *_ = write_random(tmp_path / "model", LLAMA, "<|eot_id|>")
    with engine_of(path) as engine:
        chat = engine.session(tools=TOOLS, window=200, max_tokens=3)
        said(chat.reply("Hi"))
        assert chat.stats.pinned > 300


def test_a_reply_begins_at_once_and_changes_the_conversation_before_it(letters, engine):
    """Turns are taken back, evicted and read as text; the items say what is read."""
    chat, slow = engine.session(shared=False, **OPTIONS), plain(letters, history=())
    for question in ("Hi", "And?", "More?"):
        assert said(chat.reply(question)) == said(slow.reply(question))
    ends: list[ReplyEnd | None] = []
    plan = ReplyPlan("Next?", back=1, keep=1, history=HISTORY[:2], on_end=ends.append)
    reader = chat.begin(plan, progress=lambda done, total: None)
    eventually(lambda: reader._task.items)  # nothing has been taken yet
    items: Any = [*iter(reader.take, None)]
    slow.undo()
    slow.clear(2)
    slow.follow(HISTORY[:2])
    last = [*slow.reply("Next?")][-1]
    start, *pieces, end = items
    assert isinstance(start, ReplyStart) and isinstance(end, ReplyEnd) and ends == [end]
    assert end.exchange and last.attended
    assert start.turns == 2 and start.attended == last.attended - last.written + 1
    assert start.read == last.read + last.settled
    assert said(pieces) == slow.exchanges[-1].reply == end.exchange.reply
    assert len(end.sizes) == 3 and sum(end.sizes) <= slow.cache.attended + 1
    assert chat.exchanges == slow.exchanges
    done = threading.Event()
    again = chat.begin(ReplyPlan(None, on_end=ends.append), 5)
    again.when_done(lambda future: done.set())
    items = [*iter(again.take, None)]
    assert items[0].read == 1 and ends[1] is items[-1] and items[-1].replaced
    assert said(items[1:-1]) == said(slow.retry(5)) and done.wait(DEADLINE)


def test_only_what_was_taken_of_a_cancelled_reply_stays(engine):
    chat, ends = engine.session(**OPTIONS), []
    said(chat.reply("Hi"))
    for count in (0, 1, 3):
        plan = ReplyPlan("Long?", given=lambda n=count: n, on_end=ends.append)
        reader = chat.begin(plan, 10**6)
        items = [reader.take() for _ in range(5)]
        reader.cancel()
        assert [*iter(reader.take, None)] == []
        eventually(lambda: not engine._worker.busy())
        assert ends[-1].exchange.reply == said(items[1:])[:count] == chat.exchanges[-1].reply
    with pytest.raises(errors.ValueRefused, match="bias"):
        chat.begin(ReplyPlan("Hi", on_end=ends.append), bias={10**9: 1.0}).take()
    assert ends[-1] is None and len(chat.exchanges) == 4
