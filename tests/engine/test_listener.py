"""Listening: fed text is attended to unchanged, questions are answered, and nothing is lost."""

import asyncio
import json
import pydoc_data.topics
import threading

import mlx.core as mx
import numpy as np
import pytest

import mlx_stream
from mlx_stream import errors
from mlx_stream.cache import StreamCache
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import Sampler, Sampling
from tests.fakes.engines import DEADLINE, GREEDY, engine_of, eventually, said, together
from tests.fakes.shell import edit
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

TEXT = pydoc_data.topics.topics["compound"][:4_000]


@pytest.fixture
def engine(letters):
    with engine_of(letters) as engine:
        yield engine
    assert engine.close(DEADLINE)


def hearing(listener):
    listener.wait(DEADLINE)
    return listener._listener_worker.stream


def attended(listener):
    """Return the attended text; call this only while nothing is being read."""
    heard = hearing(listener)
    ids = heard.tokens.ids.attended()
    return heard.model.tokenizer._backend.decode(ids, skip_special_tokens=False)


def bits(listener):
    """Return the whole state of a stream, as numbers."""
    state = hearing(listener).tokens.state()
    return {n: np.array(v).tolist() if isinstance(v, mx.array) else v for n, v in state.items()}


def rendered(listener, *said, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, reply in said:
        messages.append({"role": "user", "content": question})
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
    return hearing(listener).prompts.template.render(messages, reply=False)


def test_fed_text_is_one_open_turn_that_a_question_closes(engine):
    listener = engine.listen(system="You listen.", window=400, sampling=GREEDY)
    listener.feed("The train is la")
    listener.feed("te. It is <|im_end|> of May.")
    listener.flush(DEADLINE)
    text = "The train is late. It is <|im_end|> of May."
    closing = "<|im_end|>\n"
    assert attended(listener) + closing == rendered(listener, (text, None), system="You listen.")
    answer = said(listener.ask("Why?", max_tokens=9))
    assert len(answer) == 9
    listener.feed("It ca")  # a question ends the fed text before it, even in the middle of a word
    turns = ((f"{text}\n\nWhy?", answer),)
    again = said(listener.ask("When?", max_tokens=9))
    more = said(listener.ask("Where?", max_tokens=9))
    listener.flush(DEADLINE)
    turns = (*turns, ("It ca\n\nWhen?", again), ("Where?", more), ("", None))
    assert attended(listener) + closing == rendered(listener, *turns, system="You listen.")
    assert listener.stats.pinned > 0 and listener.backlog == 0


def test_asked_now_it_answers_from_what_is_read_and_loses_nothing(engine):
    listener = engine.listen(window=400, sampling=GREEDY)
    listener.feed("One two thr")
    eventually(lambda: hearing(listener).encoder.pending == " thr")
    answer = said(listener.ask("Why?", max_tokens=3, now=True))
    listener.feed("ee four")
    listener.flush(DEADLINE)
    text = attended(listener)
    assert f"user\nOne two\n\nWhy?<|im_end|>\n<|im_start|>assistant\n{answer}" in text
    assert text.endswith("<|im_start|>user\n three four")


def test_the_stream_is_one_that_read_the_same_ids(letters, engine):
    listener = engine.listen(window=300, sampling=GREEDY)
    for at in range(0, len(TEXT), 37):
        listener.feed(TEXT[at : at + 37], timeout=DEADLINE)
    with pytest.raises(TimeoutError):
        listener.flush(0)
    listener.flush(DEADLINE)
    heard = hearing(listener)
    ids = heard.prompts.encode(heard.turn.opening + TEXT)
    assert listener.stats.evicted == len(ids) - listener.stats.attended > 0
    model = mlx_stream.load(letters, dtype="float32", keep_quantized=False)
    fresh = TokenStream(model, model.new_cache(heard.cache.geometry.sinks, 300))
    expected = fresh.read([*ids, 5, 6, 7])
    assert heard.tokens.ids.attended() == fresh.ids.attended()[:-3] or (
        heard.tokens.ids.attended()[-100:] == fresh.ids.attended()[-103:-3]
    )
    assert np.allclose(np.array(heard.tokens.read([5, 6, 7])), np.array(expected), atol=1e-4)


def test_asking_without_remembering_leaves_the_stream_as_it_was_to_the_bit(engine):
    listener = engine.listen(window=150, sampling=GREEDY)
    listener.feed(TEXT)
    listener.flush(DEADLINE)
    listener.feed(" and a begun wo")
    eventually(lambda: not listener.backlog and hearing(listener).encoder.pending == " wo")
    before, words = bits(listener), dict(vars(hearing(listener).encoder))
    used, _ = engine.memory
    pieces = listener.ask("What is it?", remember=False, max_tokens=20)
    answer = next(pieces).text
    answer += said(pieces)
    assert engine.memory[0] == used
    assert mx.get_cache_memory() < listener.stats.cache_bytes / 2, "no freed buffers are kept"
    assert bits(listener) == before and vars(hearing(listener).encoder) == words
    stopped = listener.ask("What is it?", remember=False, max_tokens=100_000)
    next(stopped)
    stopped.close()
    eventually(lambda: not listener._queue.tasks)
    assert bits(listener) == before and engine.memory[0] == used
    # This is the answer that would be remembered.
    assert said(listener.ask("What is it?", max_tokens=20)) == answer
    listener.flush(DEADLINE)  # what follows the answer is read on the engine's thread
    assert bits(listener) != before


@pytest.mark.parametrize(
    "fails",
    [(TokenStream, "next"), (Sampler, "choose"), (StreamCache, "__init__")],
    ids=lambda fails: fails[1],
)
def test_an_answer_aside_that_fails_leaves_nothing_behind(engine, monkeypatch, fails):
    """It fails as it would on a device that cannot compute, or has no memory left."""
    listener = engine.listen(window=500, sampling=GREEDY)
    listener.feed(TEXT[:200])
    listener.flush(DEADLINE)
    said(listener.ask("What is it?", remember=False, max_tokens=5))
    before, used = mx.get_active_memory(), engine.memory[0]

    def failing(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(errors.ComputeError, match="out of memory"):
        patch.setattr(*fails, failing)
        said(listener.ask("What is it?", remember=False, max_tokens=5))
    assert engine.memory[0] == used
    assert mx.get_active_memory() - before < listener.stats.cache_bytes / 2
    assert mx.get_cache_memory() < listener.stats.cache_bytes / 2


class BrokenNetwork:
    def __call__(self, *_):
        raise RuntimeError("[metal] the device was lost")

    prefill = __call__


@pytest.mark.parametrize("asked", ["flush", "ask"])
def test_a_stream_is_not_used_after_a_step_that_failed(engine, monkeypatch, tmp_path, asked):
    listener = engine.listen(window=300, sampling=GREEDY)
    listener.feed(TEXT[:200])
    listener.flush(DEADLINE)
    stream, used = hearing(listener), engine.memory[0]
    with engine._worker.lock:  # so that nothing is read in the background
        monkeypatch.setattr(stream.tokens, "network", BrokenNetwork())
        if asked == "ask":
            task = listener._ask_command("Why?", True, 9, False)()
        else:
            listener.feed(TEXT[:200])
            flush = stream.flush(listener._backlog.fed)
            task = engine._worker.submit(listener._queue, lambda: flush, None)
    for use in (
        lambda: task.future.result(DEADLINE),
        lambda: listener.feed("x"),
        lambda: listener.flush(DEADLINE),
        lambda: said(listener.ask("How?", remember=False)),
        lambda: listener.save(tmp_path / "stream.safetensors", {}),
    ):
        with pytest.raises(errors.ComputeError, match="the device was lost"):
            use()
    assert isinstance(listener.error, errors.ComputeError) and not [*tmp_path.iterdir()]
    assert engine.memory[0] == used - listener.stats.cache_bytes


def test_a_copy_that_does_not_fit_is_refused_and_listening_continues(letters):
    with engine_of(letters) as engine:
        listener = engine.listen(window=100)
        listener.wait(DEADLINE)
        used, ring = engine.memory[0], listener.stats.cache_bytes
    with engine_of(letters, memory_budget=used + ring - 1) as engine:
        listener = engine.listen(window=100, sampling=GREEDY)
        with pytest.raises(errors.MemoryRefused, match="budget"):
            said(listener.ask("What?", remember=False))
        assert len(said(listener.ask("What?", max_tokens=5))) == 5
        with pytest.raises(errors.MemoryRefused):
            engine.listen(window=100).wait(DEADLINE)
        other = engine.listen(window=100)
        with pytest.raises(errors.MemoryRefused):
            while True:  # the failure may not be known immediately
                other.feed("x", timeout=0.01)


def test_an_answer_that_is_cut_leaves_a_well_formed_stream(engine):
    listener = engine.listen(window=500, sampling=GREEDY)
    listener.feed("One two three.")
    pieces = listener.ask("Why?", max_tokens=100_000)
    shown = next(pieces).text
    pieces.close()
    never_begun = listener.ask("How? " * 300, max_tokens=100_000)
    threading.Thread(target=lambda: next(never_begun, None), daemon=True).start()
    eventually(lambda: listener._queue.tasks)
    listener._reply.cancel()
    listener.feed("And four.")
    listener.flush(DEADLINE)
    text = attended(listener)
    assert shown
    assert text.endswith("<|im_end|>\n<|im_start|>user\nAnd four.")
    assert text.count("<|im_start|>") in (3, 5)
    assert text.count("<|im_end|>\n<|im_start|>") == text.count("<|im_start|>") - 1


def test_what_is_read_while_an_answer_is_cancelled_is_not_read_again(engine, monkeypatch):
    listener = engine.listen(window=500, sampling=GREEDY)
    listener.wait(DEADLINE)
    # The text is read by the answer's own requests.
    monkeypatch.setattr(listener._listener_worker, "waiting", lambda: False)
    listener.feed("One two three. ")
    scheduler = engine._worker._scheduler
    run = scheduler.run

    def run_and_cancel(requests, measure=True):
        found = run(requests, measure)
        if listener._reply:
            listener._reply.cancel()
        return found

    scheduler.run = run_and_cancel
    said(listener.ask("Why?", max_tokens=9))
    scheduler.run = run
    listener.feed("And four.")
    listener.flush(DEADLINE)
    text = attended(listener)
    assert text.count("One") == text.count("four") == 1 and text.endswith("And four.")


def test_a_full_backlog_is_refused_with_the_numbers_or_waited_for(engine):
    listener = engine.listen(window=100, backlog=1_000)
    with engine._worker.lock:  # nothing is taken from the backlog meanwhile
        listener.feed("x " * 400)
        with pytest.raises(errors.QueueFull, match=r"800 of 1,000 characters"):
            listener.feed("y " * 200)
        assert listener.backlog == 800
    for _ in range(20):
        listener.feed("y " * 200, timeout=DEADLINE)
    listener.flush(DEADLINE)
    assert listener.backlog == 0
    with pytest.raises(errors.ValueRefused, match="in parts"):
        listener.feed("x" * 1_001)
    with pytest.raises(errors.TextError, match="surrogate"):
        listener.feed("a \ud800 b")
    with pytest.raises(errors.TextError, match="not bytes"):
        listener.feed(b"x")  # type: ignore[arg-type]
    listener.close(DEADLINE)
    with pytest.raises(errors.EngineClosed):
        listener.feed("x")


def test_evictions_are_reported_on_the_thread_that_uses_the_listener(engine):
    left, threads = [], set()

    def on_evict(exchanges, tokens):
        threads.add(threading.current_thread())
        left.append(tokens)

    listener = engine.listen(window=60, sampling=GREEDY, on_evict=on_evict)
    listener.feed(TEXT)
    listener.flush(DEADLINE)
    said(listener.ask("Why?", max_tokens=20))
    listener.flush(DEADLINE)
    assert sum(left) == listener.stats.evicted > 0
    assert threads == {threading.current_thread()}
    assert any("now being evicted" in notice for notice in listener.stats.notices)


def test_a_snapshot_continues_to_the_bit_and_holds_unread_text(engine, tmp_path):
    path = tmp_path / "stream.safetensors"
    options = {"system": "You listen.", "window": 120, "sampling": Sampling(0.8, seed=3)}
    listener = engine.listen(**options)
    assert listener.restored is None
    listener.feed(TEXT[:1_000])
    said(listener.ask("Why?", max_tokens=9))
    with engine._worker.lock:  # so that most of it is still unread when the stream is saved
        listener.feed(TEXT[1_000:3_010])
        saving = threading.Thread(target=listener.save, args=(path, {"byte": 3_010, "file": "a"}))
        saving.start()
    saving.join(DEADLINE)
    listener.feed(TEXT[3_010:])
    listener.flush(DEADLINE)
    again = engine.listen(**options, restore=path)
    again.wait(DEADLINE)
    assert again.restored == {"byte": 3_010, "file": "a"}
    again.feed(TEXT[3_010:])
    again.flush(DEADLINE)
    assert hearing(again).tokens.ids.attended() == hearing(listener).tokens.ids.attended()
    assert again.stats.evicted == listener.stats.evicted
    assert said(again.ask("What?", max_tokens=9)) == said(listener.ask("What?", max_tokens=9))
    # If everything was read before saving, the steps are the same, and all is equal bit for bit.
    listener.flush(DEADLINE)
    listener.save(path, {})
    third = engine.listen(**options, restore=path)
    third.wait(DEADLINE)
    assert bits(third) == bits(listener) and third.restored == {}
    assert said(third.ask("And?", max_tokens=9)) == said(listener.ask("And?", max_tokens=9))


def test_a_snapshot_between_an_answer_and_the_next_turn_continues_there(engine, tmp_path):
    path = tmp_path / "stream.safetensors"
    listener = engine.listen(window=200, sampling=GREEDY)
    listener.feed("One two three.")
    heard = hearing(listener)
    with engine._worker.lock:  # so that nothing happens in between
        listener._ask_command("Why?", True, 9, False)()
        saving = engine._worker.submit(listener._queue, lambda: heard.save(path, {}), None)
    saving.future.result(DEADLINE)
    again = engine.listen(window=200, sampling=GREEDY, restore=path)
    for one in (listener, again):
        one.feed("Four.")
        one.flush(DEADLINE)
    assert attended(again) == attended(listener)


def test_a_snapshot_of_version_1_is_continued(engine, tmp_path, monkeypatch):
    """Its fingerprint differs from the one that is written now."""
    path, fingerprint = tmp_path / "stream.safetensors", Model.fingerprint
    listener = engine.listen(window=60, sampling=GREEDY)
    listener.feed(TEXT[:500])
    listener.flush(DEADLINE)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "VERSION", 1)
        patch.setattr(Model, "fingerprint", lambda model: fingerprint(model, 1))
        listener.save(path, {"n": 1})
    assert snapshot.load_snapshot(path).version == 1
    again = engine.listen(window=60, sampling=GREEDY, restore=path)
    again.wait(DEADLINE)
    assert again.restored == {"n": 1} and again.stats.notices == []
    assert bits(again) == bits(listener)


def test_an_unusable_snapshot_is_reported_and_not_used(engine, tmp_path, tmp_path_factory):
    path = tmp_path / "stream.safetensors"
    missing = engine.listen(window=60, restore=path)
    missing.wait(DEADLINE)
    assert missing.restored is None and missing.stats.notices == []
    missing.save(path, {"n": 1})
    whole = path.read_bytes()
    begin = {"window": 60, "restore": path}
    for change, damage in (
        ({"window": 61}, whole),
        ({"system": "Another."}, whole),
        ({}, whole[:-1]),
        ({}, b""),
        ({}, whole.replace(b"listener", b"lustener")),
    ):
        path.write_bytes(damage)
        listener = engine.listen(**{**begin, **change})
        listener.wait(DEADLINE)
        assert listener.restored is None
        assert "starts empty" in listener.stats.notices[0]
        listener.feed("One two three.")
        listener.flush(DEADLINE)
        assert attended(listener).endswith("<|im_start|>user\nOne two three.")
        listener.close(DEADLINE)
    path.write_bytes(whole)
    config = tiny_config()
    other = write_tiny(tmp_path_factory.mktemp("other"), config, tiny_weights(config, seed=9))
    engine.close(DEADLINE)
    with engine_of(other) as another:
        listener = another.listen(**begin)
        listener.wait(DEADLINE)
        assert listener.restored is None and "another model" in listener.stats.notices[0]


def test_forged_headers_are_refused(engine, tmp_path):
    from mlx_stream.engine.listener_snapshot import parse_listener_state

    listener = engine.listen(window=60)
    path = tmp_path / "stream.safetensors"
    listener.save(path, {"n": 1, "s": "x"})
    about = snapshot.load_snapshot(path).about
    assert parse_listener_state(about, 300).note == {"n": 1, "s": "x"}
    for name, wrong in (
        *((name, None) for name in about),
        *(("ids", value) for value in ([300], [-1], [1.0], [True], "12", {"1": 2})),
        *(("note", value) for value in ([], {"a": []}, {"a": 1.0}, {"a": "x" * 70_000})),
        ("began", "yesterday"),
        ("held", "\ud800"),
        ("begun", 1),
        ("kind", "conversation"),
    ):
        with pytest.raises((errors.SnapshotError, errors.ValueRefused)):
            parse_listener_state({**about, name: wrong}, 300)
    with pytest.raises(errors.SnapshotError):
        parse_listener_state(json.loads(json.dumps({**about, "more": 1})), 300)
    for note in ({"a": 1.5}, {1: "a"}, {"a": "x" * 70_000}, {"a": True}):
        with pytest.raises(errors.ValueRefused):
            listener.save(path, note)


def test_a_stream_listens_while_others_reply_and_asks_in_asyncio(engine):
    listener = engine.listen(window=200, sampling=GREEDY)
    chat = engine.session(sampling=GREEDY)
    expected = said(chat.reply("Hi", max_tokens=60))
    chat.undo().result(DEADLINE)

    def feed():
        for at in range(0, len(TEXT), 500):
            listener.feed(TEXT[at : at + 500], timeout=DEADLINE)
        listener.flush(DEADLINE)

    found = []
    together(feed, lambda: found.append(said(chat.reply("Hi", max_tokens=60))))
    assert found == [expected]

    async def ask():
        return [piece async for piece in listener.aask("What?", max_tokens=7)]

    pieces = asyncio.run(ask())
    assert len(said(pieces)) == 7 and pieces[-1].finish == "length"
    assert pieces[-1].attended == listener.stats.attended or pieces[-1].attended


def test_a_model_that_cannot_be_asked_is_refused(tmp_path):
    config = tiny_config()
    folder = write_tiny(tmp_path / "plain", config, tiny_weights(config))
    edit(folder / "tokenizer_config.json", chat_template=None)
    with engine_of(folder) as engine:
        with pytest.raises(errors.TemplateError, match="no chat template"):
            engine.listen().wait(DEADLINE)
        with pytest.raises(errors.ValueRefused, match="backlog"):
            engine.listen(backlog=0)
        with pytest.raises(errors.ValueRefused, match="max_tokens"):
            engine.listen(max_tokens=0)
