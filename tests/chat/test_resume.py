"""A closed conversation continues as if it had stayed open, and each part is saved when due."""

import gc
import json
import math
import shutil
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_stream
from mlx_stream.chat import saving, summaries
from mlx_stream.chat.export import write_export
from mlx_stream.chat.resume import SessionOptions, header_of, new_chat, open_session
from mlx_stream.chat.saving import SavedSession, saved_as, saved_turns
from mlx_stream.chat.schema import ANSWERED, ASKED
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError, TextError
from mlx_stream.program.notices import discard
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import QUESTIONS, leave_unanswered, said
from tests.fakes.killed_chat import check_attended, turns_of
from tests.fakes.shell import edit
from tests.fakes.tiny import tiny_config, write_model
from tests.models.test_weights import FOUR_BITS, quantize

OPTIONS = SessionOptions(
    system="You are brief.", window=120, sampling=Sampling(1.0, top_p=0.95), max_tokens=20
)


def opened(model, name="s", notices=None, **changes) -> SavedSession:
    def notify(notice):
        if notices is not None and "again" in notice:
            notices.append(notice)

    return open_session(name, model, replace(OPTIONS, **changes), notify)


def unsaved(model, options=OPTIONS):
    return new_chat(model, options, discard)


def state_of(chat):
    state = chat.tokens.state()
    return {
        k: np.array(v.astype(mx.float32)) if isinstance(v, mx.array) else v
        for k, v in state.items()
    }


def same(first, second):
    return all(np.array_equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def four_bits(folder, tmp_path_factory):
    """Return the folder of the same model in 4 bits, in mlx-lm's layout."""
    path = Path(shutil.copytree(folder, tmp_path_factory.mktemp("four_bits"), dirs_exist_ok=True))
    config, tensors, _ = quantize(tiny_config(head_dim=64), FOUR_BITS)
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    edit(path / "config.json", quantization=config["quantization"])
    return path


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "4 bits", "8-bit keys"])
def test_a_resumed_conversation_continues_bit_for_bit(folder, four_bits, kind):
    """The turns wrap the ring many times and rotate it back several times."""
    if kind == "4 bits":
        model = mlx_stream.load(four_bits, keep_quantized=True)
        assert model.quantized
    else:
        dtype = "bfloat16" if kind == "bfloat16" else "float32"
        model = mlx_stream.load(folder, dtype=dtype, keep_quantized=False)
    sampling = Sampling(1.0, top_p=0.95, seed=7)
    kv_bits = 8 if kind == "8-bit keys" else None
    never, notices = unsaved(model, replace(OPTIONS, sampling=sampling, kv_bits=kv_bits)), []
    never.cache.clock_limit = 600
    saved = opened(model, sampling=sampling, kv_bits=kv_bits)
    for turn in range(40):
        saved.chat.cache.clock_limit = 600
        question = QUESTIONS[turn % 5]
        expected = said(never.reply(question))
        assert said(saved.chat.reply(question)) == expected
        if turn % 4 == 0:
            assert said(saved.chat.retry()) == said(never.retry())
        saved.close()
        saved = opened(model, notices=notices)
        assert same(state_of(never), state_of(saved.chat))
    assert notices == []
    assert [e.reply for e in never.exchanges] == [e.reply for e in saved.chat.exchanges]
    assert never.stats.evicted > 500
    cache = never.cache
    assert cache.state()["clock"] <= cache.clock_limit < cache.length - 500
    saved.close()


def states(saved):
    return [(turn.state, turn.exchange.question) for turn in saved.store.turns()]


