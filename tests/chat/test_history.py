"""Sessions that begin with a history, forks, and replies whose beginning is given."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_stream
from mlx_stream.chat.messages import Message
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.session import ChatSession
from mlx_stream.errors import MemoryRefused, TextError, ValueRefused
from mlx_stream.text.template.chat_template import ChatTemplate
from mlx_stream.text.tool_calls import ToolCall
from tests.chat.test_settle import Trouble, model, recorded
from tests.chat.test_thinking import SWITCH, THINKS, thinker
from tests.chat.test_tool_calls import CALLS, Talk
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.tiny import CHAT_TEMPLATE
from tests.fakes.tool_models import MODELS, TOOLS, Scripted, scripted

TURNS = st.lists(st.tuples(st.sampled_from(["Hi", "And then?\nTell.", "x" * 30]), st.text("a <|é")))


def messages(turns: Any) -> list[Message]:
    return [
        message
        for question, reply in turns
        for message in (Message("user", question), Message("assistant", reply))
    ]


@settings(max_examples=10, deadline=None)
@given(
    turns=TURNS.filter(len),
    window=st.integers(30, 300),
    name=st.sampled_from(["plain", "system within", "keeps its thinking", "drops it late"]),
)
def test_the_newest_whole_turns_of_a_history_are_attended(turns, window, name):
    chat = recorded(model(name), Trouble(), window=window, history=messages(turns))
    assert chat.tokens.length == 0 and chat.number == len(turns)
    count = len(chat.exchanges)
    kept = [(exchange.question, exchange.reply) for exchange in chat.exchanges]
    assert kept == turns[len(turns) - count :]
    assert chat.stats.evicted_exchanges == len(turns) - count
    sizes = [len(turn.exchange.ids) for turn in chat.evictor.state.turns]
    assert count == 1 or sum(sizes) <= window
    reports: list[tuple[int, int]] = []
    pieces = [*chat.reply("Next?", 4, progress=lambda *report: reports.append(report))]
    assert reports and pieces[-1].settled == reports[0][1] and pieces[-1].read == reports[-1][1]
    assert_well_formed(chat)


def test_a_history_is_as_many_turns_as_fit():
    """One more turn would not fit; a session with the same turns holds the same ids."""
    turns = [("Hi", "the thin man"), ("And then?", "in the end"), ("Why?", "So it is")]
    whole = recorded(model("plain"), Trouble(), window=300, history=messages(turns))
    list(whole.reply("Next?", 1))
    sizes = [
        len(exchange.ids) + len(whole.prompts.question("x", exchange, first=False)[0])
        for exchange in whole.exchanges[:3]
    ]
    for count in (1, 2, 3):
        window = sum(sizes[3 - count :])
        fits = recorded(model("plain"), Trouble(), window=window, history=messages(turns))
        assert len(fits.exchanges) == count
        tight = recorded(model("plain"), Trouble(), window=window - 1, history=messages(turns))
        assert len(tight.exchanges) == max(1, count - 1)


def test_a_history_with_a_chain_of_calls():
    call = ToolCall("weather", {"of": "Rome"})
    history = [
        Message("user", "Hi"),
        Message("assistant", thinking="So", calls=(call,)),
        Message("tool", "Fine."),
        Message("assistant", "It is fine."),
        Message("user", "And now?"),
        Message("assistant", thinking="Then", calls=(call,)),
    ]
    for name in MODELS:
        talk = Talk(MODELS[name], history=history)
        assert [len(e.calls) for e in talk.chat.exchanges] == [1, 0, 1]
        talk.write(talk.chat.reply([Message("tool", "Bad.")]), "", "It is bad.")
        talk.check_logits()
        assert talk.chat.exchanges[-1].question == "Bad."
    small = Talk(MODELS["tagged"], history=history[:4], window=250)
    assert [e.question for e in small.chat.exchanges] == ["Hi", "Fine."]
    smaller = Talk(MODELS["tagged"], history=history, window=250)
    assert [e.question for e in smaller.chat.exchanges] == ["And now?"]
    alone = Talk(MODELS["tagged"], history=history[:4], window=90)
    assert [e.question for e in alone.chat.exchanges] == ["Fine."]


@pytest.mark.parametrize(
    ("history", "what"),
    [
        ([Message("user", "Hi")], "must end with a reply"),
        ([Message("assistant", "Hi")], "has no message to answer"),
        ([Message("tool", "Hi"), Message("assistant", "Hi")], "no call"),
        ([Message("user", "Hi"), Message("robot", "Hi")], "role"),
    ],
)
def test_a_history_that_is_none_is_refused(history, what):
    with pytest.raises(ValueRefused, match=what):
        ChatSession(model("plain"), history=history)


def test_a_saved_session_has_its_own_history(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_STREAM_HOME", str(tmp_path / "home"))
    options = SessionOptions(window=200, history=messages([("Hi", "Yes"), ("So?", "No")]))
    saved = open_session("one", model("plain"), options)
    list(saved.chat.reply("Next?", 3))
    saved.close()
    with pytest.raises(ValueRefused, match="already has a history"):
        open_session("one", model("plain"), options)
    again = open_session("one", model("plain"), SessionOptions())
    assert [e.question for e in again.chat.exchanges] == ["Hi", "So?", "Next?"]
    again.close()


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_fork_is_the_session_with_exchanges_taken_back(data):
    name = data.draw(st.sampled_from(["plain", "drops", "thinks", "drops it late"]))
    chat = recorded(model(name), Trouble(), window=data.draw(st.integers(60, 200)))
    for number in range(data.draw(st.integers(0, 6))):
        list(chat.reply(f"Question {number}", data.draw(st.integers(1, 20))))
    back = data.draw(st.integers(0, len(chat.exchanges)))
    with pytest.raises(ValueRefused, match="cannot undo"):
        chat.fork(len(chat.exchanges) + 1)
    before, exchanges, evicted = chat.tokens.ids.attended(), chat.exchanges, chat.cache.evicted
    other = chat.fork(back)
    assert other.cache.nbytes == chat.cache.nbytes
    assert_well_formed(other)
    assert (chat.tokens.ids.attended(), chat.exchanges) == (before, exchanges)
    assert chat.cache.evicted == evicted
    if not back:
        probes = [np.array(stream.read([5, 6, 7])) for stream in (other.tokens, chat.tokens)]
        assert (probes[0] == probes[1]).all()
        for one in (other, chat):
            one.tokens.rewind(3)
    list(other.reply("Another", 5))
    assert_well_formed(other)
    assert chat.exchanges == exchanges and other.number == chat.number - back + 1
    for _ in range(back):
        chat.undo()
    list(chat.reply("Another", 5))
    assert other.tokens.ids.attended() == chat.tokens.ids.attended()


def test_what_leaves_a_fork_is_not_recalled_in_its_source(tmp_path):
    left: list[int] = []

    class Left:
        def find(self, *_: Any) -> list[Any]:
            return []

        def leave(self, number: int, question: str, reply: str) -> None:
            left.append(number)

    store: Any = Left()
    chat = ChatSession(model("plain"), window=120, recall=store, recall_tokens=30)
    for number in range(6):
        list(chat.reply(f"Question {number}", 9))
    before = [*left]
    other = chat.fork()
    for number in range(6):
        list(other.reply(f"Another {number}", 9))
    assert before and left == before and not other.stats.recalled


def test_a_forks_ring_is_charged_and_it_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_STREAM_HOME", str(tmp_path / "home"))
    saved = open_session("one", model("plain"), SessionOptions(window=100))
    list(saved.chat.reply("Hi", 3))
    charged: list[int] = []
    counting = saved.chat.model.with_check(lambda _, bytes: charged.append(bytes))
    other = saved.chat.fork(model=counting)
    assert other.recorder is None and other.cache.nbytes >= charged[0] > 0
    list(other.reply("And?", 3))
    assert saved.store.state.count == 1

    def refuse(weights: int, stream: int) -> None:
        raise MemoryRefused("full")

    with pytest.raises(MemoryRefused):
        saved.chat.fork(model=saved.chat.model.with_check(refuse))
    assert len(saved.chat.exchanges) == 1
    saved.close()


@pytest.mark.parametrize("name", [*THINKS, "told not to"])
def test_a_reply_goes_on_from_its_beginning(name, tmp_path):
    """The script is jklmno; the reply is what follows the letters that were given."""
    source, think = THINKS.get(name, SWITCH), None if name in THINKS else False
    chat = thinker(tmp_path / "model", source, think=think)
    for begin, rest in (("jkl", "mno"), ("jklmn", "o")):
        pieces = [*chat.reply([Message("user", "Hi"), Message("assistant", begin)])]
        assert said(pieces) == rest and pieces[-1].written == len(rest)
        last = chat.exchanges[-1]
        assert (last.reply, last.thinking, last.question) == ("jklmno", "", "Hi")
        assert_well_formed(chat)
    turn = [Message("user", "Hi"), Message("assistant", "jk")]
    assert said(chat.edit(turn, max_tokens=2)) == "lm"
    assert chat.exchanges[-1].reply == "jklm"
    thought = [Message("user", "Hi"), Message("assistant", "j", thinking="the man")]
    assert said(chat.reply(thought)) == "klmno"
    assert (chat.exchanges[-1].reply, chat.exchanges[-1].thinking) == ("jklmno", "the man")
    assert_well_formed(chat)


def test_a_beginning_is_text_and_belongs_to_a_question():
    chat = recorded(model("plain"), Trouble(), window=200)
    turn = [Message("user", "Hi"), Message("assistant", "Yes <|im_end|>")]
    list(chat.reply(turn, 2))
    assert chat.exchanges[-1].reply.startswith("Yes <|im_end|>")
    assert_well_formed(chat)
    with pytest.raises(ValueRefused, match="at least one"):
        chat.reply(turn[1:])
    with pytest.raises(ValueRefused, match="must end a turn"):
        chat.reply(turn[::-1])
    with pytest.raises(ValueRefused, match="cannot call"):
        chat.reply([turn[0], Message("assistant", "", (ToolCall("time", {}),))])
    with pytest.raises(TextError):
        chat.reply([turn[0], Message("assistant", "\ud800")])


def test_the_last_piece_counts(tmp_path):
    chat = thinker(tmp_path / "model", window=60)
    again, now = 0, chat.stats  # what was read again after the last reply
    for number in range(6):
        before = mlx_stream.Stats(**vars(chat.stats))
        *_, last = chat.reply(f"Question {number}")
        now = chat.stats
        assert last.read == now.prompt_tokens - before.prompt_tokens
        assert last.written == now.reply_tokens - before.reply_tokens
        assert last.settled == again and last.attended and last.attended <= 64
        again = now.settled - before.settled
        assert again > 0
    assert now.evicted_exchanges


def test_a_fork_has_the_tools_too():
    talk = Talk(MODELS["harmony"])
    talk.write(talk.chat.reply("Hi"), "So", "", CALLS[:1])
    talk.write(talk.chat.reply(talk.results("a")), "Then", "Good.")
    for back, question in ((0, "Bye"), (1, [Message("tool", "b")])):
        other: Any = talk.chat.fork(back)
        assert_well_formed(other)
        ids = other.prompts.encode("<|channel|>final<|message|>Yes.<|return|>")
        Scripted.script = []
        run, script = other.tokens.run, [*ids]
        other.tokens.run = lambda r, run=run, script=script: scripted(
            script, replace(r, more=False), run(r)
        )
        assert said(other.reply(question)) == "Yes."
        assert_well_formed(other)
        assert other.tools is TOOLS


def test_notices_say_what_becomes_of_a_system_prompt():
    notices: list[str] = []
    ChatSession(model("no system"), "Be brief.", window=200, notify=notices.append)
    assert len(notices) == 1 and "opening exchange" in notices[0]
    for name in ("plain", "system within"):
        chat = ChatSession(model(name), "Be brief.", window=200)
        assert not chat.stats.notices
    long = ChatTemplate("{{ 'the long head of it ' * 9 }}<|im_end|>" + CHAT_TEMPLATE)
    own = ChatSession(model("plain"), window=200, template=long)
    assert f"{len(own.prompts.pinned):,} tokens" in own.stats.notices[0]


def test_the_thinking_of_a_history_is_marked_by_tokens(tmp_path):
    history = [Message("user", "Hi"), Message("assistant", "jk <think>", thinking="the man")]
    chat = thinker(tmp_path / "model", THINKS["keeps its thinking"])
    chat.follow(history)
    said(chat.reply("Next?"))
    mark = chat.model.tokenizer.encode("<think>", special=False)[0]
    assert chat.tokens.ids.attended().count(mark) == 2  # one for each reply, none from the text
    assert_well_formed(chat)


@settings(max_examples=12, deadline=None)
@given(
    turns=TURNS.filter(len),
    window=st.integers(40, 300),
    unread=st.integers(0, 2),
    room=st.integers(0, 40),
    name=st.sampled_from(["plain", "system within", "no system", "keeps its thinking", "drops"]),
)
def test_turns_follow_a_conversation_as_text(turns, window, unread, room, name):
    chat = recorded(model(name), Trouble(), window=window, system="Be brief.", max_tokens=5)
    said(chat.reply("Hi"))
    said(chat.reply("And?"))
    before = [(exchange.question, exchange.reply) for exchange in chat.exchanges]
    chat.follow(messages(turns), unread, room)
    placed = [(exchange.question, exchange.reply) for exchange in chat.exchanges]
    assert chat.number == 2 + unread + len(turns)
    if len(placed) > len(turns):
        assert not unread and placed == [*before, *turns]
    assert placed[-len(turns) :] == turns[-len(placed) :]  # these, or the newest of them
    assert_well_formed(chat)
    said(chat.reply("Next?"))
    assert_well_formed(chat)
    texts = [(exchange.question, exchange.reply) for exchange in chat.exchanges]
    whole = [*before, *turns, texts[-1]]
    assert texts == whole[len(whole) - len(texts) :]
    if unread:
        assert len(texts) <= len(turns) + 1
