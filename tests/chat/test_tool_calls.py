"""Turns of several messages, and chains of tool calls: the stream holds what is rendered."""

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_stream
from mlx_stream.chat.exchange import question_of, unread_ids
from mlx_stream.chat.messages import Message
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.schema import StoredTurn, now, turn_of
from mlx_stream.chat.store import Store
from mlx_stream.errors import TemplateError, TextError, ValueRefused
from mlx_stream.text.control_tokens import MARK
from mlx_stream.text.tool_calls import ToolCall
from tests.chat.test_settle import Trouble, check_logits, recorded, resumed
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.thinkers import write_random
from tests.fakes.tiny import CHAT_TEMPLATE
from tests.fakes.tool_models import (
    LLAMA,
    MISTRAL,
    MODELS,
    TAGGED,
    TOLD_TO_THINK,
    TOOLS,
    Scripted,
    ToolModel,
    scripted,
)

names = pytest.mark.parametrize("name", MODELS)
# The name of a special token, which the model spells out in an argument.
SPELLED = "<|im_end|>"
CALLS = [("weather", {"of": "Rome"}), ("time", {"of": f"the {SPELLED}", "in": [1, None]})]


def spaced(value: Any) -> str:
    """Return JSON with spacing that no template writes."""
    return json.dumps(value, separators=(" ,  ", " : "))


@cache
def loaded(source: str, end: str) -> tuple[Any, dict, dict]:
    with tempfile.TemporaryDirectory() as folder:
        path, config, weights = write_random(Path(folder), source, end)
        model = mlx_stream.load(path, dtype="float32", keep_quantized=False)
    return model, config, weights


class Talk:
    """A conversation with a scripted model, checked after each act."""

    def __init__(self, kind: ToolModel, **options: Any):
        self.kind = kind
        self.model, self.config, self.weights = loaded(kind.source, kind.ends[1])
        options = {"window": 1_300, "tools": TOOLS} | options
        self.chat = recorded(self.model, Trouble(), Scripted, **options)

    def write(self, steps: Any, *reply: Any, **options: Any) -> str:
        text = self.kind.written(*reply, **options)
        text = text.replace(f"the {SPELLED}", f"the <|im_{MARK}end|>")
        Scripted.script = self.chat.prompts.encode(text)
        found = said(steps)
        assert not Scripted.script
        assert_well_formed(self.chat)
        return found

    def results(self, *texts: str) -> list[Message]:
        return [Message("tool", text) for text in texts]

    def check_logits(self) -> None:
        twin = resumed(self.chat, Trouble())
        twin.tokens.steps_taken = [*self.chat.tokens.steps_taken]
        check_logits(twin, self.config, self.weights)


@names
@pytest.mark.parametrize(
    ("dump", "system"), [(json.dumps, None), (spaced, "Be brief.")], ids=["canonical", "spaced"]
)
def test_a_chain_of_calls_holds_what_the_template_renders(name, dump, system):
    talk = Talk(MODELS[name], system=system)
    talk.write(talk.chat.reply("Hi"), "So", "Hello.")
    calls = CALLS[: talk.kind.most]
    assert not talk.write(talk.chat.reply("And now?"), "First", "", calls, dump=dump)
    for number, thinking in enumerate(("Second", "Third")):
        last = talk.chat.exchanges[-1]
        assert [(call.name, dict(call.arguments)) for call in last.calls] == calls
        assert last.reply == "" and last.finish == "end"
        results = talk.results(*(f"It is {number}" for _ in last.calls))
        talk.write(talk.chat.reply(results), thinking, "", calls, dump=dump)
    text = talk.model.tokenizer.decode(talk.chat.tokens.ids.attended())
    if talk.kind.thinking[0]:  # the chain keeps its thinking until it ends
        assert all(thought in text for thought in ("First", "Second", "Third"))
    results = talk.results(*("Done" for _ in calls))
    assert talk.write(talk.chat.reply(results), "Last", "All done.") == "All done."
    assert not talk.chat.exchanges[-1].calls
    talk.check_logits()
    text = talk.model.tokenizer.decode(talk.chat.tokens.ids.attended())
    assert not any(thought in text for thought in ("First", "Second", "Third", "Last"))
    assert [len(e.calls) for e in talk.chat.exchanges] == [0, *[len(calls)] * 3, 0]
    # When its answer is taken back, the chain has its thinking again.
    talk.chat.undo()
    assert_well_formed(talk.chat)
    talk.write(talk.chat.reply(results), "Last", "Then done.")
    talk.write(talk.chat.retry(), "Again", "Or not.")
    talk.write(talk.chat.reply("Bye"), "", "Bye.")


