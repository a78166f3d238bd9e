"""Interrupts, kept states and Metal's handling of offsets do not corrupt a stream."""

import contextlib
import dis
import functools
import itertools
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlx_stream
from mlx_stream import backend
from mlx_stream.cache import StreamCache
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.settle import common_prefix
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import Coroutine
from mlx_stream.generate.stats import Stats
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece, ReplyDecoder
from mlx_stream.text.template.chat_template import ChatTemplate, user
from mlx_stream.text.template.meter import BUDGET, METER, metered
from tests.fakes.conversations import assert_well_formed
from tests.fakes.replies import letters_of, reply_of_ids, write, writer_of
from tests.fakes.tiny import write_model

GREEDY = Sampling(0.0)

IDS = [int(i) for i in np.random.default_rng(5).integers(3, 290, 400)]


def stream_of(model, window=20, sinks=3, clock_limit=None):
    cache = model.new_cache(sinks, window)
    if clock_limit is not None:
        cache.clock_limit = max(clock_limit, 2 * cache.geometry.rows)
    return TokenStream(model, cache)


@functools.cache
def handling(code):
    """Return the bytecodes before which Python may have handled a signal: after a call,
    where a function begins or resumes, and where a loop repeats.

    This excludes the gap between storing and returning a value. It also excludes a call inside a
    `try` whose next bytecode is outside it: the call would raise, and the `try` would catch that.
    """
    handlers = {
        at: entry.target
        for entry in dis.Bytecode(code).exception_entries  # pyright: ignore
        for at in range(entry.start, entry.end, 2)
    }
    found, before = set(), None
    for one in dis.get_instructions(code):
        handles = before and before.opname.startswith(("RESUME", "CALL"))
        if before and handles and handlers.get(before.offset) == handlers.get(one.offset):
            found.add(one.offset)
        if "JUMP_BACKWARD" in one.opname:
            found.add(one.argval)
        before = one
    return found


def interrupt_at(count, function):
    """Run a function; raise KeyboardInterrupt at the `count`th place in our code that allows it.

    Returns the exception, or None if the function has fewer such places.
    """
    left = count

    def trace(frame, event, arg):
        nonlocal left
        if not ("mlx_stream" in frame.f_code.co_filename or frame.f_globals is vars(contextlib)):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in handling(frame.f_code):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        sys.settrace(before)
    assert left > 0, "Python swallowed it: nothing was interrupted"
    return None


@pytest.mark.parametrize("chunk", [1, 6])
def test_a_stream_interrupted_anywhere_continues_as_one_that_was_not(tiny_model, chunk):
    model = tiny_model()
    count = 0
    for count in itertools.count(10, 61 if chunk == 1 else 31):
        stream = stream_of(model, clock_limit=0)
        stream.read(IDS[:40], chunk)
        if not interrupt_at(count, lambda: stream.read(IDS[40:52], chunk)):  # noqa: B023
            break
        # The stream holds exactly the tokens that its length says were read.
        read = stream.length
        fresh = stream_of(model, clock_limit=0)
        fresh.read(IDS[:read], chunk)
        assert stream.ids.attended() == fresh.ids.attended()
        expected, found = fresh.read(IDS[read : read + 3]), stream.read(IDS[read : read + 3])
        assert np.allclose(np.array(found), np.array(expected), atol=1e-4)
    assert count > 300


# In a generator that is being dropped Python itself ignores an interrupt, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_conversation_interrupted_anywhere_still_renders_whole(tmp_path):
    model = mlx_stream.load(write_model(tmp_path, num_hidden_layers=1), dtype="float32")
    count = 0
    for count in itertools.count(1, 43):
        chat = ChatSession(model, window=400, sampling=Sampling(1.0, top_p=1.0, seed=1))
        "".join(piece.text for piece in chat.reply("One?", max_tokens=4))
        cut = interrupt_at(count, lambda: list(chat.reply("Two?", max_tokens=4)))  # noqa: B023
        # The second turn is there completely or not at all, and a third one is well-formed.
        list(chat.reply("Three?", max_tokens=1))
        assert_well_formed(chat)
        questions = [exchange.question for exchange in chat.exchanges]
        assert questions in (["One?", "Three?"], ["One?", "Two?", "Three?"]), count
        if not cut:
            break
    assert count > 1_000