def test_every_turn_is_in_the_transcript_when_it_ends(model):
    # The seed is fixed, because now and then a reply ends immediately and is not interrupted.
    saved = opened(model, sampling=Sampling(1.0, top_p=0.95, seed=7))
    store, chat = saved.store, saved.chat
    said(chat.reply("One?"))
    pieces = chat.reply("Two?")
    assert store.state.count == 1, "nothing has been read yet"
    next(pieces)
    assert states(saved) == [(ANSWERED, "One?"), (ASKED, "Two?")]
    pieces.close()
    assert [e.finish for e in store.exchanges().values()][1] == "interrupted"
    first = store.exchanges()[2].reply
    for _ in range(3):
        said(chat.retry())
    assert store.state.count == 2 and store.exchanges()[2].reply != first
    pieces = chat.retry()
    next(pieces)
    # A question that is answered again keeps its answer until there is a new one.
    assert states(saved) == [(ANSWERED, "One?"), (ANSWERED, "Two?")]
    pieces.close()
    pieces = chat.edit("Two and a half?")
    next(pieces)
    assert states(saved) == [(ANSWERED, "One?"), (ASKED, "Two and a half?")]
    said(pieces)
    assert states(saved) == [(ANSWERED, "One?"), (ANSWERED, "Two and a half?")]
    left = chat.reply("Three?")
    next(left)
    said(chat.reply("Four?"))  # this ends the previous reply
    assert states(saved)[2:] == [(ANSWERED, "Three?"), (ANSWERED, "Four?")]
    chat.undo()
    chat.clear()
    assert store.state.count == 3 and store.state.first == 4
    saved.close()
    saved = opened(model)
    assert saved.chat.exchanges == [] and saved.store.state.count == 3
    said(saved.chat.reply("Five?"))
    assert saved.store.state.first == 4 and saved.chat.number == 4
    saved.close()


@pytest.mark.parametrize("question", ["\ud800", ""])
def test_a_question_that_is_refused_changes_nothing(model, question):
    saved = opened(model)
    for each in QUESTIONS[:2]:
        said(saved.chat.reply(each))
    turns, state = saved.store.turns(), state_of(saved.chat)
    for ask in (saved.chat.edit, saved.chat.reply):
        with pytest.raises(TextError):
            said(ask(question))
        assert saved.store.turns() == turns and saved.chat.number == 2
        assert same(state, state_of(saved.chat))
    saved.close()
    notices = []
    saved = opened(model, notices=notices)
    assert notices == [] and saved.chat.number == 2
    saved.close()


def test_a_conversation_without_a_name_gets_one(model, tmp_path):
    chat = unsaved(model)
    for question in ("Nought?", "One?"):
        said(chat.reply(question))
    assert saved_as(chat) is None
    header, turns = saved_turns(chat)
    assert (header.system, [turn.number for turn in turns]) == ("You are brief.", [1, 2])
    chat.clear()
    said(chat.reply("One!"))
    saved = SavedSession.create(chat, "talk")
    assert saved_as(chat) is saved
    assert [turn.exchange.question for turn in saved.store.turns()] == ["One!"], "what is attended"
    with pytest.raises(SessionError, match="is open in process"):
        SavedSession.create(unsaved(model), "talk")
    assert saved_as(chat) is saved
    said(chat.reply("Two?"))
    assert chat.number == 2
    header, turns = saved_turns(chat)
    assert header.id == saved.store.state.header.id and len(turns) == 2
    write_export(tmp_path / "talk.md", header, turns)
    assert (tmp_path / "talk.md").stat().st_mode & 0o777 == 0o600
    saved.close()
    assert saved_as(chat) is None
    again = opened(model, "talk")
    assert [e.question for e in again.chat.exchanges] == ["One!", "Two?"]
    again.close()


def test_a_conversation_may_get_a_name_in_a_reply(model):
    chat = unsaved(model)
    said(chat.reply("One?"))
    chat.clear()
    endless = dict.fromkeys(chat.prompts.replies.end_ids, -math.inf)
    pieces = chat.reply("Two?", bias=endless)
    next(pieces)
    saved = SavedSession.create(chat, "talk")  # this ends the reply
    assert states(saved) == [(ANSWERED, "Two?")] and chat.number == 1
    assert [piece.finish for piece in pieces] == ["superseded"]
    said(chat.reply("Three?"))
    assert states(saved) == [(ANSWERED, "Two?"), (ANSWERED, "Three?")]
    saved.close()