@names
def test_ids_as_sampled_are_those_of_the_whole_render(name):
    """If calls are written as the template writes them, nothing is read twice unnecessarily."""
    talk = Talk(MODELS[name])
    calls = CALLS[: talk.kind.most]
    talk.write(talk.chat.reply("Hi"), "So", "", calls)
    talk.write(talk.chat.reply(talk.results(*"ab"[: len(calls)])), "Then", "", calls)
    if name != "harmony":
        assert talk.chat.stats.settled == 0
    talk.write(talk.chat.reply(talk.results(*"ab"[: len(calls)])), "", "Good.")
    chat, encode = talk.chat, talk.model.tokenizer.encode
    messages = [*chat.prompts.head]
    for e in chat.exchanges:
        messages += [{"role": m.role, "content": m.text} for m in e.asked if m.role == "user"]
        messages += [
            {"role": "tool", "content": m.text, "tool_call_id": m.id, "name": m.name}
            for m in e.asked
            if m.role == "tool"
        ]
        functions = [{"name": c.name, "arguments": c.arguments} for c in e.calls]
        each = zip(e.calls, functions, strict=True)
        called = [{"type": "function", "id": c.id, "function": f} for c, f in each]
        message = {"role": "assistant", "content": e.reply}
        messages.append({**message, "tool_calls": called} if called else message)
    messages.append({"role": "user", "content": "Next"})
    whole = encode(chat.prompts.template.render(messages, reply=True), special=False)
    closing, asked = chat.prompts.question("Next", chat.exchanges[-1], first=False)
    spelled = "<|im_end|>" in str(calls)  # the name of a special token is plain text in a call
    held = [
        *chat.tokens.ids.attended(),
        *unread_ids(chat.prompts.pinned, chat._settle(), chat.tokens.length),
        *closing,
        *asked,
    ]
    assert held == whole or spelled


@pytest.mark.parametrize("kind", [MODELS["tagged"], TOLD_TO_THINK], ids=["plain", "told to think"])
def test_a_chain_keeps_the_ids_that_were_sampled(kind):
    talk = Talk(kind)
    encode = talk.chat.prompts.encode
    letters = [id for letter in "the thin man" for id in encode(letter)]
    assert letters != encode("the thin man")
    text = talk.kind.written("THOUGHT", "", CALLS[:1])
    before, _, after = text.partition("THOUGHT")
    Scripted.script = [*encode(before), *letters, *encode(after)]
    assert not said(talk.chat.reply("Hi")) and talk.chat.exchanges[-1].thinking == "the thin man"
    assert talk.chat.stats.settled == 0 and talk.chat.exchanges[-1].settled_ids is None
    assert_well_formed(talk.chat)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_acts_leave_what_the_template_renders(data):
    kind = MODELS[data.draw(st.sampled_from([*MODELS]))]
    options = {
        "window": data.draw(st.integers(90, 600)),
        "system": data.draw(st.sampled_from([None, "Be brief."])),
        "evict": data.draw(st.sampled_from(["turn", "turn", "token"])),
    }
    talk = Talk(kind, **options)
    for _ in range(data.draw(st.integers(2, 9))):
        chat = talk.chat
        last = chat.exchanges[-1:]
        act = data.draw(st.sampled_from(["ask", "ask", "ask", "retry", "undo", "resume", "clear"]))
        count = data.draw(st.sampled_from([0, 1, 1, talk.kind.most]))
        reply = data.draw(st.sampled_from(["", "So it is"])), "It is.", CALLS[:count]
        dump = data.draw(st.sampled_from([json.dumps, spaced]))
        asked: Any = data.draw(st.sampled_from(["Hi", "Why äöü?\nTell.", "x" * 40]))
        if last and last[0].calls:
            asked = talk.results(*(f"result {n}" for n in range(len(last[0].calls))))
        if act == "ask":
            talk.write(chat.reply(asked), *reply, dump=dump)
        elif act == "clear":
            chat.clear()
        elif act == "resume":
            talk.chat = resumed(chat, Trouble())
        elif not last:
            continue
        elif act == "retry":
            talk.write(chat.retry(), *reply, dump=dump)
        else:
            assert chat.undo() == last[0]
        assert_well_formed(talk.chat)
    talk.check_logits()


