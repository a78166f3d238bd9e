"""After every act, a stream holds what the template renders, and computes what a twin computes."""

import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_stream
from mlx_stream.chat.session import ChatSession
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.speculative import Writer
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import Sampling
from tests.fakes import thinkers
from tests.fakes.conversations import assert_well_formed
from tests.fakes.shapes import check_erased
from tests.fakes.shell import edit
from tests.fakes.thinkers import write_thinker
from tests.fakes.tiny import CHAT_TEMPLATE, tiny_config, tiny_weights, write_tiny
from tests.reference import SlowLlama

QUESTIONS = ("Hi", "And then?\nTell.", "Why äöü €?", "Go on", "x" * 30)
# Of an earlier reply, only the text after the last of these is kept: a third of short replies
# contain one.
DROPS = ("</think>", *"aumkcdfgjq")
KEPT = "m.content" + "".join(f".split({drop!r})[-1]" for drop in DROPS)
MADE_UP = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < last.user %}REFUSE{{ KEPT }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("KEPT", KEPT)
REFUSE = "{% if not (" + KEPT + ") %}{{ raise_exception('no answer') }}{% endif %}"
TEMPLATES = {
    "drops": MADE_UP.replace("REFUSE", ""),
    "refuses": MADE_UP.replace("REFUSE", REFUSE),
    "plain": CHAT_TEMPLATE,
    # The system prompt is part of the first question, as in Llama 2.
    "system within": (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.s = '(' + m.content + ')' %}{% else %}<|im_start|>{{ m.role }}\n"
        "{{ ns.s if loop.index0 == 1 else '' }}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "no system": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
# Templates of models that think; the last one keeps the thinking of earlier turns.
DROPS_THINKING = MADE_UP.replace("REFUSE", "").replace(
    KEPT, "m.content.split('<think>')[-1].split('</think>')[-1]"
)
THINKS = {
    "thinks": DROPS_THINKING,
    "is told to think": DROPS_THINKING.replace("ant\n{% endif %}", "ant\n<think>{% endif %}"),
    # As in LFM2.5: only the last reply keeps its thinking.
    "drops it late": CHAT_TEMPLATE.replace(
        "{% for message",
        "{% set last = namespace(at=0) %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
        "{% for message",
        1,
    ).replace(
        "message['content'] +",
        "(message['content'] if loop.index0 >= last.at or message['role'] == 'user' else "
        "message['content'].split('<think>')[-1].split('</think>')[-1]) +",
    ),
    "keeps its thinking": CHAT_TEMPLATE + "{# <think> </think> #}",
}
TEMPLATES |= THINKS
SCRIPT = ("Ċ", "<think>", *"abcdefghi", "</think>", "Ġ", *"jklmno", "<|im_end|>")
CONFIG = tiny_config(num_hidden_layers=1)
WEIGHTS = tiny_weights(CONFIG)
WINDOWS = st.integers(40, 200)
COUNTS = st.sampled_from([1, 1, 1, 2, 3, 5, 8])
ACTS = ("ask", "ask", "ask", "retry", "edit", "undo", "clear", "resume", "restart", "restart")
# The ways in which a reply may be cut short.
CUTS = ("", "", "", "close", "throw", "drop steps")
TROUBLE = {
    "": (),
    "before a step": (KeyboardInterrupt, RuntimeError),
    "after a step": (KeyboardInterrupt, RuntimeError),
    **dict.fromkeys(("progress", "notify", "on_evict"), (KeyboardInterrupt,)),
}


@cache
def model(template: str) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        if template in THINKS:
            path = write_thinker(Path(folder), THINKS[template], SCRIPT, "<|im_end|>")
        else:
            path = write_tiny(Path(folder), CONFIG, WEIGHTS)
            edit(path / "tokenizer_config.json", chat_template=TEMPLATES[template])
        return mlx_stream.load(path, dtype="float32", keep_quantized=False)


class Trouble:
    """Raises an error once, the nth time the code reaches a given place.

    Attributes:
        refusals: notices about replies that the template refused.
    """

    def __init__(self) -> None:
        self.arm("", 0, None)
        self.refusals: list[str] = []

    def arm(self, place: str, count: int, error: type[BaseException] | None) -> None:
        self.place, self.left, self.error = place, count, error

    def at(self, place: str) -> None:
        if place != self.place or not self.error:
            return
        self.left -= 1
        if not self.left:
            raise self.error("trouble")

    def notify(self, notice: str) -> None:
        if "and its reply were removed" in notice:
            self.refusals.append(notice)
        self.at("notify")


class Recorded(TokenStream):
    """A stream that records the steps in which it read its tokens.

    Attributes:
        steps_taken: the ids of each step, how many of them are kept, and the lowest token that can
            be attended to after it; no ids if only that token has changed.
    """

    cache: Any
    trouble: Trouble

    def __init__(self, model: Model, cache: Any) -> None:
        super().__init__(model, cache)
        self.steps_taken: list[tuple[tuple[int, ...], int, int]] = []
        evict = cache.evict

        def recorded_evict(count: int) -> None:
            evict(count)
            self.steps_taken.append(((), 0, cache.position.floor))

        cache.evict = recorded_evict

    def commit(self, step: Any, ids: Any) -> None:
        self.trouble.at("before a step")
        super().commit(step, ids)
        self.steps_taken.append((tuple(ids), len(ids), 0))
        self.trouble.at("after a step")

    def rewind(self, count: int) -> None:
        super().rewind(count)
        steps = []
        for ids, kept, floor in reversed(self.steps_taken):
            taken = min(count, kept)
            count -= taken
            if not ids or kept > taken:
                steps.append((ids, kept - taken, floor))
        # What was taken back may have evicted others.
        self.steps_taken = [*reversed(steps), ((), 0, self.cache.position.floor)]


def recorded(
    model: Model, trouble: Trouble, stream: type[Recorded] = Recorded, **options: Any
) -> Any:
    """Return a conversation whose streams are `Recorded`."""
    history = options.pop("history", ())
    chat: Any = ChatSession(model, sampling=Sampling(1.0, top_p=1.0, seed=3), **options)
    make = chat._writer_factory

    def record(*parts: Any) -> Writer:
        cache = make(*parts).cache
        tokens = stream(model, cache)
        tokens.trouble = trouble
        return Writer(tokens, cache)

    chat._writer_factory = record
    chat._begin(chat.system, chat.stats.window)
    if history:
        chat.follow(history)
    chat.trouble, chat._on_notice = trouble, trouble.notify
    chat.on_evict = lambda *gone: trouble.at("on_evict")
    return chat


def check_logits(
    chat: Any, config: dict = CONFIG, weights: dict = WEIGHTS, error: float = 1e-4
) -> None:
    """Compare with a stream that reads the same ids in the same steps, and with the reference."""
    tokens, geometry, probe = chat.tokens, chat.cache.geometry, [5, 6, 7]
    spare, floor = geometry.ring - geometry.window, 0
    cache = chat.model.new_cache(geometry.sinks, geometry.window, spare)
    twin = TokenStream(chat.model, cache)
    slow = SlowLlama(config, weights, geometry.sinks, geometry.window, spare)
    for ids, kept, evicted in tokens.steps_taken:
        if ids:
            twin.run(ReadRequest(twin, ids, Want.NOTHING))
            slow.logits(ids)
            for stream in (twin, slow):
                stream.rewind(len(ids) - kept)
        floor = max(floor, evicted)
        if (count := floor - cache.oldest) > 0:
            cache.evict(count)
            slow.evict(count)
    assert twin.length == tokens.length and twin.ids.attended() == tokens.ids.attended()
    found, same = (np.array(stream.read(probe)) for stream in (tokens, twin))
    assert (found == same).all()
    assert np.abs(found - slow.logits(probe)[-1]).max() < error


@settings(max_examples=20)
@given(st.data())
def test_the_stream_holds_what_the_template_renders_after_every_act(data):
    trouble, evict = Trouble(), data.draw(st.sampled_from(["turn", "turn", "token"]))
    chat = recorded(
        model(data.draw(st.sampled_from([*TEMPLATES]))),
        trouble,
        system=data.draw(st.sampled_from([None, "You are brief."])),
        window=data.draw(WINDOWS),
        evict=evict,
    )
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.sampled_from([*TROUBLE]))
        if errors := TROUBLE[place]:
            trouble.arm(place, data.draw(COUNTS), data.draw(st.sampled_from(errors)))
        with suppress(KeyboardInterrupt, RuntimeError):
            chat = act(chat, trouble, data)
        trouble.arm("", 0, None)
        assert_well_formed(chat)
    if chat.tokens.failed:
        list(chat.reply("On?", 3))
        assert_well_formed(chat)
    if chat.tokens.length:
        chat.tokens.state()  # erases keys and values of tokens that are not attended to
        check_erased(chat.cache)
        if (source := chat.template.source) in THINKS.values():
            backend = thinkers.thinker_tokenizer(source)
            check_logits(chat, thinkers.CONFIG, thinkers.thinker_weights(backend, SCRIPT))
        else:
            check_logits(chat)


def act(chat: Any, trouble: Trouble, data: st.DataObject) -> Any:
    what, before = data.draw(st.sampled_from(ACTS)), len(chat.exchanges)
    question = data.draw(st.sampled_from(QUESTIONS))
    options = (
        data.draw(st.integers(1, 60)),
        data.draw(st.sampled_from([(), ("e", "o")])),
        lambda done, total: trouble.at("progress"),
    )
    if what == "clear":
        chat.clear()
        assert chat.exchanges == []
    elif what == "restart":
        system, window = data.draw(st.sampled_from([None, "Be long."])), data.draw(WINDOWS)
        expected = chat.system, chat.stats.window
        trouble.left = 1  # reading takes one step
        try:
            chat.restart(system, window)
            expected = system, window
        finally:
            assert (chat.system, chat.stats.window) == expected
    elif what == "resume":
        return resumed(chat, trouble)
    elif what == "ask":
        cut(chat, chat.reply_steps(question, *options), data)
    elif not chat.unanswered and not before:
        with pytest.raises(ValueRefused):
            chat.undo()
    elif what == "undo":
        asked = chat.unanswered or chat.exchanges[-1].question
        assert chat.undo().question == asked
    elif what == "retry":
        cut(chat, chat.retry_steps(*options), data)
    else:
        cut(chat, chat.edit_steps(question, *options), data)
    return chat


def resumed(chat: Any, trouble: Trouble) -> Any:
    if chat.tokens.failed:
        return chat
    again = recorded(
        chat.model,
        trouble,
        type(chat.tokens),
        system=chat.system,
        window=chat.stats.window,
        evict=chat.evict,
        tools=chat.tools,
    )
    where = chat.conversation_state()
    turns = {turn.number: turn.exchange for turn in chat.evictor.state.turns}
    again.tokens.restore(chat.tokens.state())
    again.tokens.steps_taken = chat.tokens.steps_taken
    again.resume(where, turns)
    return again


def cut(chat: Any, steps: Any, data: st.DataObject) -> None:
    """Drive a reply to its end, or cut it; check that its turn has the text that was yielded."""
    how, count = data.draw(st.sampled_from(CUTS)), data.draw(st.integers(1, 9))
    result: ReadResult | None = None
    text, thinking, refused = "", "", len(chat.trouble.refusals)
    try:
        while count:
            item, result = steps.send(result), None
            if isinstance(item, ReadRequest):
                result = item.stream.run(item)
            else:
                text, thinking = text + item.text, thinking + item.thinking
            count -= bool(how) and isinstance(item, ReadRequest) == (how == "drop steps")
        if how == "throw":
            steps.throw(KeyboardInterrupt)
    except StopIteration:
        last = chat.exchanges[-1:]
        told = [(exchange.reply, exchange.thinking) for exchange in last]
        assert len(chat.trouble.refusals) > refused or told == [(text, thinking.strip())]
    finally:
        steps.close()
        # When a reply is cut, held-back text (such as an incomplete character) is added to it.
        if text and len(chat.trouble.refusals) == refused:
            assert chat.exchanges[-1].reply.startswith(text)


def test_an_interrupted_retry_is_settled_before_the_next_question(monkeypatch):
    chat = recorded(model("drops"), Trouble(), window=200, max_tokens=8)
    while not chat.exchanges or chat.exchanges[-1].settled_ids is None:
        list(chat.reply("Hi"))
    rewind = chat.tokens.rewind

    def rewind_and_interrupt(count: int) -> None:
        rewind(count)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chat.tokens, "rewind", rewind_and_interrupt)
        list(chat.retry())
    turn = chat.evictor.state.turns[-1]
    missing = turn.exchange.ids[chat.tokens.length - turn.start :]
    steps = chat.reply_steps("Next?")
    request = next(steps)
    assert missing and (request.want, request.ids) == (Want.NOTHING, missing)
    steps.close()
