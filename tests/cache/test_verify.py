"""Steps of a few tokens on the ring, some of them taken back, against the slow reference."""

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_stream.cache import DenseCache
from mlx_stream.errors import ValueRefused
from tests.fakes.shapes import Shape, Twins, next_step


@pytest.mark.parametrize(("window", "count"), [(3, 4), (40, 2), (40, 8)])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float32, 2e-4), (mx.float16, 1e-2), (mx.bfloat16, 0.1)], ids=str
)
def test_rejected_tokens_cost_no_attended_one(sinks, window, count, dtype, tolerance):
    """Accept each number in turn: while the ring fills, around its wrap and re-anchorings."""
    shape = Shape(sinks, window, 7, group=2, head_dim=16, layers=1, dtype=dtype)
    twins = Twins(shape, tolerance)
    twins.read(sinks + 20)
    wraps = 0
    while wraps < 3 * (window + 7):
        taken = min(count, twins.cache.max_verify)
        assert taken == count or twins.cache.room < count
        twins.verify(taken)
        accepted = 1 + (wraps % taken)
        twins.rewind(taken - accepted)
        wraps += accepted
        full = twins.cache.length >= sinks + window
        assert twins.cache.attended == (sinks + window if full else twins.cache.length)
        twins.check_numbers()
        if wraps % 3 == 0:
            twins.read(1)
    assert twins.cache.position.clock <= 2 * shape.cache().geometry.rows


def test_how_many_tokens_a_step_verifies():
    shape = Shape(sinks=2, window=20, spare=7, group=2)
    assert shape.cache().max_verify == 1  # its sinks are read first
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
        assert twins.cache.max_verify == min(expected, 3)  # as many as fit without evicting
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
