"""After a device failure nothing is answered from the old rows: the attended turns are read again.

test_failures.py runs each test in its own process.
"""

import gc
from contextlib import ExitStack
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest

import mlx_stream
from mlx_stream import errors
from mlx_stream.chat.resume import SessionOptions, new_chat, open_session
from mlx_stream.chat.session_files import session_paths
from mlx_stream.generate.requests import ReadRequest, Want, run_coroutine
from tests.fakes.engines import DEADLINE, GREEDY, engine_of, said
from tests.fakes.failing import failing
from tests.fakes.tiny import tiny_config, write_letters

QUESTIONS = ("Hello there.", "and the man of the house " * 3)
NEXT = "Go on."
OPTIONS = {"system": "You are brief.", "window": 220, "sampling": GREEDY, "max_tokens": 12}
BIG = {**OPTIONS, "window": 400}
ALONE = {**OPTIONS, "speculate": False}  # guessing leaves rows that were not asked for
FED = "the man of the house and the hat of that man " * 9


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_letters(tmp_path_factory.mktemp("failures") / "letters", tiny_config(head_dim=64))


@pytest.fixture
def untraced(monkeypatch):
    """Look weights up at each step, so that one can be swapped out."""
    monkeypatch.setenv("MLX_STREAM_COMPILE", "0")


@pytest.fixture
def model(letters, untraced):
    return mlx_stream.load(letters, dtype="float32", keep_quantized=False)


def state_of(chat):
    return {name: np.array(value) for name, value in chat.tokens.state().items()}


def same(one, other):
    return all(np.array_equal(value, other[name]) for name, value in one.items())


def fail(chat, pieces, count):
    """Take this many pieces of a reply, and fail while the next one is computed."""
    taken = said(islice(pieces, count))
    with failing(chat.model.network), pytest.raises(RuntimeError, match="read from file"):
        said(pieces)
    return taken


def fails(stack):
    """Return a function that makes the next step fail, if called on an engine's thread."""
    return lambda chat: stack.enter_context(failing(chat.model.network))


def again(model, exchanges, **options):
    """Return a session that has read the same exchanges all at once."""
    chat = mlx_stream.ChatSession(model, **{**ALONE, **options})
    run_coroutine(chat.replay_steps(dict(enumerate(exchanges, 1))))
    chat.restart(chat.system, chat.stats.window)
    return chat


@pytest.mark.parametrize("where", ["question", "reply"])
@pytest.mark.parametrize("options", [{}, {"evict": "token"}, {"kv_bits": 8}], ids=str)
def test_a_conversation_continues_as_one_that_was_read_again(model, where, options):
    chat = mlx_stream.ChatSession(model, **ALONE, **options)
    for question in (*QUESTIONS, *QUESTIONS):
        said(chat.reply(question))
    taken = fail(chat, chat.reply(QUESTIONS[1]), 0 if where == "question" else 3)
    exchanges, number = chat.exchanges, chat.number
    assert exchanges[-1].question == QUESTIONS[1] and exchanges[-1].reply.startswith(taken)
    other = again(model, exchanges, **options)
    assert said(chat.reply(NEXT)) == said(other.reply(NEXT))
    assert same(state_of(chat), state_of(other)) and not chat.tokens.failed
    assert chat.number == number + 1


@pytest.mark.parametrize("how", ["retry", "edit", "undo"])
def test_what_is_taken_back_after_it_is_not_read_again(model, how):
    chat = mlx_stream.ChatSession(model, **ALONE)
    said(chat.reply(QUESTIONS[0]))
    fail(chat, chat.reply(QUESTIONS[1]), 2)
    before, _ = chat.exchanges
    other = again(model, [before])
    if how == "retry":
        assert said(chat.retry()) == said(other.reply(QUESTIONS[1]))
    elif how == "edit":
        assert said(chat.edit(NEXT)) == said(other.reply(NEXT))
    else:
        assert chat.undo().question == QUESTIONS[1]
    assert said(chat.reply(NEXT)) == said(other.reply(NEXT))


