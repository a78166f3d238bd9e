"""The stream of ids: what it reads, attends to and takes back, and how long it may be."""

from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.cache import Cache, Step, StreamCache
from mlx_stream.cache.positions import Rope
from mlx_stream.config import read_config
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import Model
from mlx_stream.models.compiled import CompiledSteps
from mlx_stream.models.layers import CausalLM
from tests.fakes.tiny import tiny_config
from tests.fakes.tiny_models import some_ids


class OnlyIds:
    """A network that computes nothing, to drive a cache by ids."""

    def __call__(self, ids: list[int], cache: Cache, prefill: bool = False) -> mx.array:
        step = cache.begin(len(ids))
        hidden = self.hidden(mx.array([[*ids, *[0] * (step.rows - step.count)]]), step)
        cache.commit(step)
        return hidden[:, : step.count]

    def hidden(self, tokens: mx.array, step: Step) -> mx.array:
        tokens = tokens.astype(mx.float32)
        step.attend(0, mx.broadcast_to(tokens[:, None, :, None], (1, 3, step.rows, 2)))
        return tokens[:, :, None]

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
    cache = StreamCache(1, 1, 1, 2, rope, sinks, window, spare, clock_limit=0)
    stream = TokenStream(ONLY_IDS, cache)
    text: list[int] = []  # the id of each token, by its number
    for operation, amount in operations:
        if operation in ("read", "decode"):
            new = [1_000 + len(text) + i for i in range(max(1, amount))]
            text += new
            last = stream.read(new, chunk=1 if operation == "decode" else 7)
            assert last.item() == new[-1]
        elif operation == "rewind":
            count = min(amount, cache.rewindable)
            stream.rewind(count)
            del text[len(text) - count :]
        else:
            stream.evict(min(amount, cache.attended - min(cache.length, sinks)))
        first = range(min(sinks, len(text)))
        attended = [text[t] for t in (*first, *range(cache.oldest, len(text)))]
        assert stream.attended_ids() == attended
        assert stream.length == len(text)
        # The cache's values are the ids: what is attended is what is said to be.
        held = np.array(cache.values[0])[0, 0, cache.attended_rows(), 0]
        assert held.astype(int).tolist() == attended


def test_a_stream_can_go_back_into_its_sinks(tiny_model):
    stream = TokenStream(tiny_model(), tiny_model().new_cache(3, 10))
    stream.read([1, 2, 3, 4, 5])
    stream.rewind(4)
    assert stream.attended_ids() == [1]
    stream.read([6, 7, 8])
    assert stream.attended_ids() == [1, 6, 7, 8]
    stream.rewind(4)
    assert stream.attended_ids() == []


def test_refused_moves_leave_the_ids_as_they_were(tiny_model):
    stream = TokenStream(tiny_model(), tiny_model().new_cache(2, 10))
    stream.read(some_ids(30))
    before = stream.attended_ids()
    for refused in (stream.rewind, stream.evict):
        for count in (-1, 11):
            with pytest.raises(ValueRefused):
                refused(count)
    assert stream.attended_ids() == before == [*some_ids(30)[:2], *some_ids(30)[-10:]]


def test_reading_in_chunks_equals_reading_at_once_and_progress_adds_up(tiny_model):
    model = tiny_model()
    ids = some_ids(150)
    whole = TokenStream(model, model.new_dense_cache()).read(ids, 512)
    told: list[int] = []
    for chunk in (1, 7, 128):
        stream = TokenStream(model, model.new_cache(4, 200))
        logits = stream.read(ids, chunk, told.append)
        np.testing.assert_allclose(np.array(logits), np.array(whole), atol=1e-3)
        assert logits.shape == (300,)
        assert sum(told) == 150
        told.clear()
    with pytest.raises(ValueRefused):
        TokenStream(model, model.new_cache(4, 200)).read([])


@pytest.mark.parametrize("bits", [None, 8])
def test_prefill_leaves_the_stream_that_reading_leaves(tiny_model, bits):
    model, ids = tiny_model(head_dim=64), some_ids(160)
    read, prefilled = (TokenStream(model, model.new_cache(4, 40, kv_bits=bits)) for _ in range(2))
    shapes = [hidden.shape for hidden in read.steps(ids, 37)]
    assert shapes == [(1, n, model.config.hidden_size) for n in (37, 7, 37, 37, 37, 5)]
    assert [*prefilled.prefill(ids, 37)] == [n for _, n, _ in shapes]
    one, other = read.state(), prefilled.state()
    assert one.keys() == other.keys()
    for name, held in one.items():
        assert mx.array_equal(mx.array(held), mx.array(other[name])), name
    assert mx.array_equal(read.read([7]), prefilled.read([7]))


def test_prefill_ends_where_the_last_layer_begins(tiny_model):
    model, ids = tiny_model(), some_ids(8)
    before = model.network(ids, model.new_cache(4, 40), prefill=True)
    x = model.network.embed_tokens(mx.array(ids))
    step = model.new_cache(4, 40).begin(len(ids))
    for index, layer in enumerate(model.network.layers[:-1]):
        x = layer(x, step, index)
    assert mx.array_equal(before[0], x)


@pytest.mark.parametrize(
    ("sinks", "window", "says"),
    [
        (-1, 10, "--sinks"),
        (512, 10, "--sinks"),
        (4, 0, "--window"),
        (4, -3, "--window"),
        (4, 509, "512.*508"),
        (511, None, None),
        (4, 508, None),
        (None, None, None),
    ],
)
def test_the_trained_context_bounds_a_stream(tiny_model, sinks, window, says):
    model = tiny_model()
    if says is None:
        cache = model.new_cache(sinks, window)
        assert cache.geometry.sinks + cache.geometry.window == 512
        return
    with pytest.raises(ValueRefused, match=says):
        model.new_cache(sinks, window)
