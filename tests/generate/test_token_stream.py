"""The stream of ids: what it reads, attends to and takes back, and how long it may be."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream import backend
from mlx_stream.cache import AttentionShape, Step, StreamCache
from mlx_stream.cache.positions import Rope
from mlx_stream.config import read_config
from mlx_stream.errors import TokenizerError, ValueRefused, WeightsError
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import ReadRequest, Want
from mlx_stream.generate.token_stream import IDS, TokenStream
from mlx_stream.models.compiled import CompiledSteps
from mlx_stream.models.layers import CausalLM, DecoderLayer
from mlx_stream.sampling import Sampler, Sampling
from tests.fakes.shapes import check_erased
from tests.fakes.tiny import tiny_config
from tests.fakes.tiny_models import some_ids


class OnlyIds:
    """A network that computes nothing, to drive a cache by ids."""

    def __call__(self, tokens: mx.array, step: Step) -> mx.array:
        tokens = tokens.astype(mx.float32)
        step.attend(0, mx.broadcast_to(tokens[:, None, :, None], (1, 3, step.rows, 2)))
        return tokens[:, :, None]

    prefill = __call__

    def logits(self, hidden: mx.array) -> mx.array:
        return hidden


ONLY_IDS = cast(
    Model,
    SimpleNamespace(
        network=OnlyIds(),
        config=SimpleNamespace(vocab_size=2**31),
        compiled_steps=CompiledSteps(cast(CausalLM, OnlyIds())),
    ),
)
operations = st.lists(
    st.tuples(
        st.sampled_from(["read", "decode", "evict", "rewind"]),
        st.integers(0, 5) | st.integers(0, 40),
    ),
    max_size=25,
)


@given(st.integers(0, 5), st.integers(1, 12), st.integers(0, 6), operations)
def test_attended_ids_are_those_the_cache_attends(sinks, window, spare, operations):
    rope = Rope(read_config(tiny_config()).rope, 2)
    shape = AttentionShape(1, 1, 2, (rope,))
    cache = StreamCache(shape, sinks, window, spare, clock_limit=0)
    stream = TokenStream(ONLY_IDS, cache)
    text: list[int] = []  # the id of each token, by its number
    for operation, amount in operations:
        if operation in ("read", "decode"):
            new = [1_000 + len(text) + i for i in range(max(1, amount))]
            text += new
            last = stream.read(new, chunk=1 if operation == "decode" else 7)
            assert last.item() == new[-1]
        elif operation == "rewind":
            with pytest.raises(ValueRefused):
                stream.rewind(cache.rewindable + 1 + amount)
            count = min(amount, cache.rewindable)
            stream.rewind(count)
            del text[len(text) - count :]
        else:
            cache.evict(min(amount, cache.attended - min(cache.length, sinks)))
        first = range(min(sinks, len(text)))
        attended = [text[t] for t in (*first, *range(cache.oldest, len(text)))]
        assert stream.ids.attended() == attended
        assert stream.length == len(text)
        # The cache's values are the ids: the attended rows hold the attended ids.
        held = np.array(cache.current.values[0])[0, 0, cache.attended_rows(), 0]
        assert held.astype(int).tolist() == attended


@pytest.mark.parametrize("bits", [None, 8])
def test_prefill_leaves_the_stream_that_reading_leaves(tiny_model, bits):
    model, ids = tiny_model(head_dim=64), some_ids(160)
    read, prefilled = (TokenStream(model, model.new_cache(4, 40, kv_bits=bits)) for _ in range(2))
    shapes = [hidden.shape for hidden in read.steps(ids, 37)]
    assert shapes == [(1, n, model.config.hidden_size) for n in (37, 7, 37, 37, 37, 5)]
    for _, count, _ in shapes:
        found = prefilled.run(ReadRequest(prefilled, ids[prefilled.length :], chunk=37))
        assert (found.count, found.logits) == (count, None)
    one, other = read.state(), prefilled.state()
    assert one.keys() == other.keys()
    for name, held in one.items():
        assert mx.array_equal(mx.array(held), mx.array(other[name])), name
    assert mx.array_equal(read.read([7]), prefilled.read([7]))


class Told:
    """An observer that records its calls."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def read(self, ids: Sequence[int]) -> None:
        self.events.append(("read", *ids))

    def rewind(self, count: int) -> None:
        self.events.append(("rewind", count))

    def restart(self, ids: Sequence[int]) -> None:
        self.events.append(("restart", *ids))

    def erase(self) -> None:
        self.events.append(("erase",))


def test_observers_see_every_change_of_the_stream(tiny_model):
    model, observers = tiny_model(), [Told(), Told()]
    stream = TokenStream(model, model.new_cache(2, 10, 7), observers)
    stream.read([5, 6, 7])
    stream.read([8])
    stream.rewind(0)
    stream.verify([9, 10])
    stream.rewind(1)
    stream.restore(stream.state())
    expected = [("read", 5, 6, 7), ("read", 8), ("read", 9, 10), ("rewind", 1), ("erase",)]
    # Restoring reads the current state first, in case it must be put back.
    assert [event for event in observers[0].events if event != ("erase",)] == [
        *expected[:-1],
        ("restart", 5, 6, 7, 8, 9),
    ]
    assert ("erase",) in observers[0].events
    assert observers[0].events == observers[1].events


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("way", ["erase", "state"])
def test_unattended_rows_are_zero_in_a_state(tiny_model, bits, way):
    """This holds for keys, values and ids, whatever was taken back or evicted."""
    model, told = tiny_model(head_dim=64), Told()
    cache = model.new_cache(3, 10, 0 if bits else 5, kv_bits=bits)
    stream, ids = TokenStream(model, cache, [told]), itertools.cycle(range(3, 290))
    for act in (
        lambda: stream.read([*itertools.islice(ids, 8)]),
        lambda: stream.rewind(6),  # back into the sinks
        lambda: stream.read([*itertools.islice(ids, 5)]),
        lambda: cache.evict(4),
        lambda: stream.read([*itertools.islice(ids, 30)]),
        lambda: stream.rewind(5),
        lambda: stream.next(7, Sampler(Sampling(0.0))),  # the next step is built ahead
        lambda: cache.evict(3),
        lambda: stream.rewind(2),
    ):
        act()
        attended, rows = stream.ids.attended(), cache.attended_rows()
        if way == "state":
            held = np.array(stream.state()[IDS]).tolist()
        else:
            stream.erase()
            held = stream.ids.by_row
        check_erased(cache)
        assert told.events[-1] == ("erase",)
        assert len(held) == max(rows) + 1
        assert [held[row] for row in rows] == attended == stream.ids.attended()
        assert not any(id for row, id in enumerate(held) if row not in rows)


