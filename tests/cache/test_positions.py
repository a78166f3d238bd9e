"""One token's rotation, computed once for all layers, compared with `mx.fast.rope` and float64."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.cache.positions import Rope
from mlx_stream.cache.stream import CLOCK_LIMIT
from mlx_stream.config import read_config
from mlx_stream.rope import inverse_frequencies
from tests import reference
from tests.fakes.tiny import LLAMA3, YARN, tiny_config

PLACES = (0, 1, 1_000, CLOCK_LIMIT - 1)


def made(scaling, head_dim, heads, dtype, part=1.0):
    rope = read_config(tiny_config(rope_scaling=scaling)).rope
    rope = replace(rope, partial_rotary_factor=part)
    x = mx.random.normal((1, heads, 1, head_dim), key=mx.random.key(head_dim)).astype(dtype)
    return Rope(rope, head_dim), x, inverse_frequencies(rope, head_dim)


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "part"), [(2, 1, 1), (8, 3, 1), (64, 12, 1), (16, 3, 0.75), (8, 3, 0)]
)
def test_a_token_is_turned_as_by_the_operation_and_as_in_float64(scaling, head_dim, heads, part):
    rope, x, frequencies = made(scaling, head_dim, heads, mx.float32, part)
    assert rope.rotary_dim == part * head_dim
    for place in PLACES:
        position = mx.array([place], mx.int32)
        turned = np.array(rope.token_rotation(position, heads)(x))
        assert np.abs(turned - np.array(rope.rotate(x, position))).max() < 1e-6
        plain = np.array(x, np.float64)[0].swapaxes(0, 1)  # (T, heads, D)
        exact = reference.rotate(plain, np.array([place]), frequencies)
        assert np.abs(turned[0].swapaxes(0, 1) - exact).max() < 1e-6 + 4e-7 * place


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_rounded_once(dtype):
    rope, x, frequencies = made(None, 64, 12, dtype)
    for place in PLACES[:-1]:  # at the last place, the angles are less exact
        turned = rope.token_rotation(mx.array([place], mx.int32), 12)(x)
        assert turned.dtype == dtype
        plain = np.array(x.astype(mx.float32), np.float64)[0].swapaxes(0, 1)
        exact = mx.array(reference.rotate(plain, np.array([place]), frequencies)).astype(dtype)
        off = np.array((turned[0].swapaxes(0, 1) - exact).astype(mx.float32))
        ulp = 2.0**-10 if dtype == mx.float16 else 2.0**-7
        assert np.abs(off).max() <= 4 * ulp  # the largest value in x is below 4
        assert (off != 0).mean() < 0.02