def test_a_name_that_cannot_be_written_leaves_the_conversation_as_it_was(model, monkeypatch):
    chat = unsaved(model)
    said(chat.reply("One?"))
    (session_paths("talk").database.parent).parent.mkdir(parents=True, exist_ok=True)
    session_paths("talk").database.parent.write_text("no folder")
    with pytest.raises(SessionError):
        SavedSession.create(chat, "talk")
    assert saved_as(chat) is None
    session_paths("talk").database.parent.unlink()
    said(chat.reply("Two?"))
    saved = SavedSession.create(chat, "talk")
    assert states(saved) == [(ANSWERED, "One?"), (ANSWERED, "Two?")]
    saved.close()


def test_options_left_out_stay_as_saved(model):
    saved = opened(model)
    said(saved.chat.reply("One?"))
    saved.chat.restart("Another.", 120)
    saved.chat.restart("Another.", 150)
    saved.close()
    again = open_session("s", model, SessionOptions(sampling=Sampling(1.0)))
    assert (again.chat.system, again.chat.stats.window) == ("Another.", 150)
    again.close()
    notices = []
    third = open_session("s", model, SessionOptions(window=90), notices.append)
    assert third.chat.stats.window == 90
    assert any("again: the window changed" in notice for notice in notices)
    third.close()
    with Store.open(session_paths("s").database) as store:
        assert store.state.header.window == 90 and store.state.header.system == "Another."


def test_a_seed_that_is_asked_for_begins_its_numbers_anew(model):
    sampling = Sampling(1.0, seed=7)
    saved = opened(model, sampling=sampling)
    said(saved.chat.reply("One?"))
    on = saved.chat.sampler.state()
    saved.close()
    unasked = opened(model, sampling=Sampling(1.0))
    assert unasked.chat.sampler.state() == on
    unasked.close()
    asked, new = (
        opened(model, sampling=sampling),
        unsaved(model, replace(OPTIONS, sampling=sampling)),
    )
    assert asked.chat.sampler.state() == new.sampler.state() != on
    asked.close()