# --- requests ---


def pair(model) -> tuple[TokenStream, TokenStream]:
    """Return two streams that have read the same ids, past their wrap."""
    streams = [TokenStream(model, model.new_cache(3, 20, 7)) for _ in range(2)]
    for stream in streams:
        stream.read(some_ids(40))
    return streams[0], streams[1]


def test_a_request_reads_one_step_and_returns_its_results(tiny_model):
    one, other = pair(tiny_model())
    ids = some_ids(12, seed=2)
    first = one.run(ReadRequest(one, ids, Want.LOGITS, chunk=5))
    assert (first.count, first.logits, first.token) == (5, None, -1)
    assert first.seconds > 0 and one.length == 45
    last = one.run(ReadRequest(one, ids[5:], Want.LOGITS))
    assert last.count == 7 and last.logits is not None
    other.read(ids[:5])
    assert mx.array_equal(last.logits, other.read(ids[5:]))
    for want in (Want.NOTHING, Want.LOGITS):
        found = one.run(ReadRequest(one, [9], want))
        assert found.count == 1
        assert (found.logits is None) == (want is Want.NOTHING)
        expected = other.read([9])
        assert found.logits is None or mx.array_equal(found.logits, expected)
    rows = one.run(ReadRequest(one, [4, 5, 6], Want.ROWS))
    assert rows.count == 3 and rows.logits is not None
    assert mx.array_equal(rows.logits, other.verify([4, 5, 6]))
    samplers = [Sampler(Sampling(1.0, seed=4)) for _ in range(2)]
    found = one.run(ReadRequest(one, (8,), Want.TOKEN, sampler=samplers[0], more=False))
    assert found.count == 1 and found.logits is None
    assert found.token == other.next(8, samplers[1])[0]
    assert (one._pending is None, other._pending is None) == (True, False)
    assert one.ids.attended() == other.ids.attended() and not one.failed


@pytest.mark.parametrize("want", Want)
def test_ids_that_cannot_be_read_change_nothing(tiny_model, want):
    one, other = pair(tiny_model())
    greedy = Sampler(Sampling(0.0))
    for ids in ([300], [-1]):
        with pytest.raises(TokenizerError, match="outside the model's vocabulary of 300"):
            one.run(ReadRequest(one, ids, want, sampler=greedy))
    if want in (Want.NOTHING, Want.LOGITS):
        for ids, chunk in (([], 5), ([3], 0)):
            with pytest.raises(ValueRefused):
                one.run(ReadRequest(one, ids, want, chunk))
    assert not one.failed
    assert one.ids.attended() == other.ids.attended()
    assert mx.array_equal(one.read([5]), other.read([5]))


def fail(*_: Any) -> None:
    raise RuntimeError("the device failed")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("want", Want)
def test_a_step_that_fails_lets_go_of_the_rows(tiny_model, want, count, monkeypatch):
    """In tests/long/failures.py, MLX itself fails."""
    monkeypatch.setenv(backend.COMPILE, "0")
    model = tiny_model()
    stream, greedy = pair(model)[0], Sampler(Sampling(0.0))
    ids = some_ids(1 if want is Want.TOKEN else count)
    monkeypatch.setattr(DecoderLayer, "__call__", fail)
    with pytest.raises(RuntimeError, match="the device failed"):
        stream.run(ReadRequest(stream, ids, want, sampler=greedy))
    assert stream.failed
    assert stream._pending is None and not stream._computed
    assert sum(array.nbytes for array in stream.cache.arrays()) == 0
    # What was read is still known, and can be counted and taken back.
    stream.rewind(stream.length - 38)
    assert stream.ids.attended() == [*some_ids(40)[:3], *some_ids(40)[18:38]]


def test_logits_that_are_no_numbers_are_refused(tiny_model):
    model = tiny_model()
    stream = pair(model)[0]
    model.network.norm.weight = model.network.norm.weight * float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        stream.run(ReadRequest(stream, [5], Want.LOGITS))
    assert stream.failed


# --- how long a stream may be ---


@pytest.mark.parametrize(("sinks", "window", "says"), [
    *((-1, 10, "`sinks`"), (512, 10, "`sinks`"), (4, 0, "`window`"), (4, -3, "`window`")),
    *((4, 509, "512.*508"), (511, None, None), (4, 508, None), (None, None, None)),
])  # fmt: skip
def test_the_trained_context_bounds_a_stream(tiny_model, sinks, window, says):
    model = tiny_model()
    if says is None:
        cache = model.new_cache(sinks, window)
        assert cache.geometry.sinks + cache.geometry.window == 512
        return
    with pytest.raises(ValueRefused, match=says):
        model.new_cache(sinks, window)
