"""A conversation that was closed goes on as if it had not been; and what is kept of it, when."""

import os
import shutil
import time
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_stream
from mlx_stream.chat.resume import SessionOptions, begin, header_of, open_session
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError, ValueRefused
from mlx_stream.sampling import Sampling
from tests.fakes.shell import edit
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

QUESTIONS = ("Hello there.", "And then?\nTell me.", "Why äöü €?", "Go on", "x" * 30)
OPTIONS = SessionOptions(
    system="You are brief.", window=120, sampling=Sampling(1.0, top_p=0.95), max_tokens=20
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(max_position_embeddings=512)
    return write_tiny(tmp_path_factory.mktemp("model"), config, tiny_weights(config))


@pytest.fixture(scope="module")
def model(folder):
    return mlx_stream.load(folder, dtype="float32", keep_quantized=False)


def said(pieces):
    return "".join(piece.text for piece in pieces)


def opened(model, name="s", notices=None, **changes) -> Any:
    def notify(notice):
        if notices is not None and "again" in notice:
            notices.append(notice)

    return open_session(name, model, replace(OPTIONS, **changes), notify)


def state_of(conversation):
    state = conversation.chat.tokens.state()
    return {
        k: np.array(v.astype(mx.float32)) if isinstance(v, mx.array) else v
        for k, v in state.items()
    }


def same(first, second):
    return all(np.array_equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def four_bits(folder, tmp_path_factory):
    """Return the folder of the same model in 4 bits, in mlx-lm's layout."""
    path = tmp_path_factory.mktemp("four_bits")
    settings: dict[str, Any] = {"group_size": 32, "bits": 4}
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    tensors = {}
    for name, weight in loaded.items():
        if weight.ndim < 2:
            tensors[name] = weight
            continue
        parts = zip(("weight", "scales", "biases"), mx.quantize(weight, **settings), strict=True)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts}
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    for file in folder.glob("*.json"):
        shutil.copy(file, path)
    edit(path / "config.json", quantization=settings)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return the folder of a model whose keys can be quantized."""
    config = tiny_config(head_dim=64)
    return write_tiny(tmp_path_factory.mktemp("wide"), config, tiny_weights(config))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "4 bits", "8-bit keys"])
@pytest.mark.parametrize("turns", [1, 3, 40])
def test_what_follows_is_bit_for_bit_that_of_a_conversation_never_closed(
    folder, four_bits, wide, kind, turns
):
    """40 turns wrap the ring many times and turn it back several times."""
    if kind == "4 bits":
        model = mlx_stream.load(four_bits, keep_quantized=True)
        assert model.quantized
    elif kind == "8-bit keys":
        model = mlx_stream.load(wide, dtype="float32")
    else:
        model = mlx_stream.load(folder, dtype=kind, keep_quantized=False)
    sampling = Sampling(1.0, top_p=0.95, seed=7)
    kv_bits = 8 if kind == "8-bit keys" else None
    never, notices = begin(model, replace(OPTIONS, sampling=sampling, kv_bits=kv_bits)), []
    never.chat.cache.clock_limit = 600
    conversation = opened(model, sampling=sampling, kv_bits=kv_bits)
    for turn in range(turns):
        conversation.chat.cache.clock_limit = 600
        question = QUESTIONS[turn % 5]
        expected = said(never.reply(question))
        assert said(conversation.reply(question)) == expected
        if turn % 4 == 0:
            assert said(conversation.retry()) == said(never.retry())
        conversation.close()
        conversation = opened(model, notices=notices)
        assert same(state_of(never), state_of(conversation))
    assert notices == []
    assert [e.reply for e in never.chat.exchanges] == [e.reply for e in conversation.chat.exchanges]
    if turns == 40:
        assert never.stats.evicted > 500
        cache = never.chat.cache
        assert cache.state()["clock"] <= cache.clock_limit < cache.length - 500
    conversation.close()


def test_without_a_snapshot_it_is_read_again_and_said(model):
    conversation = opened(model)
    for question in QUESTIONS * 3:
        said(conversation.reply(question))
    held = [e.question for e in conversation.chat.exchanges]
    attended = conversation.chat.tokens.attended_ids()
    conversation.close()
    snapshot = session_paths("s").snapshot
    snapshot.unlink()
    notices = []
    conversation = opened(model, notices=notices)
    assert len(notices) == 1 and f"reading {len(held)} exchanges again" in notices[0]
    assert [e.question for e in conversation.chat.exchanges] == held
    # The last id of a reply that was cut is read at once here, else with the next question.
    assert conversation.chat.tokens.attended_ids()[: len(attended)] == attended
    said(conversation.reply("And?"))
    conversation.close()
    assert snapshot.exists()


def test_an_older_snapshot_is_caught_up(model):
    conversation = opened(model)
    for question in QUESTIONS * 2:
        said(conversation.reply(question))
    conversation.write_snapshot()
    old = session_paths("s").snapshot.read_bytes()
    for question in QUESTIONS:
        said(conversation.reply(question))
    never = state_of(conversation)
    held = [e.question for e in conversation.chat.exchanges]
    conversation.close()
    session_paths("s").snapshot.write_bytes(old)
    notices = []
    conversation = opened(model, notices=notices)
    assert "reading 5 exchanges again: they are not in s.safetensors" in notices[0]
    assert [e.question for e in conversation.chat.exchanges] == held
    assert never["floor"] == conversation.chat.cache.state()["floor"]
    said(conversation.reply("And?"))
    conversation.close()


def test_a_snapshot_of_what_was_taken_back_is_not_used(model):
    conversation = opened(model)
    for question in QUESTIONS:
        said(conversation.reply(question))
    conversation.write_snapshot()
    old = session_paths("s").snapshot.read_bytes()
    conversation.undo()
    said(conversation.reply("Something else"))
    conversation.close()
    session_paths("s").snapshot.write_bytes(old)
    notices = []
    conversation = opened(model, notices=notices)
    assert "taken back since" in notices[0]
    assert conversation.last.question == "Something else"
    assert session_paths("s").snapshot.with_name("s.safetensors.unusable").exists()
    conversation.close()


def test_another_model_reads_the_texts(model, tmp_path):
    config = tiny_config(vocab_size=320, hidden_size=32)
    other = mlx_stream.load(write_tiny(tmp_path, config, tiny_weights(config)), dtype="float32")
    conversation = opened(model)
    for question in QUESTIONS:
        said(conversation.reply(question))
    before = [(e.question, e.reply) for e in conversation.chat.exchanges]
    conversation.close()
    for loaded in (other, model):
        notices = []
        conversation = opened(loaded, notices=notices)
        assert "again: the model, or how it is loaded, changed" in notices[0]
        held = [(e.question, e.reply) for e in conversation.chat.exchanges]
        assert held == before[len(before) - len(held) :] and held
        conversation.close()


def test_every_turn_is_in_the_transcript_when_it_ends(model):
    # With a seed: now and then a reply ends before it has begun, and is not interrupted.
    conversation = opened(model, sampling=Sampling(1.0, top_p=0.95, seed=7))
    store = conversation.saved.store
    said(conversation.reply("One?"))
    pieces = conversation.reply("Two?")
    next(pieces)
    assert store.count == 1
    pieces.close()
    assert [e.finish for e in store.exchanges()][1] == "interrupted"
    first = store.exchanges()[1].reply
    for _ in range(3):
        said(conversation.retry())
    assert store.count == 2 and store.exchanges()[1].reply != first
    said(conversation.edit("Two and a half?"))
    assert [e.question for e in store.exchanges()] == ["One?", "Two and a half?"]
    left = conversation.reply("Three?")
    next(left)
    said(conversation.reply("Four?"))  # ends the one before
    assert [e.question for e in store.exchanges()][2:] == ["Three?", "Four?"]
    conversation.undo()
    conversation.clear()
    assert store.count == 3 and store.progress.first == 4
    conversation.close()
    conversation = opened(model)
    assert conversation.last is None and conversation.saved.store.count == 3
    said(conversation.reply("Five?"))
    conversation.close()


def test_a_full_disk_is_said_and_nothing_is_lost_once_there_is_room(model):
    conversation = opened(model)
    said(conversation.reply("One?"))
    store = conversation.saved.store
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(SessionError, match="full"):
        for _ in range(200):
            said(conversation.reply("Is there room? " * 4))
    with pytest.raises(SessionError, match="full"):
        said(conversation.reply("Is there room? " * 4))
    written = store.count
    store.connection.execute("PRAGMA max_page_count = 100000")
    said(conversation.reply("Now?"))
    assert store.count == written + 3
    conversation.close()


def test_one_process_has_it_open(model):
    conversation = opened(model)
    with pytest.raises(SessionError, match=f"process {os.getpid()}"):
        opened(model)
    conversation.close()
    conversation.close()
    opened(model).close()


def test_a_conversation_without_a_name_gets_one(model, tmp_path):
    conversation = begin(model, OPTIONS)
    said(conversation.reply("One?"))
    with pytest.raises(ValueRefused, match="no name"):
        conversation.save(None)
    assert "--session talk" in conversation.save("talk")
    with pytest.raises(ValueRefused, match="'talk'"):
        conversation.save("other")
    said(conversation.reply("Two?"))
    for suffix in ("md", "json"):
        assert "2 exchanges" in conversation.export(tmp_path / f"talk.{suffix}")
        assert "Two?" in (tmp_path / f"talk.{suffix}").read_text()
    with pytest.raises(SessionError, match="there is a file of that name"):
        conversation.export(tmp_path / "talk.md")
    with pytest.raises(SessionError, match=r"\.md or \.json"):
        conversation.export(tmp_path / "talk.txt")
    conversation.close()
    assert (tmp_path / "talk.md").stat().st_mode & 0o777 == 0o600
    again = opened(model, "talk")
    assert [e.question for e in again.chat.exchanges] == ["One?", "Two?"]
    again.close()


def test_what_is_not_asked_for_stays_as_it_was(model):
    conversation = opened(model)
    said(conversation.reply("One?"))
    conversation.set_system("Another.")
    conversation.resize(150)
    conversation.close()
    again = open_session("s", model, SessionOptions(sampling=Sampling(1.0)))
    assert (again.system, again.stats.window) == ("Another.", 150)
    again.close()
    notices = []
    third = open_session("s", model, SessionOptions(window=90), notices.append)
    assert third.stats.window == 90
    assert any("again: the window changed" in notice for notice in notices)
    third.close()
    with Store.open(session_paths("s").database) as store:
        assert store.header.window == 90 and store.header.system == "Another."


def test_a_seed_that_is_asked_for_begins_its_numbers_anew(model):
    sampling = Sampling(1.0, seed=7)
    conversation = opened(model, sampling=sampling)
    said(conversation.reply("One?"))
    on = conversation.chat.sampler.state()
    conversation.close()
    unasked = opened(model, sampling=Sampling(1.0))
    assert unasked.chat.sampler.state() == on
    unasked.close()
    asked = opened(model, sampling=sampling)
    assert asked.chat.sampler.state() == begin(model, asked_for(7)).chat.sampler.state() != on
    asked.close()


def asked_for(seed):
    return replace(OPTIONS, sampling=Sampling(1.0, seed=seed))


def test_a_model_s_folder_is_remembered_whole(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    loaded = mlx_stream.load(folder.name, dtype="float32")
    conversation = opened(loaded)
    said(conversation.reply("One?"))
    conversation.close()
    monkeypatch.chdir("/")
    header = header_of("s")
    assert header is not None and header.model == str(folder)


def test_a_snapshot_is_written_now_and_then(model, monkeypatch):
    from mlx_stream.chat import conversation as module

    conversation = opened(model)
    said(conversation.reply("One?"))
    assert not session_paths("s").snapshot.exists()
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SNAPSHOTS", 0)
    time.sleep(0.01)
    said(conversation.reply("Two?"))
    assert session_paths("s").snapshot.stat().st_mode & 0o777 == 0o600
    conversation.close()


def test_what_was_cleared_stays_out_of_attention(model):
    """The snapshot is of before, and of the same transcript."""
    conversation = opened(model)
    for question in QUESTIONS[:3]:
        said(conversation.reply(question))
    conversation.close()
    conversation = opened(model)
    conversation.clear()
    never = conversation.chat.tokens.attended_ids()
    conversation.close()
    conversation = opened(model)
    assert conversation.last is None
    assert conversation.chat.tokens.attended_ids() == never
    said(conversation.reply("Four?"))
    # The snapshot is still that of before, as after a crash.
    assert conversation.saved.store.progress.first == 4
    conversation.saved.close()
    notices = []
    conversation = opened(model, notices=notices)
    assert "reading 1 exchange again" in notices[0]
    assert [e.question for e in conversation.chat.exchanges] == ["Four?"]
    conversation.close()