def test_a_model_s_folder_is_remembered_whole(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    loaded = mlx_stream.load(folder.name, dtype="float32")
    saved = opened(loaded)
    said(saved.chat.reply("One?"))
    saved.close()
    monkeypatch.chdir("/")
    header = header_of("s")
    assert header is not None and header.model == str(folder)


def test_a_snapshot_is_written_now_and_then(model, monkeypatch):
    saved = opened(model)
    said(saved.chat.reply("One?"))
    assert not session_paths("s").snapshot.exists()
    monkeypatch.setattr(saving, "SECONDS_BETWEEN_SNAPSHOTS", 0)
    time.sleep(0.01)
    said(saved.chat.reply("Two?"))
    assert session_paths("s").snapshot.stat().st_mode & 0o777 == 0o600
    saved.close()


def test_a_reply_that_is_dropped_writes_no_snapshot(model, monkeypatch):
    saved = opened(model)
    said(saved.chat.reply("One?"))
    monkeypatch.setattr(saving, "SECONDS_BETWEEN_SNAPSHOTS", -1)
    pieces = saved.chat.reply("Two?")
    next(pieces)
    del pieces
    gc.collect()
    assert saved.store.turns()[-1].state == ANSWERED
    assert not session_paths("s").snapshot.exists()
    said(saved.chat.reply("Three?"))
    assert session_paths("s").snapshot.exists()
    saved.close()


# --- what is read again and recorded ---


def check_stored(saved):
    """Check that the attended turns have the same ids as in the transcript."""
    held = {turn.number: turn.exchange for turn in saved.chat.evictor.state.turns}
    stored = saved.store.exchanges(saved.store.state.first)
    assert held == {number: exchange for number, exchange in stored.items() if number in held}
    assert saved.chat.number == saved.store.state.count
    check_attended(saved.chat, turns_of(saved.store.turns()))
    return held


WIDE: dict[str, Any] = {"window": 300}


def asked_in_the_middle(model):
    """Return a closed session of four turns whose third was never answered."""
    saved = opened(model, **WIDE)
    for question in QUESTIONS[:2]:
        said(saved.chat.reply(question))
    leave_unanswered(saved, "Was it killed?")
    saved = opened(model, **WIDE)
    said(saved.chat.reply("On we go."))
    saved.close()
    return saved


def test_an_unanswered_question_does_not_spoil_the_snapshot(model):
    before = asked_in_the_middle(model)
    notices = []
    saved = opened(model, notices=notices, **WIDE)
    assert notices == [] and list(check_stored(saved)) == [1, 2, 4]
    assert same(state_of(before.chat), state_of(saved.chat))
    assert said(saved.chat.reply("And?")) == said(before.chat.reply("And?"))
    saved._let_go()  # as if killed
    saved = opened(model, notices=notices, **WIDE)
    assert len(notices) == 1 and "reading 1 exchange again: they are not in" in notices[0]
    assert list(check_stored(saved)) == [1, 2, 4, 5]
    saved.close()


WHY = {
    "no snapshot": "there is no snapshot",
    "damaged": "",
    "window": "the window changed",
    "system": "",
    "another model": "the model or its loading options changed",
}


@pytest.mark.parametrize("how", WHY)
def test_turns_read_again_are_recorded_with_their_new_ids(model, tmp_path, how):
    """The next snapshot must match what is read from the transcript."""
    other = mlx_stream.load(write_model(tmp_path, vocab_size=265, hidden_size=32), dtype="float32")
    asked_in_the_middle(model)
    path, loaded = session_paths("s").snapshot, model
    changes: dict[str, Any] = WIDE
    if how == "no snapshot":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "another model":
        loaded = other
    else:
        changes = {"window": 290} if how == "window" else {**WIDE, "system": "You are kind."}
    with Store.open(session_paths("s").database) as store:
        times = [turn.time for turn in store.turns()]
    why = WHY[how]
    for leave in (SavedSession._let_go, SavedSession._let_go, SavedSession.close):
        notices = []
        saved = opened(loaded, notices=notices, **changes)
        assert len(notices) == 1 and "reading 3 exchanges again" in notices[0]
        assert why in notices[0]
        why = ""  # the turn was read but not saved
        assert list(check_stored(saved)) == [1, 2, 4]
        assert [turn.state for turn in saved.store.turns()][2] == ASKED
        assert [turn.time for turn in saved.store.turns()] == times
        saved.store.verify()
        leave(saved)
    notices = []
    saved = opened(loaded, notices=notices, **changes)
    assert notices == []
    check_stored(saved)
    saved.close()


def test_a_snapshot_is_of_the_stream_too_not_of_the_transcript_alone(model):
    """An undone turn has pushed tokens out, so the stream is not what it was before."""
    saved = opened(model, evict="token")
    for question in QUESTIONS[:2]:
        said(saved.chat.reply(question))
    saved.write_snapshot()
    attended = saved.chat.cache.attended
    said(saved.chat.reply(QUESTIONS[4]))
    saved.chat.undo()
    before = saved.chat.tokens.ids.attended()
    assert len(saved.chat.prompts.pinned) < len(before) < attended
    saved.close()
    saved = opened(model)
    assert saved.chat.tokens.ids.attended() == before
    saved.close()


def test_opening_does_not_report_earlier_evictions(model):
    saved = opened(model)
    said(saved.chat.reply(QUESTIONS[0]))
    saved.chat.clear()
    said(saved.chat.reply(QUESTIONS[1]))
    saved.close()
    notices: list[str] = []
    open_session("s", model, OPTIONS, notices.append).close()
    assert notices == []


def test_two_retries_of_a_question_that_was_left_answer_one_turn(model):
    """A retry finds its question when it starts, not when it was requested."""
    saved = opened(model)
    said(saved.chat.reply(QUESTIONS[0]))
    leave_unanswered(saved, QUESTIONS[1])
    saved = opened(model)
    late = saved.chat.retry()
    said(saved.chat.retry())
    said(late)
    assert list(check_stored(saved)) == [1, 2] and saved.chat.number == 2
    saved.close()


def test_an_interrupt_while_a_question_is_written_leaves_it_to_be_answered(model, monkeypatch):
    saved = opened(model)
    said(saved.chat.reply(QUESTIONS[0]))

    def interrupt(change):
        write(change)
        raise KeyboardInterrupt

    write = saved.store.write
    monkeypatch.setattr(saved.store, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        said(saved.chat.reply(QUESTIONS[1]))
    monkeypatch.undo()
    assert saved.chat.unanswered == QUESTIONS[1]
    said(saved.chat.retry())
    assert list(check_stored(saved)) == [1, 2]
    saved.close()


def test_a_callback_that_raises_keeps_no_answer_off_the_disk(model):
    saved = opened(model)

    def refuse(exchanges: int, tokens: int) -> None:
        raise ArithmeticError

    saved.chat.on_evict = refuse
    with pytest.raises(ArithmeticError):
        for question in QUESTIONS:
            said(saved.chat.reply(question))
    assert saved.store.turns()[-1].state == ANSWERED
    saved.chat.on_evict = None
    saved.close()


def test_a_template_that_refuses_a_turn_of_before_opens_with_those_after_it(model, folder):
    saved = opened(model)
    for question in QUESTIONS[:3]:
        said(saved.chat.reply(question))
    saved._let_go()
    path = folder / "tokenizer_config.json"
    whole = path.read_text()
    refusal = f"message['content'] == {QUESTIONS[1]!r}"
    template = json.loads(whole)["chat_template"]
    body = "{% for message in messages %}"
    assert body in template
    refuse = "{% if " + refusal + " %}{{ raise_exception('not this') }}{% endif %}"
    try:
        edit(path, chat_template=template.replace(body, body + refuse))
        picky = mlx_stream.load(folder, dtype="float32", keep_quantized=False)
    finally:
        path.write_text(whole)
    notices: list[str] = []
    saved = open_session("s", picky, OPTIONS, notices.append)
    assert any("turns up to 2 are left out" in notice for notice in notices)
    assert [e.question for e in saved.chat.exchanges] == [QUESTIONS[2]]
    said(saved.chat.reply(QUESTIONS[3]))
    saved.close()
    notices.clear()
    saved = open_session("s", picky, OPTIONS, notices.append)
    assert notices == [] and len(saved.chat.exchanges) == 2
    assert len(saved.store.turns()) == 4
    saved.close()


@pytest.mark.parametrize("snapshot", [True, False])
def test_cleared_turns_are_not_read_again(model, snapshot):
    saved = opened(model)
    for question in QUESTIONS[:2]:
        said(saved.chat.reply(question))
    saved.write_snapshot()
    said(saved.chat.reply(QUESTIONS[2]))
    saved.chat.clear()
    leave_unanswered(saved, "Was it killed?")
    (found,) = summaries.session_summaries()
    assert (found.exchanges, found.attended) == (4, 0)
    saved = opened(model)
    assert saved.chat.exchanges == [] and saved.chat.unanswered == "Was it killed?"
    said(saved.chat.reply("Anew."))
    saved._let_go()
    if not snapshot:
        session_paths("s").snapshot.unlink()
    notices = []
    saved = opened(model, notices=notices)
    assert len(notices) == 1 and "reading 1 exchange again" in notices[0]
    assert list(check_stored(saved)) == [5] and saved.chat.unanswered == ""
    saved.close()


def test_damage_before_the_attended_turns_does_not_prevent_opening(model):
    saved = opened(model)
    for question in QUESTIONS[:3]:
        said(saved.chat.reply(question))
    saved.chat.clear()
    said(saved.chat.reply("Anew."))
    saved.close()
    connection = sqlite3.connect(session_paths("s").database, isolation_level=None)
    connection.execute("UPDATE messages SET text = 'No.' WHERE turn = 2")
    notices = []
    saved = opened(model, notices=notices)
    assert notices == [] and [e.question for e in saved.chat.exchanges] == ["Anew."]
    saved.chat.clear()
    saved.close()
    # The same holds for a change to the last turn, once nothing is attended.
    connection.execute("UPDATE messages SET text = 'No.' WHERE turn = 4")
    connection.close()
    saved = opened(model)
    assert saved.chat.exchanges == []
    said(saved.chat.reply("On we go."))
    saved.close()
