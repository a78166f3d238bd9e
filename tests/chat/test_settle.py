"""At rest a stream holds what the template renders, also of one that rewrites earlier replies."""

import json
import re
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_stream
from mlx_stream.chat.eviction import Idle
from mlx_stream.chat.exchange import unread_ids
from mlx_stream.chat.session import ChatSession
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.speculative import Writer
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import Sampling
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny
from tests.reference import SlowLlama

QUESTIONS = ("Hi", "And then?\nTell.", "Why äöü €?", "Go on", "x" * 30)
# Of an earlier reply only what comes after the last of these is kept: a third of short replies
# hold one.
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
    "plain": None,
}


CONFIG = tiny_config(num_hidden_layers=1)
WEIGHTS = tiny_weights(CONFIG)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, found = (
        write_tiny(tmp_path_factory.mktemp("m"), CONFIG, WEIGHTS),
        {},
    )
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name, template in TEMPLATES.items():
        path.write_text(json.dumps(config | ({"chat_template": template} if template else {})))
        found[name] = mlx_stream.load(folder, dtype="float32", keep_quantized=False)
    return found


class Recorded(TokenStream):
    """A stream that keeps how what it holds was read.

    Attributes:
        steps_taken: the ids of each step and how many are kept; between them, the oldest token that
            was still attended when some had left.
    """

    cache: Any

    def __init__(self, model, cache):
        super().__init__(model, cache)
        self.steps_taken: list[list[Any]] = []
        evict = cache.evict

        def recorded_evict(count: int) -> None:
            evict(count)
            self.steps_taken.append([cache.position.floor])

        cache.evict = recorded_evict

    def run(self, request: ReadRequest) -> ReadResult:
        result = super().run(request)
        self.steps_taken.append([tuple(request.ids[: result.count]), result.count])
        return result

    def rewind(self, count: int) -> None:
        super().rewind(count)
        self.steps_taken.append([self.cache.position.floor])  # what was taken back pushed some out
        for step in reversed(self.steps_taken):
            if len(step) == 2:
                taken = min(count, step[1])
                step[1], count = step[1] - taken, count - taken
        self.steps_taken = [step for step in self.steps_taken if step[-1]]


def recorded(model, **options) -> Any:
    """Return a conversation whose streams are `Recorded`."""
    options.setdefault("sampling", Sampling(1.0, top_p=1.0, seed=3))
    chat = ChatSession(model, **options)
    make = chat._writer_factory

    def record(*parts) -> Writer:
        cache = make(*parts).cache
        return Writer(Recorded(model, cache), cache)

    chat._writer_factory = record
    chat._begin(chat.system, chat.stats.window)
    return chat


def at_rest(chat: ChatSession) -> list[int]:
    """Return the ids attended, and those that the next turn reads of the turns before it."""
    turns = chat._settle()
    ids = [
        *chat.tokens.ids.attended(),
        *unread_ids(chat.prompts.pinned, turns, chat.tokens.length),
    ]
    sinks, pinned = chat.cache.geometry.sinks, len(chat.prompts.pinned)
    if turns[0].start >= sinks if turns else True:  # sinks that hold no prompt are never evicted
        del ids[pinned:sinks]
    return ids


def rendered(chat: ChatSession) -> str:
    """Return the template's text of what is held, once a next question is there."""
    messages = [*chat.prompts.head]
    for exchange in chat.exchanges:
        messages += [
            {"role": "user", "content": exchange.question},
            {"role": "assistant", "content": exchange.reply},
        ]
    whole = chat.template.render([*messages, {"role": "user", "content": "NEXT"}], reply=True)
    text, found, _ = whole.rpartition("<|im_start|>user\nNEXT")
    assert found
    return text


def decoded(chat: ChatSession, ids: list[int]) -> str:
    backend: Any = chat.model.tokenizer._backend
    return backend.decode(ids, skip_special_tokens=False)


def joined_damage(text: str) -> str:
    """Count bytes that are no text once: decoded in parts, they may be more than decoded whole."""
    return re.sub("\ufffd+", "\ufffd", text)


def check_ids(chat: ChatSession) -> None:
    ids, exchanges = at_rest(chat), chat.exchanges
    text = decoded(chat, ids)
    if exchanges:
        text += chat.prompts.rest_of(exchanges[-1]) + chat.template.closing
        whole, cache = joined_damage(rendered(chat)), chat.cache
        if chat.evictor.state.turns[0].start >= cache.oldest or not cache.evicted:
            assert joined_damage(text) == whole
        else:  # of a turn longer than the window only the end is attended
            sinks = chat.tokens.ids.attended()[: cache.geometry.sinks]
            end = text.removeprefix(decoded(chat, sinks))
            assert whole.endswith(joined_damage(end).removeprefix("\ufffd"))
    else:
        assert ids == [*chat.prompts.pinned][: len(ids)]
    assert chat.cache.attended <= chat.cache.geometry.sinks + chat.cache.geometry.window


