"""A session with recall attends to what its twin does, whose store finds nothing (rule 13)."""

from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mlx_stream.errors import ValueRefused
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want, run_coroutine
from mlx_stream.sampling import Sampler, Sampling
from tests.chat import test_settle
from tests.chat.test_settle import QUESTIONS, TEMPLATES, THINKS, Recorded, Trouble, recorded
from tests.fakes.conversations import assert_well_formed, decoded
from tests.fakes.recalling import MARK, EmptyStore, MemoryStore
from tests.fakes.shapes import check_erased

ACTS = ("ask", "ask", "ask", "ask", "ask", "retry", "edit", "undo", "clear", "resume", "restart")
ENDS = ("", "", "", "close", "throw", "drop", "drop the prompt", "interrupt", "fail")


class Scripted(Recorded):
    """A stream that writes a script, whatever it has read, and may be interrupted in it."""

    trouble: Any

    def next(self, token: int, sampler: Sampler, more: bool = True) -> int:
        self.trouble.at("interrupt")
        if self.trouble.place == "fail":
            self.trouble.left -= 1
            if not self.trouble.left:
                self.trouble.arm("before a step", 1, RuntimeError)
        super().next(token, sampler, more)
        return next(self.trouble.script)


class ScriptedSampler(Sampler):
    def __init__(self, trouble: Any):
        super().__init__(Sampling(0, seed=0))
        self.trouble = trouble

    def choose(self, logits: Any, attended: Any) -> int:
        return next(self.trouble.script)


def scripted(template: str, store: MemoryStore, **options: Any) -> Any:
    chat = recorded(test_settle.model(template), Trouble(), Scripted, recall=store, **options)
    chat.sampler = ScriptedSampler(chat.trouble)
    return chat


def script(chat: Any, seed: int) -> Iterator[int]:
    """Yield the ids of a reply: thinking, if the model thinks, and letters, up to an end or not."""
    random, encode = Random(seed), chat.model.tokenizer.encode
    letters = encode("abcdefghi jklmno", special=False)
    thinks = bool(chat.template.style) and random.random() < 0.9
    if thinks:
        opening = [] if chat.template.thinks_first else encode("<think>", special=False)
        yield from opening
        yield from random.choices(letters, k=random.choice([0, 3, 20]))
        yield from encode("</think>", special=False)
    yield from random.choices(letters, k=random.choice([1, 3, 10, 50, 150, 300]))
    while True:
        yield from encode("<|im_end|>", special=False)


def act(chat: Any, template: str, what: str, question: str, options: tuple, end: tuple) -> Any:
    """Do something with a chat; return the chat, which is another one after a resume."""
    if what == "clear":
        chat.clear()
    elif what == "restart":
        chat.restart(*options[2])
    elif what == "resume" and not chat.tokens.failed:
        return resumed(chat, template)
    elif what in ("undo", "retry", "edit") and not (chat.unanswered or chat.exchanges):
        with pytest.raises(ValueRefused):
            chat.undo()
    elif what == "undo":
        chat.undo()
    elif what in ("ask", "retry", "edit"):
        steps = {"ask": chat.reply_steps, "retry": chat.retry_steps, "edit": chat.edit_steps}[what]
        drive(chat, steps(*() if what == "retry" else (question,), *options[:2]), *end)
    return chat


def drive(chat: Any, steps: Any, end: str, count: int) -> None:
    """Drive a reply to its end, or end it after a number of its own tokens, pieces or steps."""
    if end in ("interrupt", "fail"):
        chat.trouble.arm(end, count, KeyboardInterrupt)
    result: ReadResult | None = None
    with suppress(StopIteration, KeyboardInterrupt, RuntimeError):
        while count:
            item, result = steps.send(result), None
            if not isinstance(item, ReadRequest):
                count -= end in ("close", "throw")
            elif end == "drop the prompt" and item.want is Want.LOGITS:
                break
            else:
                count -= end == "drop" and item.want is Want.TOKEN
                result = item.stream.run(item)
        if end == "throw":
            steps.throw(KeyboardInterrupt)
    steps.close()
    chat.trouble.arm("", 0, None)


def resumed(chat: Any, template: str) -> Any:
    again = scripted(
        template,
        chat.recall,
        system=chat.system,
        window=chat.stats.window,
        recall_tokens=chat._recall_asked,
        kv_bits=chat.kv_bits,
    )
    state, turns = chat.conversation_state(), chat._settle()
    again.tokens.restore(chat.tokens.state())
    again.tokens.steps_taken = chat.tokens.steps_taken
    again.resume(state, {turn.number: turn.exchange for turn in turns})
    again.recall_from, again.unanswered = chat.recall_from, chat.unanswered
    again.number = chat.number
    return again


def check_twins(chat: Any, twin: Any) -> None:
    for one in (chat, twin):
        one._settle()
        if not one.tokens.failed:
            run_coroutine(one._read_settling())
    turns, others = chat._settle(), twin._settle()
    assert [(t.number, t.exchange) for t in turns] == [(t.number, t.exchange) for t in others]
    assert (chat.number, chat.unanswered) == (twin.number, twin.unanswered)
    assert chat.stats.evicted_exchanges == twin.stats.evicted_exchanges
    assert chat.recall.left == twin.recall.left
    if not chat.tokens.failed:
        assert chat.tokens.ids.attended() == twin.tokens.ids.attended()
        assert_well_formed(chat)


class Quoting(MemoryStore):
    """Counts what it returned."""

    count = 0

    def find(self, *args: Any) -> Any:
        found = super().find(*args)
        self.count += len(found)
        return found


@settings(max_examples=40, phases=[Phase.generate])
@given(st.data())
def test_it_attends_to_what_its_twin_does_after_every_act(data):
    window = data.draw(st.integers(100, 300))
    reserved = data.draw(st.integers(60, window // 2)) if window >= 120 else 50
    template = data.draw(st.sampled_from([*TEMPLATES]))
    options: Any = {
        "system": data.draw(st.sampled_from([None, "You are brief."])),
        "window": window,
        "recall_tokens": reserved,
    }
    chat, twin = (scripted(template, store, **options) for store in (Quoting(), EmptyStore()))
    for _ in range(data.draw(st.integers(2, 12))):
        what, question = data.draw(st.sampled_from(ACTS)), data.draw(st.sampled_from(QUESTIONS))
        limit = data.draw(st.sampled_from([1, 5, 30, 60, 200, 400]))
        stops, seed = data.draw(st.sampled_from([(), ("e", "o")])), data.draw(st.integers(0, 99))
        again = (
            data.draw(st.sampled_from([None, "Be long."])),
            window + data.draw(st.integers(0, 9)),
        )
        end = data.draw(st.sampled_from(ENDS)), data.draw(st.integers(1, 40))
        for one in (chat, twin):
            one.trouble.script = script(one, seed)
        chat, twin = (
            act(one, template, what, question, (limit, stops, again), end) for one in (chat, twin)
        )
        check_twins(chat, twin)
    if not chat.tokens.failed:
        chat.tokens.state()  # erases keys and values of tokens that are not attended
        check_erased(chat.cache)
        assert MARK not in decoded(chat, chat.tokens.ids.by_row)
        if template not in THINKS:
            test_settle.check_logits(chat)
