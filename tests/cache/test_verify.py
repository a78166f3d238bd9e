"""Steps of a few tokens on the ring, some of them taken back, against the slow reference."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.cache import DenseCache
from mlx_stream.cache.steps.verify import VerifyStep
from mlx_stream.errors import ValueRefused
from tests.fakes.shapes import Shape, Twins, next_step, shapes


def verify(twins: Twins, count: int) -> None:
    """Read tokens in one step that writes first; compare every row of every layer."""
    step = next_step(twins.cache, count, verify=True)
    assert isinstance(step, VerifyStep) == (count > 1) and step.count == step.rows == count
    heads = [twins.heads(step.rows) for _ in range(twins.shape.layers)]
    outs = [step.attend(layer, new) for layer, new in enumerate(heads)]
    twins.cache.commit(step)
    mx.eval(outs, twins.cache.arrays())
    for slow, new, out in zip(twins.slow, heads, outs, strict=True):
        twins.compare(slow, new, out, count, lambda token: True)


def take_back(twins: Twins, count: int) -> None:
    twins.cache.rewind(count)
    for slow in twins.slow:
        slow.rewind(count)


moves = st.lists(
    st.tuples(st.sampled_from(["verify", "verify", "one", "chunk", "evict"]), st.integers(0, 40)),
    max_size=14,
)


@given(shapes, moves, st.randoms(use_true_random=False))
def test_every_row_is_that_of_the_reference(shape, moves, random):
    twins = Twins(shape)
    for move, amount in moves:
        if move == "verify":
            count = 1 + amount % twins.cache.max_verify
            before, rejected = twins.cache.attended, random.randrange(count)
            verify(twins, count)
            take_back(twins, rejected)
            most = min(twins.cache.length, shape.sinks) + shape.window
            expected = min(before + count - rejected, most)
            assert twins.cache.attended == expected, "an attended token was lost"
        elif move == "evict":
            held = twins.cache.attended - min(twins.cache.length, shape.sinks)
            count = min(held, amount)
            twins.cache.evict(count)
            for slow in twins.slow if count else []:
                slow.evict(count)
        else:
            twins.read(1 if move == "one" else 1 + amount)
        twins.check_numbers()


@pytest.mark.parametrize("window", range(1, 9))
@pytest.mark.parametrize("sinks", [0, 3])
def test_all_but_the_first_can_be_taken_back_also_where_the_window_is_smaller(sinks, window):
    twins = Twins(Shape(sinks, window, 7, layers=1))
    twins.read(sinks + window + 8)
    for _ in range(20):
        count = twins.cache.max_verify
        assert count == min(7, window) + 1
        verify(twins, count)
        take_back(twins, count - 1)
        twins.check_numbers()


@pytest.mark.parametrize("sinks", [0, 4, 32])
@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("clock_limit", [0, 2**14])
def test_rejected_tokens_cost_no_attended_one(sinks, count, clock_limit):
    """Filling, at the wrap, after it and across re-anchorings: every number accepted in turn."""
    window = 40
    shape = Shape(sinks, window, 7, group=3, layers=1, clock_limit=clock_limit)
    twins = Twins(shape)
    twins.read(sinks + 20)
    wraps = 0
    while wraps < 3 * (window + 7):
        taken = min(count, twins.cache.max_verify)
        verify(twins, taken)
        accepted = 1 + (wraps % taken)
        take_back(twins, taken - accepted)
        wraps += accepted
        full = twins.cache.length >= sinks + window
        assert twins.cache.attended == (sinks + window if full else twins.cache.length)
        twins.check_numbers()
        if wraps % 3 == 0:
            twins.read(1)
    assert clock_limit or twins.cache.position.clock <= 2 * shape.cache().geometry.rows


def test_it_equals_one_by_one_and_a_chunk():
    shape = Shape(sinks=4, window=50, spare=7, group=3, head_dim=16)
    random = np.random.default_rng(3)
    heads = mx.array(random.standard_normal((1, 5, 408, 16)).astype(np.float32))

    def run(way: str) -> np.ndarray:
        cache, outs, first = shape.cache(), [], 0
        while first < 400:
            verifies = way == "verify"
            most = cache.max_verify if verifies else cache.max_step(1 if way == "one" else 8)
            step, out = next_step(cache, min(most, 400 - first), verifies), heads
            for layer in range(2):
                out = step.attend(layer, heads[:, :, first : first + step.rows])
            cache.commit(step)
            outs.append(out[:, :, : step.count])
            mx.eval(outs, cache.arrays())
            first += step.count
        return np.array(mx.concatenate(outs, axis=2))

    verified = run("verify")
    np.testing.assert_allclose(verified, run("one"), atol=1e-4)
    np.testing.assert_allclose(verified, run("chunk"), atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float16, 1e-2), (mx.bfloat16, 0.1)], ids=["float16", "bfloat16"]
)
def test_half_precision_stays_within_its_rounding(dtype, tolerance):
    shape = Shape(4, 30, 7, group=2, head_dim=16, dtype=dtype)
    twins = Twins(shape, tolerance)
    twins.read(20)
    for _ in range(30):
        verify(twins, min(8, twins.cache.max_verify))


def test_how_many_tokens_a_step_verifies():
    shape = Shape(sinks=2, window=20, spare=7, group=2)
    assert shape.cache().max_verify == 1  # its sinks come first
    for change, expected in (
        ({}, 8),
        ({"spare": 0}, 1),
        ({"spare": 3}, 4),
        ({"spare": 20}, 8),
        ({"group": 7}, 4),
        ({"group": 40}, 1),
        ({"bits": 8, "head_dim": 64}, 1),
    ):
        twins = Twins(replace(shape, **change))
        twins.read(5)
        assert twins.cache.max_verify == expected
        twins.read(14)
        assert twins.cache.max_verify == min(expected, 3)  # before the oldest must leave
        twins.read(10)
        assert twins.cache.max_verify == expected
    dense = DenseCache(shape.attention())
    assert dense.max_verify == 1
    with pytest.raises(ValueRefused):
        dense.plan(2, verify=True)


def test_buffers_are_updated_in_place():
    shape = Shape(sinks=4, window=20_000, spare=7, group=2, head_dim=64)
    twins = Twins(shape)
    twins.read(5)
    cache = twins.cache
    heads = twins.heads(8)
    active = 0
    for warm in (False, True, True, True):
        if warm and not active:
            active = mx.get_active_memory()
            mx.reset_peak_memory()
        step = next_step(cache, 8, verify=True)
        outs = [step.attend(layer, heads) for layer in range(2)]
        cache.commit(step)
        del step
        mx.eval(outs)
        del outs
    assert mx.get_peak_memory() - active < cache.current.keys[0].nbytes
