"""Checks single operations against numpy, with a model's shapes; independent of streams."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream import backend
from mlx_stream.cache.positions import Rope
from mlx_stream.cache.steps.decode import MOST_ROWS
from mlx_stream.cache.stream import CLOCK_LIMIT
from mlx_stream.errors import one_line
from mlx_stream.generate.model import Model
from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.rope import RopeConfig
from mlx_stream.selftest import reference

# The allowed error for numbers around 1. For float32 it includes the rounding of angles near the
# clock's limit and the reduced precision of an M5.
ALLOWED = {mx.float32: 1e-2, mx.float16: 2e-2, mx.bfloat16: 1e-1}
ROWS = 2_052  # rows of a buffer with 4 sinks and the default window
FEW = 8  # the maximum number of queries that the single-query kernel accepts at once


@dataclass(frozen=True)
class CheckOutcome:
    """Whether a check passed (None if it does not apply), and what it found."""

    holds: bool | None
    what: str


def within(worst: float, allowed: float) -> CheckOutcome:
    """Return whether a difference is small enough; a NaN is not."""
    return CheckOutcome(worst <= allowed, f"off by {worst:.1e} at most, {allowed:.0e} allowed")


def random(model: Model, *shape: int, seed: int = 0) -> mx.array:
    """Return reproducible normal random numbers in a model's dtype."""
    values = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return mx.array(values.astype(np.float32)).astype(model.dtype)


def plain(array: mx.array) -> np.ndarray:
    """Return the values of an array as float64, without the batch axis."""
    return np.array(array.astype(mx.float32)).astype(np.float64)[0]


def worst(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference; infinite if any of the numbers is NaN."""
    difference = np.abs(one - other).max(initial=0.0)
    return float(difference) if np.isfinite(difference) else float("inf")


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the root mean square difference, as a share of the spread of `other`."""
    difference = np.sqrt(np.mean((one - other) ** 2)) / other.std()
    return float(difference) if np.isfinite(difference) else float("inf")


def kinds_of_rotation(model: Model) -> set[Rope]:
    """Return the rotations of the model's layers, and a partial one with a different kernel."""
    part = RopeConfig(partial_rotary_factor=0.75)
    return {*model.attention.ropes, Rope(part, model.config.head_dim)}


def rotation(model: Model) -> CheckOutcome:
    """Check rotating rows to positions up to the clock's limit, and rotating them back."""
    config, off = model.config, 0.0
    heads = config.num_attention_heads + config.num_key_value_heads
    places = ((1, 0), (1, CLOCK_LIMIT - 1), (9, 1_000), (9, CLOCK_LIMIT - 9))
    for rope, (rows, place) in product(kinds_of_rotation(model), places):
        frequencies = rope.frequencies
        x = random(model, 1, heads, rows, config.head_dim)
        at = mx.array([place], mx.int32)
        apart = reference.rotate(plain(x), place + np.arange(rows), frequencies)
        together = reference.rotate(plain(x), np.full(rows, place), frequencies)
        all_turned = rope.rotate_all(x, place)
        pairs = [(rope.rotate(x, at), apart), (all_turned, together)]
        pairs.append((rope.rotate_all(all_turned, place, backwards=True), plain(x)))
        if rows == 1:
            pairs.append((rope.token_rotation(at, heads)(x), apart))
        off = max(off, *(worst(plain(found), expected) for found, expected in pairs))
    return within(off, ALLOWED[model.dtype])


def attention(model: Model) -> CheckOutcome:
    """Check attention as computed by a decode step and by a chunk, with their masks."""
    off = 0.0
    for queries, keys, values, scale, mask in calls(model):
        found = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        seen = added = None
        if mask is not None and mask.dtype == mx.bool_:
            seen = np.array(mask)
        elif mask is not None:
            added = np.array(mask)[0].astype(np.float64)
        expected = reference.attend(plain(queries), plain(keys), plain(values), scale, seen, added)
        off = max(off, worst(plain(found), expected))
    return within(off, ALLOWED[model.dtype])


def fused_attention(model: Model) -> CheckOutcome:
    """Check that MLX has a fused kernel for each shape, by requiring it to use one."""
    if not backend.on_metal():
        return CheckOutcome(None, "not applicable: the CPU has no fused kernel")
    refused = []
    for queries, keys, values, scale, mask in calls(model):
        try:
            mx.eval(
                mx.fast.scaled_dot_product_attention(
                    queries, keys, values, scale=scale, mask=mask, force_fused=True
                )
            )
        except (RuntimeError, ValueError) as error:
            refused.append(f"{queries.shape[2]} tokens: {one_line(error, 120)}")
    head_dim = model.config.head_dim
    if refused:
        return CheckOutcome(False, f"head size {head_dim}, {'; '.join(refused)}")
    return CheckOutcome(True, f"head size {head_dim}, 1 to {PREFILL_CHUNK} tokens at once")


def calls(
    model: Model,
) -> Iterator[tuple[mx.array, mx.array, mx.array, float, mx.array | None]]:
    """Yield arguments for attention calls: queries, keys, values, scale, mask."""
    config = model.config
    shape = (ROWS, config.head_dim)
    keys = random(model, 1, config.num_key_value_heads, *shape, seed=1)
    values = random(model, 1, config.num_key_value_heads, *shape, seed=2)
    scale = config.head_dim**-0.5
    chosen = np.random.default_rng(3)
    for tokens in (1, FEW, PREFILL_CHUNK):
        queries = random(model, 1, config.num_attention_heads, tokens, config.head_dim)
        seen: Any = chosen.random((tokens, ROWS)) < 0.5
        seen[:, 0] = True  # the result for a row without any keys is undefined
        yield queries, keys, values, scale, mx.array(seen)
        if tokens == 1:
            yield queries, keys, values, scale, None
            grouped = queries.reshape(1, config.num_key_value_heads, -1, config.head_dim)
            if grouped.shape[2] <= MOST_ROWS:
                yield grouped, keys, values, scale, None
                yield grouped, keys, values, scale, mx.array(seen)
    # A chunk that moves the oldest token: the mask carries the sinks' scores, all in float32.
    shape = (1, config.num_attention_heads, PREFILL_CHUNK, ROWS)
    added = mx.array(np.where(chosen.random(shape) < 0.5, -1e30, 0.0).astype(np.float32))
    added[..., :4] = mx.array(chosen.standard_normal((*shape[:-1], 4)).astype(np.float32))
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    yield queries, keys, values, scale, added


def quantized_product(model: Model) -> CheckOutcome:
    """Check products with packed weights against products with the same weights dequantized."""
    config = model.config
    inputs, outputs = config.hidden_size, config.intermediate_size
    group = next((size for size in (64, 32) if inputs % size == 0), None)
    if group is None:
        return CheckOutcome(
            None, f"not applicable: {inputs} inputs cannot be divided into groups of 32"
        )
    weight = random(model, outputs, inputs) * inputs**-0.5
    off = 0.0
    for bits in (4, 8):
        packed = mx.quantize(weight, group_size=group, bits=bits)
        whole = mx.dequantize(*packed, group_size=group, bits=bits)
        for rows in (1, FEW):
            x = random(model, 1, rows, inputs, seed=rows)
            product = mx.quantized_matmul(x, *packed, group_size=group, bits=bits)
            expected = plain(x) @ np.array(whole.astype(mx.float32)).astype(np.float64).T
            off = max(off, distance(plain(product), expected))
    return within(off, ALLOWED[model.dtype])
