"""A session with recall attends to the same tokens as a twin whose store finds nothing."""

from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from mlx_stream.chat.eviction import ActiveTurn
from mlx_stream.chat.session import ChatSession
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want, run_coroutine
from mlx_stream.sampling import Sampler, Sampling
from tests.chat import test_settle
from tests.chat.test_settle import QUESTIONS, TEMPLATES, THINKS, Recorded, Trouble, recorded
from tests.fakes.conversations import assert_well_formed, decoded
from tests.fakes.recalling import HOSTILE, MARK, EmptyStore, MemoryStore
from tests.fakes.shapes import check_erased

ACTS = (*["ask"] * 12, *["retry"] * 2, "edit", "undo", "clear", "resume", "restart")
ENDS = ("", "", "", "close", "throw", "drop", "drop the prompt", "interrupt", "fail")
MORE = st.integers(0, 9)
# The act, the question, the reply's limit and stop strings, how it ends, and its seed.
STEPS = st.tuples(
    st.sampled_from(ACTS),
    st.sampled_from(QUESTIONS),
    st.tuples(st.sampled_from([5, 60, 120, 200, 500]), st.sampled_from([(), ("e", "o")])),
    st.tuples(st.sampled_from(ENDS), st.integers(1, 40)),
    st.integers(0, 99),
)


class Scripted(Recorded):
    """A stream that writes a script, whatever it has read, and may be interrupted as it does so."""

    trouble: Any

    def next(self, token: int, sampler: Sampler, more: bool = True) -> tuple[int, Any]:
        self.trouble.at("interrupt")
        if self.trouble.place == "fail":
            self.trouble.left -= 1
            if not self.trouble.left:
                self.trouble.arm("before a step", 1, RuntimeError)
        _, logits = super().next(token, sampler, more)
        return next(self.trouble.script), logits


class ScriptedSampler(Sampler):
    def __init__(self, trouble: Any):
        super().__init__(Sampling(0, seed=0))
        self.trouble = trouble

    def choose(self, logits: Any, attended: Any) -> int:
        return next(self.trouble.script)


def scripted(model: str | Model, store: MemoryStore, **options: Any) -> Any:
    model = test_settle.model(model) if isinstance(model, str) else model
    chat = recorded(model, Trouble(), Scripted, recall=store, **options)
    chat.sampler = ScriptedSampler(chat.trouble)
    return chat


def script(chat: Any, seed: int) -> Iterator[int]:
    """Yield the ids of a reply: thinking, if the model thinks, then letters, then end tokens."""
    random, encode = Random(seed), chat.model.tokenizer.encode
    letters = encode("abcdefghi jklmno", special=False)
    thinks = bool(chat.template.style) and random.random() < 0.9
    if thinks:
        opening = [] if chat.template.thinks_first else encode("<think>", special=False)
        yield from opening
        yield from random.choices(letters, k=random.choice([0, 3, 20]))
        yield from encode("</think>", special=False)
    yield from random.choices(letters, k=random.choice([1, 10, 50, 100, 150, 450]))
    while True:
        yield from encode("<|im_end|>", special=False)


def act(chat: Any, template: str, what: str, question: str, options: tuple, end: tuple) -> Any:
    """Do something with a chat; return the chat, which is a different object after a resume."""
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
    """Drive a reply to its end, or stop it after `count` of its own tokens, pieces or steps."""
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
    again.recall_from, again.pending = chat.recall_from, chat.pending
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


