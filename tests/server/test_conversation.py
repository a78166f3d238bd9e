"""A client's messages, cut into head, turns and question, and what their digests depend on."""

from dataclasses import replace

import pytest

from mlx_stream.chat.messages import Message
from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.server.conversation import TURN_BYTES, Digests, Head, conversation_of
from mlx_stream.text.tool_calls import ToolCall

SYSTEM, USER = Message("system", "Be brief."), Message("user", "Hi")
REPLY = Message("assistant", "Hello!", thinking="Hm")
CALLS = (ToolCall("weather", {"of": "Rome", "in": [1]}, "a"), ToolCall("time", {}, "b"))
CALLING = Message("assistant", "", CALLS)
RESULTS = (Message("tool", "warm", id="a"), Message("tool", "late", id="b"))
DIGESTS = Digests(bytes(32))


def test_messages_are_cut():
    other = replace(SYSTEM, text="Be kind.")
    messages = [SYSTEM, other, USER, REPLY, SYSTEM, USER, CALLING, *RESULTS]
    found = conversation_of(messages, [{"name": "time"}], True, "low")
    assert found.head == Head("Be brief.\n\nBe kind.", [{"name": "time"}], True, "low")
    assert found.turns[0] == (USER, REPLY) and found.turns[1][:2] == (SYSTEM, USER)
    assert [call.id for call in found.turns[1][2].calls] == ["", ""]
    names = [(message.text, message.name, message.id) for message in found.question]
    assert names == [("warm", "weather", ""), ("late", "time", "")]
    assert conversation_of([USER]).head == Head() and not conversation_of([USER]).turns


def test_results_stand_in_the_order_of_the_calls():
    question = conversation_of([USER, CALLING, *RESULTS]).question
    assert conversation_of([USER, CALLING, *RESULTS[::-1]]).question == question
    unnamed = [replace(result, id="") for result in RESULTS]
    without = replace(CALLING, calls=tuple(replace(call, id="") for call in CALLS))
    assert conversation_of([USER, CALLING, *unnamed]).question == question
    assert conversation_of([USER, without, *unnamed]).question == question


def test_replies_without_a_message_between_them_become_one():
    more = Message("assistant", "So.", CALLS)
    found = conversation_of([USER, REPLY, more, *RESULTS])
    reply = found.turns[0][-1]
    assert (reply.text, reply.thinking, len(reply.calls)) == ("Hello!\n\nSo.", "Hm", 2)
    assert [message.name for message in found.question] == ["weather", "time"]


def test_a_reply_at_the_end_begins_the_next():
    found = conversation_of([USER, REPLY, USER, REPLY])
    assert found.begins_reply and found.question == (USER, REPLY) and len(found.turns) == 1
    assert not conversation_of([USER]).begins_reply


@pytest.mark.parametrize(
    ("messages", "error", "what"),
    [
        ([], ValueRefused, "nothing to answer"),
        ([SYSTEM], ValueRefused, "nothing to answer"),
        ([USER, CALLING], ValueRefused, "nothing to answer"),
        ([SYSTEM, REPLY, USER], ValueRefused, "first message is a reply"),
        ([USER, RESULTS[0]], ValueRefused, "no call"),
        ([USER, CALLING, RESULTS[0]], ValueRefused, "the last reply calls time"),
        ([USER, CALLING, USER, REPLY, USER], ValueRefused, "the last reply calls"),
        ([USER, CALLING, *RESULTS, USER], ValueRefused, "a turn of their own"),
        ([USER, REPLY, Message("user", "\ud800")], TextError, "surrogate"),
        ([Message("robot", "Hi")], ValueRefused, "role"),
        ([USER] * 1_025, ValueRefused, "1,025 messages have no reply between them"),
        ([*([USER] * 1_025), REPLY, USER], ValueRefused, "limit is 1,024"),
    ],
)
def test_what_belongs_to_nothing_is_refused(messages, error, what):
    with pytest.raises(error, match=what):
        conversation_of(messages)


def digest(*messages):
    found = DIGESTS.of_turns([messages])
    assert len(found) == TURN_BYTES
    return found


def test_replies_are_compared_by_their_answer():
    base = digest(USER, Message("assistant", "caf\u00e9"))
    same = ("cafe\u0301", " caf\u00e9\n", "cafe\u0301 ")
    assert {digest(USER, Message("assistant", text, thinking="Hm")) for text in same} == {base}
    others = [
        digest(USER, Message("assistant", "cafe")),
        digest(replace(USER, text="Hi "), Message("assistant", "caf\u00e9")),
        digest(replace(USER, role="system"), Message("assistant", "caf\u00e9")),
        digest(USER, USER, Message("assistant", "caf\u00e9")),
        digest(USER, Message("assistant", "caf\u00e9", CALLS)),
    ]
    assert len({base, *others}) == 6


def test_calls_are_compared_by_name_and_arguments():
    base = digest(USER, CALLING)
    turned = replace(CALLS[0], arguments={"in": [1], "of": "Rome"}, id="x")
    assert digest(USER, replace(CALLING, calls=(turned, CALLS[1]))) == base
    others = [
        replace(CALLS[0], arguments={"of": "Rome", "in": [2]}),
        replace(CALLS[0], name="Weather"),
    ]
    found = {digest(USER, replace(CALLING, calls=(call, CALLS[1]))) for call in others}
    found |= {digest(USER, replace(CALLING, calls=CALLS[::-1])), digest(USER, REPLY)}
    assert len({base, *found}) == 5


def test_a_head_is_compared_with_its_tools():
    tool, turned = {"name": "time", "in": 1}, {"in": 1, "name": "time"}
    head = Head("Be brief.", [tool])
    assert DIGESTS.of_head(head) == DIGESTS.of_head(Head("Be brief.", [turned]))
    others = [Head("Be brief."), Head(None, [tool]), replace(head, think=True)]
    others += [replace(head, reasoning_effort="low"), replace(head, tools=[tool, tool])]
    assert len({DIGESTS.of_head(each) for each in (head, *others)}) == 6


def test_digests_depend_on_the_key_and_on_where_texts_end():
    assert Digests(bytes(31) + b"1").of_messages([USER]) != DIGESTS.of_messages([USER])
    first = [Message("user", "ab"), Message("user", "c")]
    second = [Message("user", "a"), Message("user", "bc")]
    assert DIGESTS.of_messages(first) != DIGESTS.of_messages(second)