def test_it_is_tried_again_if_it_fails_again(model):
    chat = mlx_stream.ChatSession(model, **ALONE)
    said(chat.reply(QUESTIONS[0]))
    fail(chat, chat.reply(QUESTIONS[1]), 2)
    before = chat.exchanges
    fail(chat, chat.reply(NEXT), 0)  # what is attended cannot be read again
    assert chat.tokens.failed and chat.exchanges == before
    assert said(chat.reply(NEXT)) == said(again(model, before).reply(NEXT))


def test_it_is_read_again_in_steps_and_may_be_left_halfway(model):
    chat = mlx_stream.ChatSession(model, **ALONE)
    said(chat.reply(QUESTIONS[1]))
    fail(chat, chat.reply(QUESTIONS[1]), 2)
    before, stream = chat.exchanges, chat.tokens
    steps = chat.reply_steps(NEXT)
    first = next(steps)
    assert isinstance(first, ReadRequest) and first.want is Want.NOTHING
    assert first.stream is chat.tokens is not stream
    assert steps.send(first.stream.run(first)) is not None
    steps.close()
    assert chat.tokens is stream and stream.failed and chat.exchanges == before
    assert said(chat.reply(NEXT)) == said(again(model, before).reply(NEXT))
    assert not chat.tokens.failed


def test_the_state_of_a_stream_that_failed_is_not_saved(model):
    options = SessionOptions(**ALONE)
    notices = []
    with ExitStack() as stack:
        found = open_session("s", model, options, notices.append)
        stack.callback(found.close)
        said(found.chat.reply(QUESTIONS[0]))
        fail(found.chat, found.chat.reply(QUESTIONS[1]), 2)
    assert not session_paths("s").snapshot.exists()
    found = open_session("s", model, options, notices.append)
    exchanges = found.chat.exchanges
    assert [exchange.question for exchange in exchanges] == [*QUESTIONS]
    other = new_chat(model, options, notices.append)
    run_coroutine(other.replay_steps(dict(enumerate(exchanges, 1))))
    assert said(found.chat.reply(NEXT)) == said(other.reply(NEXT))
    assert same(state_of(found.chat), state_of(other))
    found.close()
    assert session_paths("s").snapshot.exists()


def test_a_session_of_an_engine_continues_within_the_budget(letters, untraced, model):
    with engine_of(letters) as engine:
        chat = engine.session(**OPTIONS)
        chat.wait(DEADLINE)
        used, _ = engine.memory
    with engine_of(letters, memory_budget=used) as engine:
        chat = engine.session(**OPTIONS)
        said(chat.reply(QUESTIONS[0]))
        with ExitStack() as stack:
            chat._future(fails(stack)).result(DEADLINE)
            with pytest.raises(errors.ComputeError, match="read from file"):
                said(chat.reply(QUESTIONS[1]))
        exchanges = chat.exchanges
        assert engine.memory[0] == used - chat.stats.cache_bytes
        pieces = [*chat.reply(NEXT)]
        assert said(pieces) == said(again(model, exchanges).reply(NEXT))
        assert engine.memory == (used, used)
        assert "read again" in chat.stats.notices[-1]


def test_a_ring_that_failed_is_let_go_of(letters, untraced):
    """The error that is kept does not keep the ring alive."""
    gc.disable()  # the collector does not know how large an array is
    with engine_of(letters) as engine:
        engine.wait(DEADLINE)
        before = mx.get_active_memory()
        for _ in range(3):
            chat, listener = engine.session(**BIG), engine.listen(**BIG)
            chat.wait(DEADLINE)
            listener.flush(DEADLINE)
            ring = chat.stats.cache_bytes
            with ExitStack() as stack, pytest.raises(errors.ComputeError, match="read from file"):
                chat._future(fails(stack)).result(DEADLINE)
                said(chat.reply(NEXT))
            with ExitStack() as stack, pytest.raises(errors.ComputeError, match="read from file"):
                chat._future(fails(stack)).result(DEADLINE)
                listener.feed(FED)
                listener.flush(DEADLINE)
            listener.close(DEADLINE)
            assert mx.get_active_memory() - before < ring / 2
            said(chat.reply(NEXT))
            chat.close(DEADLINE)
            assert mx.get_active_memory() - before < ring / 2
