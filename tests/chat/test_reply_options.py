"""What one reply may set for itself: sampling, bias, mask, log-probabilities."""

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mlx_stream
from mlx_stream.cache import StreamCache
from mlx_stream.errors import ValueRefused
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import said
from tests.fakes.engines import DEADLINE, engine_of
from tests.fakes.tiny_models import all_logits

DRAWN = Sampling(temperature=1.0, top_p=1.0)
OPTIONS: Any = {"window": 60, "max_tokens": 12, "sampling": DRAWN}


@pytest.fixture
def model(tiny) -> mlx_stream.Model:
    return mlx_stream.load(tiny, dtype="float32", keep_quantized=False)


@pytest.fixture(params=["library", "alone", "shared"])
def chat(request, tiny, model) -> Iterator[Any]:
    """Yield a conversation, or an engine's session, alone or sharing its steps with another."""
    if request.param == "library":
        yield mlx_stream.ChatSession(model, **OPTIONS)
        return
    with engine_of(tiny) as engine:
        chat = engine.session(**OPTIONS, shared=request.param == "shared")
        chat.wait(DEADLINE)
        if request.param == "shared":
            engine._worker._scheduler.times.sharing_pays = lambda replies, probe: True
            other, stop = engine.session(**OPTIONS), threading.Event()

            def talk() -> None:
                for _ in other.reply("Hello", max_tokens=100_000):
                    if stop.is_set():
                        return

            thread = threading.Thread(target=talk, daemon=True)
            thread.start()
            yield chat
            stop.set()
            thread.join(DEADLINE)
            return
        yield chat


def ids_of(chat: Any) -> tuple[int, ...]:
    return chat.exchanges[-1].reply_ids


def test_logprobs_are_those_of_the_model_alone(chat, model):
    ends = dict.fromkeys((0, 1, 2), -1e4)  # an empty reply has no log-probabilities
    pieces = [*chat.reply("Hi", bias={7: 3.0, **ends}, logprobs=4)]
    found = [one for piece in pieces for one in piece.logprobs]
    exchange = chat.exchanges[-1]
    assert tuple(one.id for one in found) == exchange.reply_ids != ()
    pinned = mlx_stream.ChatSession(model, **OPTIONS).prompts.pinned
    ids = [*pinned, *exchange.question_ids, *exchange.reply_ids]
    cache: StreamCache = model.new_cache(4, 400)
    logits = all_logits(model, cache, ids, 64)[-len(found) - 1 : -1].astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for one, row in zip(found, wanted, strict=True):
        assert abs(one.logprob - row[one.id]) < 1e-4
        assert np.abs(np.array([p for _, p in one.top]) - np.sort(row)[::-1][:4]).max() < 1e-4
        assert np.allclose([row[id] for id, _ in one.top], [p for _, p in one.top], atol=1e-4)
    assert not any(piece.logprobs for piece in chat.reply("And?"))


def test_a_bias_makes_tokens_likely_or_impossible(chat):
    said(chat.reply("Hi", bias={11: 1e4}))
    assert ids_of(chat) == (11,) * 12
    said(chat.reply("And?", bias={11: 1e4, 12: 2e4, 13: 1e4}, sampling=Sampling(temperature=0)))
    assert ids_of(chat) == (12,) * 12
    said(chat.reply("And?", bias={id: -math.inf for id in range(300) if id != 9}))
    assert ids_of(chat) == (9,) * 12


def test_a_mask_is_asked_for_each_token(chat):
    wanted, seen = [20, 21, 30, 31, 40], []

    def mask(ids):
        seen.append(tuple(ids))
        if len(ids) == len(wanted):
            return None
        allowed = np.zeros(300, bool)
        allowed[wanted[len(ids)]] = True
        return allowed

    said(chat.reply("Hi", mask=mask, max_tokens=6))
    assert list(ids_of(chat)[:5]) == wanted
    assert seen == [ids_of(chat)[:count] for count in range(6)]
    said(chat.reply("And?", max_tokens=3))
    assert len(seen) == 6, "only for its own reply"


@pytest.mark.parametrize("wrong", [np.zeros(300, bool), np.ones(299, bool)])
def test_a_mask_that_allows_nothing_is_refused(chat, wrong):
    with pytest.raises(ValueRefused, match="a mask must have"):
        said(chat.reply("Hi", mask=lambda _: wrong))
    assert [*chat.reply("And?", max_tokens=3)][-1].finish in ("length", "end")


def test_a_mask_that_fails_is_the_error_of_its_reply(chat):
    def mask(ids):
        raise ZeroDivisionError("oops")

    with pytest.raises(ValueRefused, match="the mask failed: ZeroDivisionError: oops"):
        said(chat.reply("Hi", mask=mask))
    assert [*chat.reply("And?", max_tokens=3)][-1].finish in ("length", "end")


def test_a_seed_makes_a_reply_reproducible(chat):
    seeded = Sampling(temperature=1.0, top_p=1.0, seed=7)
    said(chat.reply("Hi", sampling=seeded))
    first = ids_of(chat)
    said(chat.retry(sampling=seeded))
    assert ids_of(chat) == first
    said(chat.retry())
    assert ids_of(chat) != first


def test_without_a_seed_a_reply_continues_the_session_s_numbers(model):
    texts = []
    given: list[Any] = [{}, {"sampling": DRAWN}]
    for options in given:
        chat = mlx_stream.ChatSession(model, window=60, sampling=Sampling(1.0, 0, 1.0, seed=5))
        texts.append([said(chat.reply(q, max_tokens=8, **options)) for q in ("Hi", "And?", "x")])
    assert texts[0] == texts[1]


def test_another_bias_or_mask_is_no_new_trace(model, monkeypatch):
    from mlx_stream import backend

    monkeypatch.setattr(backend, "tracing", lambda: (True, True))
    chat, counts = mlx_stream.ChatSession(model, **OPTIONS), []
    for id in range(20, 30):
        said(chat.reply("Hi", bias={id: 5.0}, max_tokens=30))
        said(chat.reply("Hi", mask=lambda ids, id=id: np.arange(300) != id, max_tokens=30))
        counts.append(model.compiled_steps.count)
    assert counts[-1] - counts[3] < 3  # in 12 replies; a new kind of step may come late


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bias": {300: 1.0}}, "bias of token 300"),
        ({"bias": {1: math.inf}}, "bias of token 1 is inf"),
        ({"bias": {1: 1e39}}, "bias of token 1"),
        ({"bias": {1.5: 1.0}}, "bias of token 1.5"),
        ({"bias": {"a": 1.0}}, "bias of token 'a'"),
        ({"bias": dict.fromkeys(range(300), -math.inf)}, "at least one token"),
        ({"temperature": 0.1}, "`temperature` is not a reply option"),
        ({"logprobs": 1.5}, "`logprobs` must be"),
        ({"mask": 5}, "`mask` must be"),
        ({"max_tokens": 1.5}, "`max_tokens` must be a whole number"),
        ({"bias": {-1: 1.0}}, "bias of token -1"),
        ({"bias": {1: math.nan}}, "nan"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20"),
        ({"logprobs": -1}, "logprobs must be from 0 to 20"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_out_of_range_are_refused(chat, options, match):
    with pytest.raises(ValueRefused, match=match):
        said(chat.reply("Hi", **options))
    assert not chat.exchanges