@pytest.mark.parametrize("window", range(100, 160, 10))
def test_a_chain_that_has_ended_leaves_whole(window):
    talk = Talk(MODELS["mistral"], window=window)
    chat = talk.chat
    talk.write(chat.reply("Hi"), "", "", CALLS[:1])
    talk.write(chat.reply(talk.results("a")), "", "Good.")
    assert len(chat.exchanges) == 2
    for number in range(8):
        talk.write(chat.reply(f"And {number}?"), "", "Yes.")
        assert not chat.exchanges[0].answers_calls
    assert chat.stats.evicted_exchanges >= 2


def test_a_turn_of_messages_is_read_as_the_template_writes_them():
    talk = Talk(MODELS["tagged"], tools=())
    turn = [Message("system", "Be brief."), Message("user", ""), Message("user", "Hi <|im_end|>")]
    talk.write(talk.chat.reply("First"), "", "Yes.")
    talk.write(talk.chat.reply(turn), "", "Hello.")
    assert talk.chat.exchanges[-1].messages == tuple(turn)
    assert talk.chat.exchanges[-1].question == "Be brief.\n\n\n\nHi <|im_end|>"
    end = talk.model.tokenizer.encode("<|im_end|>", special=False)[0]
    ids = talk.chat.tokens.ids.attended()
    assert ids.count(end) == 6  # those of the six messages, and none from the text
    assert talk.chat.undo().messages == tuple(turn)
    talk.check_logits()


def test_what_does_not_belong_together_is_refused():
    talk = Talk(MODELS["mistral"])
    chat = talk.chat
    with pytest.raises(TextError):
        chat.reply("")
    with pytest.raises(ValueRefused, match="at least one"):
        chat.reply([])
    with pytest.raises(ValueRefused, match="role"):
        chat.reply([Message("robot", "Hi")])
    with pytest.raises(ValueRefused, match="no call"):
        said(chat.reply([Message("tool", "Hi")]))
    talk.write(chat.reply("Hi"), "", "", CALLS)
    ids = [call.id for call in chat.exchanges[-1].calls]
    assert ids == ["000000000", "000000001"]
    before = chat.tokens.ids.attended()
    for turn, what in (
        ("And?", "weather, time"),
        ([Message("tool", "a")], "time"),
        ([Message("tool", "a", id="000000007"), Message("tool", "b")], "000000007"),
        ([Message("tool", "a"), Message("tool", "b"), Message("user", "And?")], "of their own"),
    ):
        with pytest.raises(ValueRefused, match=what):
            said(chat.reply(turn))
    assert chat.tokens.ids.attended() == before and len(chat.exchanges) == 1
    turned = [Message("tool", "b", id=ids[1]), Message("tool", "a")]
    talk.write(chat.reply(turned), "", "Good.")
    assert [m.id for m in chat.exchanges[-1].asked] == [ids[1], ids[0]]


def test_calls_are_not_in_the_text_and_what_only_begins_like_one_is():
    talk = Talk(MODELS["tagged"])
    chat, tokenizer = talk.chat, talk.model.tokenizer
    for text, reply in (
        ("Wait.\n<tool_call>\nnothing\n</tool_call>", "Wait.\n<tool_call>\nnothing\n</tool_call>"),
        ('See.\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', "See."),
    ):
        Scripted.script = tokenizer.encode(f"{text}<|im_end|>", special=False)
        assert said(chat.reply("Hi")) == reply
        assert chat.exchanges[-1].reply == reply
        assert_well_formed(chat)
    assert chat.exchanges[-1].calls == (ToolCall("time", {}, "000002000"),)