def check_logits(chat: Any) -> None:
    """Compare with a stream that reads the same ids in the same steps, and with the slow one."""
    tokens, geometry, probe = chat.tokens, chat.cache.geometry, [5, 6, 7]
    assert isinstance(tokens, Recorded)
    spare = geometry.ring - geometry.window
    twin_cache = chat.model.new_cache(geometry.sinks, geometry.window, spare)
    twin = TokenStream(chat.model, twin_cache)
    slow = SlowLlama(CONFIG, WEIGHTS, geometry.sinks, geometry.window, spare)
    for step in tokens.steps_taken:
        if len(step) == 1:
            count = step[0] - twin_cache.oldest
            if count > 0:
                twin_cache.evict(count)
                slow.evict(count)
        else:
            ids, kept = step
            twin.run(ReadRequest(twin, ids, Want.NOTHING))
            twin.rewind(len(ids) - kept)
            slow.logits(ids)
            slow.rewind(len(ids) - kept)
    assert twin.length == tokens.length and twin.ids.attended() == tokens.ids.attended()
    found, same = (np.array(stream.read(probe)) for stream in (tokens, twin))
    assert (found == same).all()
    assert np.abs(found - slow.logits(probe)[-1]).max() < 1e-4


ACTS = ("ask", "ask", "ask", "close", "stop steps", "retry", "edit", "undo", "clear", "resume")


@settings(max_examples=20)
@given(st.data())
def test_the_stream_holds_what_the_template_renders_after_every_act(models, data):
    model = models[data.draw(st.sampled_from([*TEMPLATES]))]
    system = data.draw(st.sampled_from([None, "You are brief."]))
    chat = recorded(model, system=system, window=data.draw(st.integers(30, 200)))
    for _ in range(data.draw(st.integers(1, 8))):
        chat = act(chat, data)
        check_ids(chat)
    if chat.tokens.length:
        check_logits(chat)


def act(chat: Any, data) -> Any:
    what = data.draw(st.sampled_from(ACTS))
    question = data.draw(st.sampled_from(QUESTIONS))
    limit = data.draw(st.integers(1, 60))
    stop = data.draw(st.sampled_from([(), ("e", "o")]))
    if what == "ask":
        list(chat.reply(question, limit, stop))
    elif what == "close":
        pieces = chat.reply(question, limit)
        list(islice(pieces, data.draw(st.integers(1, 9))))
        pieces.close()
    elif what == "stop steps":
        stop_after(chat.reply_steps(question, limit), data.draw(st.integers(1, 9)))
    elif what == "clear":
        chat.clear()
        assert chat.exchanges == []
    elif what == "resume":
        again = recorded(chat.model, system=chat.system, window=chat.stats.window)
        where = chat.conversation_state()
        turns = {turn.number: turn.exchange for turn in chat.evictor.state.turns}
        again.tokens.restore(chat.tokens.state())
        again.tokens.steps_taken = chat.tokens.steps_taken
        again.resume(where, turns)
        return again
    elif chat.exchanges:
        if what == "undo":
            question = chat.exchanges[-1].question
            assert chat.undo().question == question
        else:
            list(chat.retry(limit, stop) if what == "retry" else chat.edit(question, limit, stop))
    return chat


def stop_after(steps, count: int) -> None:
    """Run so many steps of a reply, and drop it."""
    result = None
    with suppress(StopIteration):
        while count:
            item, result = steps.send(result), None
            if isinstance(item, ReadRequest):
                result, count = item.stream.run(item), count - 1
    steps.close()


def test_an_interrupted_retry_is_settled_before_the_next_question(models, monkeypatch):
    chat = recorded(models["drops"], window=200, max_tokens=8)
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


def test_a_notice_that_fails_leaves_a_whole_conversation(models):
    def fail(notice: str) -> None:
        if "taken back" in notice:
            raise BrokenPipeError

    chat, failed = recorded(models["refuses"], window=200, max_tokens=3, notify=fail), 0
    for _ in range(30):
        number = chat.number
        try:
            list(chat.reply("Hi"))
        except BrokenPipeError:
            failed += 1
            assert chat.evictor.state == Idle(chat.evictor.state.turns) and chat.number == number
            check_ids(chat)
    assert failed