@settings(max_examples=20, phases=[Phase.generate])  # shrinking takes minutes
@given(st.data())
def test_it_attends_to_what_its_twin_does_after_every_act(data):
    window = data.draw(st.integers(320, 400))
    reserved = data.draw(st.integers(150, window // 2))
    template = data.draw(st.sampled_from([*TEMPLATES]))
    options: Any = {
        "system": data.draw(st.sampled_from([None, "You are brief."])),
        "window": window,
        "recall_tokens": reserved,
    }
    chat, twin = (scripted(template, store, **options) for store in (MemoryStore(), EmptyStore()))
    quoted = 0
    for _ in range(data.draw(st.integers(8, 16))):
        what, question, (limit, stops), end, seed = data.draw(STEPS)
        again = data.draw(st.sampled_from([None, "Be long."])), window + data.draw(MORE)
        for one in (chat, twin):
            one.trouble.script = script(one, seed)
        chat, twin = (
            act(one, template, what, question, (limit, stops, again), end) for one in (chat, twin)
        )
        check_twins(chat, twin)
        quoted += len(chat.recalled)
    event(f"{min(quoted, 5)} quoted")
    if not chat.tokens.failed:
        chat.tokens.state()  # erases keys and values of tokens that are not attended
        check_erased(chat.cache)
        assert MARK not in decoded(chat, chat.tokens.ids.by_row)
        if template not in THINKS:
            test_settle.check_logits(chat, error=1e-3)


@pytest.mark.parametrize("template", ["plain", "thinks", "drops it late", "quantized"])
@pytest.mark.parametrize("length", [110, 150, 200, 290, 330, 500])
def test_a_reply_that_outgrows_its_room_leaves_what_its_twins_does(template, length, model):
    options: Any = {"system": "You are brief.", "window": 320, "recall_tokens": 150}
    if template == "quantized":  # its ring has no spare rows
        template, options["kv_bits"] = model, 8
    chat, twin = (scripted(template, store, **options) for store in (MemoryStore(), EmptyStore()))
    letters = chat.model.tokenizer.encode("abcdefghi jklmno" * 50, special=False)
    for count in (30, 30, 30, 30, length, 30):
        for one in (chat, twin):
            one.trouble.script = iter(letters)
            list(one.reply("Go on, please, and tell.", count))
        assert bool(chat.recalled) == (chat.number > 2)
        check_twins(chat, twin)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_quoted_within_the_users_turn_and_the_budget(text):
    store, system = MemoryStore(), "You are brief."
    store.leave(1, text, text)
    chat = ChatSession(
        test_settle.model("plain"), system, window=460, recall=store, recall_tokens=230
    )
    chat.number = 1
    steps = chat.reply_steps("What?", 1)
    request = next(steps)
    assert isinstance(request, ReadRequest)
    plain = chat.prompts.question("What?", None, first=False)[1]
    # The request contains the pinned ids, then the question, whose ids may take more than one step.
    state = chat.evictor.state
    assert isinstance(state, ActiveTurn)
    ids = state.turn.exchange.question_ids
    read = decoded(chat, [*ids])
    if text[0] != HOSTILE[6][0]:  # a third of a token for each character: none of it fits
        assert MARK in read and read.endswith("\n\nWhat?<|im_end|>\n<|im_start|>assistant\n")
    marks = chat.model.tokenizer.special_ids
    assert [id for id in ids if id in marks] == [id for id in plain if id in marks]
    assert len(ids) - len(plain) <= 230
    steps.close()
    assert [*chat.exchanges[-1].question_ids] == [*plain]


def test_an_eighth_of_the_window_is_kept_free_if_that_is_enough():
    plain = test_settle.model("plain")
    for window, reserved in ((508, 64), (256, 64), (255, 0)):
        chat = ChatSession(plain, window=window, sinks=4, recall=MemoryStore())
        assert (chat._reserved, len(chat.stats.notices)) == (reserved, reserved == 0)
    assert ChatSession(plain, window=400, recall=MemoryStore(), recall_tokens=0)._reserved == 0
    assert ChatSession(plain, window=400)._reserved == 0


def test_without_recall_a_session_is_what_it_was():
    plain = test_settle.model("plain")
    chats = [
        ChatSession(plain, window=120, sampling=Sampling(1, seed=1), **options)
        for options in ({}, {"recall": MemoryStore(), "recall_tokens": 0})
    ]
    for number in range(9):
        pieces = [list(chat.reply(f"Question {number}", 20)) for chat in chats]
        assert pieces[0] == pieces[1] and pieces[0][-1].recalled == ()
    assert chats[0].tokens.ids.attended() == chats[1].tokens.ids.attended()


def left(chat: Any) -> set[int]:
    """Return the numbers of the exchanges that are not attended, once nothing is left to read."""
    turns = chat._settle()
    if not chat.tokens.failed:
        run_coroutine(chat._read_settling())
        turns = chat._settle()
    return {*range(1, chat.number + 1)} - {turn.number for turn in turns}


@settings(max_examples=10, phases=[Phase.generate])
@given(st.data())
def test_no_exchange_leaves_that_a_window_without_the_budget_would_keep(data):
    window = data.draw(st.integers(320, 400))
    reserved = data.draw(st.integers(150, window // 2))
    template = data.draw(st.sampled_from([*TEMPLATES]))
    system = data.draw(st.sampled_from([None, "You are brief."]))
    # The stores keep what has left; the one without recall is never asked.
    chat = scripted(template, MemoryStore(), system=system, window=window, recall_tokens=reserved)
    small = scripted(
        template, MemoryStore(), system=system, window=window - reserved, recall_tokens=0
    )
    quoted = 0
    for _ in range(data.draw(st.integers(8, 16))):
        what, question, options, end, seed = data.draw(STEPS)
        system, more = data.draw(st.sampled_from([None, "Be long."])), data.draw(MORE)
        windows = window + more, window - reserved + more
        if what in ("undo", "retry", "edit") and not (small.unanswered or small.exchanges):
            continue  # it has left the smaller window
        for one in (chat, small):
            one.trouble.script = script(one, seed)
        chat, small = (
            act(one, template, what, question, (*options, (system, size)), end)
            for one, size in zip((chat, small), windows, strict=True)
        )
        assert chat.number == small.number
        assert left(chat) <= left(small)
        quoted += len(chat.recalled)
    event(f"{min(quoted, 5)} quoted")


def test_bytes_do_not_grow_with_recall():
    plain, sizes = test_settle.model("plain"), set()
    for reserved in (200, 0):
        chat = ChatSession(plain, window=400, recall=MemoryStore(), recall_tokens=reserved)
        for number in range(40):
            list(chat.reply(f"Question {number} {'x' * (number % 50)}", 1))
            sizes.add(chat.cache.nbytes)
        assert bool(chat.recalled) == bool(reserved)
    assert len(sizes) == 1


def test_with_guesses_no_trace_of_a_quotation_is_left():
    plain = test_settle.model("plain")
    chat = ChatSession(
        plain,
        window=400,
        recall=MemoryStore(),
        recall_tokens=200,
        speculate=True,
        sampling=Sampling(0),
    )
    for number in range(12):
        list(chat.reply(f"Question {number} aaaaaaaaaaaaaaaaaaaa", 40))
        assert_well_formed(chat)
    assert chat.recalled and chat.writer.speculator
    ngram = chat.writer.speculator.ngram
    assert MARK not in decoded(chat, [*ngram._ids[: ngram.count]])
    assert not any(ngram._ids[ngram.count :])