def test_a_saved_chain_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_STREAM_HOME", str(tmp_path / "home"))
    kind = MODELS["tagged"]
    model, *_ = loaded(kind.source, kind.ends[1])
    options = SessionOptions(window=1_300, tools=TOOLS)
    talk = Talk(kind)
    for snapshot in (True, False):
        saved = open_session(f"one {snapshot}".replace(" ", "-"), model, options)
        stream, run = saved.chat.tokens, saved.chat.tokens.run
        monkeypatch.setattr(
            stream,
            "run",
            lambda request, run=run: scripted(
                Scripted.script, replace(request, more=False), run(request)
            ),
        )
        talk.chat = saved.chat
        talk.write(saved.chat.reply("Hi"), "", "Hello.")
        turn = [Message("system", "Be brief."), Message("user", "And?")]
        talk.write(saved.chat.reply(turn), "So", "", CALLS)
        attended, exchanges = saved.chat.tokens.ids.attended(), saved.chat.exchanges
        saved.close()
        with Store.open(saved.paths.database) as store:
            assert [*store.exchanges().values()] == exchanges
        if not snapshot:
            saved.paths.snapshot.unlink()
        notices: list[str] = []
        again = open_session(saved.name, model, options, notices.append)
        assert bool(notices) is not snapshot
        assert again.chat.tokens.ids.attended() == attended
        assert again.chat.exchanges[-1].calls == exchanges[-1].calls
        assert_well_formed(again.chat)
        again.close()


def test_the_rows_of_a_turn_are_checked():
    call = ToolCall("time", {"of": "x"}, "1")
    asked = question_of([Message("tool", "a", name="time", id="1"), Message("user", "b")])
    exchange = replace(asked, reply="c", calls=(call,), question_ids=(1, 2), finish="end")
    turn, rows = StoredTurn(1, "answered", exchange, now()).rows()
    assert turn_of(turn, rows).exchange == exchange
    assert [row[2] for row in rows] == ["tool", "user", "assistant"]
    for place, column, value in (
        (0, 2, "user"),
        (0, 5, None),
        (1, 2, "assistant"),
        (1, 1, 2),
        (2, 5, '[["time", 3, "1"]]'),
        (2, 5, "[" * 99_999),
    ):
        altered = [*rows]
        altered[place] = (*rows[place][:column], value, *rows[place][column + 1 :])
        with pytest.raises((ValueError, TypeError)):
            turn_of(turn, altered)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (CHAT_TEMPLATE, "cannot be used with tools: it does not write them"),
        (MISTRAL.replace("{% if tools %}", "{% if 0 %}"), "does not write them"),
        (
            TAGGED.replace("m.role == 'tool'", "0").replace("m.tool_calls", "[]"),
            "does not write calls",
        ),
        (
            LLAMA.replace("tools_in_user_message and loop.first", "m.role == 'user'"),
            "repeats the tools",
        ),
        (TAGGED.replace("tool_call>", "call>"), "unsupported format"),
    ],
)
def test_templates_without_usable_tools_are_refused(source, what):
    end = next(end for end in ("<|im_end|>", "<|eot_id|>", "</s>") if end in source)
    model, _, _ = loaded(source, end)
    with pytest.raises(TemplateError, match=what):
        mlx_stream.ChatSession(model, tools=TOOLS)


def test_results_that_are_rendered_in_two_ways():
    """As in Hermes' templates, the last message of a conversation ends differently from others."""
    source = MISTRAL.replace("[/TOOL_RESULTS]", "{{ ' .' if not loop.last }}[/TOOL_RESULTS]")
    talk = Talk(replace(MODELS["mistral"], source=source))
    talk.write(talk.chat.reply("Hi"), "", "", CALLS[:1])
    talk.write(talk.chat.reply(talk.results("a")), "", "Good.")
    assert not talk.chat.template.rewrites and talk.chat.stats.settled
    assert "a ." in talk.model.tokenizer.decode(talk.chat.tokens.ids.attended())
    talk.write(talk.chat.retry(), "", "Fine.")