@pytest.mark.parametrize(("guesses", "traced"), [(False, "0"), (False, "1"), (True, "0")])
def test_a_reply_being_written_is_interrupted_anywhere(tiny_model, monkeypatch, guesses, traced):
    """Returned text and kept ids match the start of an undisturbed run; the rest can be undone."""
    monkeypatch.setenv(backend.COMPILE, traced)
    model = tiny_model(vocab_size=8, num_hidden_layers=1)
    prompt, whole = [1, 2, 3, 4] * 9, ""
    count = 0
    for count in itertools.count(1, 89):
        writer = writer_of(model, guesses)
        reply, stats, given = reply_of_ids(), Stats(), []
        steps = write_reply(
            writer, prompt, Sampler(GREEDY), 30, (), reply, stats, lambda count: None
        )
        go_on = functools.partial(give, steps, given)
        if not whole:
            go_on()
            whole = letters_of(
                [*generate(writer_of(model, False).tokens, prompt, Sampler(GREEDY), 30)]
            )
            assert "".join(given) == whole and guesses == (stats.accepted_tokens > 5)
            continue
        cut = interrupt_at(count, go_on)
        stream = writer.tokens
        assert whole.startswith("".join(given))
        # An interrupt within `add` may leave an id whose text was not decoded.
        assert whole.startswith(letters_of(reply.ids)), count
        held, wanted = stream.ids.since(0), [*prompt, *reply.ids]
        common = common_prefix(held, wanted)
        # Beyond that are guesses of the last step, or an id chosen and read, but not yet emitted.
        assert len(held) - common <= stream.cache.max_verify
        assert common >= min(len(held), len(wanted) - 1), "what was said is there, but the last"
        stream.rewind(len(held) - common)
        fresh = writer_of(model, False).tokens
        if common:
            fresh.read(wanted[:common])
        assert stream.ids.attended() == fresh.ids.attended()
        found, expected = (np.array(one.read([5])) for one in (stream, fresh))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        if not cut:
            break
    assert count > 1_000


def give(steps: Coroutine[Piece, Piece], given: list[str]) -> None:
    given.extend(piece.text for piece in write(steps))


def test_a_template_interrupted_anywhere_leaves_no_clock_running():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    count = 0
    for count in itertools.count(1):
        cut = interrupt_at(count, lambda: template.render([user("Hi")], True))
        fresh = metered(METER.get)
        assert fresh.left == BUDGET, count
        if not cut:
            break
    assert count > 20


@pytest.mark.parametrize("already", [0, 1])
def test_a_reply_interrupted_anywhere_can_be_settled(tmp_path, already):
    tokenizer = mlx_stream.load(write_model(tmp_path, num_hidden_layers=1)).tokenizer
    ids = tokenizer.encode("the ä")
    count = 0
    for count in itertools.count(1):
        reply = ReplyDecoder(tokenizer.decoder(), ())
        for id in ids[:already]:
            reply.add(id)
        cut = interrupt_at(count, lambda: reply.add(ids[already]))  # noqa: B023
        reply.flush()
        kept, rest = reply.final_ids()
        assert kept in (already, already + 1)
        assert reply.final_text() == tokenizer.decode(reply.ids[:kept]) + rest, count
        assert reply.final_ids(trim=True)[0] <= already + 1
        if not cut:
            break
    assert count > 20


def test_reanchoring_holds_one_layer_twice_and_no_more(tiny_model):
    model = tiny_model(num_hidden_layers=6, max_position_embeddings=20_000)
    stream = stream_of(model, window=8_000)
    cache = stream.cache
    assert isinstance(cache, StreamCache)
    layer = cache.current.keys[0].nbytes
    stream.read(IDS[:8])
    mx.clear_cache()
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    cache._reanchor()
    assert mx.get_peak_memory() - active < 2 * layer


def test_a_rotation_never_leaves_metal_a_position_to_read_past(tiny_model, monkeypatch):
    """Metal reads offset[b] for each b in range(B), regardless of the offset's length."""
    rope, seen = mx.fast.rope, []

    def spy(x, *args, offset, **kwargs):
        seen.append(x.shape[0])
        assert isinstance(offset, mx.array) and offset.dtype == mx.int32
        assert offset.size >= x.shape[0] and min(offset.tolist()) >= 0  # type: ignore[type-var]
        return rope(x, *args, offset=offset, **kwargs)

    monkeypatch.setattr(mx.fast, "rope", spy)
    monkeypatch.setenv(backend.COMPILE, "0")  # values cannot be inspected inside a trace
    stream = stream_of(tiny_model(num_hidden_layers=3), clock_limit=0)
    for chunk in (1, 7, 64):
        stream.read(IDS[:150], chunk)
    assert len(seen) > 300


def test_padding_never_reaches_real_rows(tiny_model):
    """This holds even if the embedding has an unused row of NaNs."""
    model = tiny_model(tie_word_embeddings=False)
    weight = model.network.embed_tokens.weight
    weight[0] = float("nan")
    stream = stream_of(model)
    logits = [np.array(stream.read(IDS[start : start + 5])) for start in range(0, 60, 5)]
    assert np.isfinite(logits).all()
