"""Rotary frequencies and the one rotation built on them; independent of caches and models.

Formulas: RoPE (arXiv 2104.09864); linear, llama3, yarn (arXiv 2309.00071) and longrope (arXiv
2402.13753) as in transformers' `modeling_rope_utils`. The frequencies never change, so a stored key
can be rotated back later.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_stream.config import RopeConfig


class Rope:
    """Rotate the first numbers of queries and keys by their position on a clock.

    Attributes:
        rotary_dim: how many numbers of a head are rotated, even; 0 rotates nothing.
        frequencies: (rotary_dim / 2,) float64, the radians per position of each pair.
        periods: their reciprocals in float32.
        score_factor: the factor of yarn or longrope on queries and on keys, for the scale of the
            scores, so that rotating a key again does not apply it twice. It is 1 if only a part of
            a head is rotated: then the model multiplies its queries by `query_factors`.
    """

    def __init__(self, config: RopeConfig, head_dim: int):
        self.frequencies = inverse_frequencies(config, head_dim)
        self.head_dim, self.rotary_dim = head_dim, 2 * len(self.frequencies)
        whole = self.rotary_dim == head_dim
        self.score_factor = config.attention_factor**2 if whole else 1.0
        self.periods = mx.array((1.0 / self.frequencies).astype(np.float32))
        # Evaluated here for `token_rotation`, or every traced step would compute them again. The
        # reciprocal is the one of `mx.fast.rope`, so both have the same angles.
        rates, ones = mx.reciprocal(self.periods), mx.ones_like(self.periods)
        still = mx.zeros(head_dim - self.rotary_dim)
        self._rates = mx.concatenate([rates, rates, still])
        self._signs = mx.concatenate([-ones, ones, still])
        order = np.arange(head_dim, dtype=np.uint32)
        order[: self.rotary_dim] = np.roll(order[: self.rotary_dim], self.rotary_dim // 2)
        self._partners = mx.array(order)
        mx.eval(self.periods, self._rates, self._signs, self._partners)

    def rotate(self, x: mx.array, position: mx.array) -> mx.array:
        """Rotate (B, heads, T, D) so that row r of T is at position + r.

        `position` is int32 with one element and never negative: Metal computes position + row as
        unsigned. Metal also reads one position for each B, past the end of a one-element array, so
        B is folded into the heads.
        """
        return self._apply(x.reshape(1, -1, *x.shape[2:]), position, 1.0).reshape(x.shape)

    def rotate_all(self, x: mx.array, position: int, backwards: bool = False) -> mx.array:
        """Rotate every row of (B, heads, T, D) by the same angle, forwards or backwards."""
        rows = x.reshape(1, -1, 1, self.head_dim)
        place = mx.array([position], mx.int32)
        return self._apply(rows, place, -1.0 if backwards else 1.0).reshape(x.shape)

    def token_rotation(self, position: mx.array, heads: int) -> "Callable[[mx.array], mx.array]":
        """Return the rotation of one token's heads to `position`, int32 with one element."""
        if not self.rotary_dim:
            return unchanged
        angles = position.astype(mx.float32) * self._rates
        partners = mx.broadcast_to(self._partners, (1, heads, 1, self.head_dim))
        return TokenRotation(mx.cos(angles), mx.sin(angles) * self._signs, partners)

    def _apply(self, x: mx.array, position: mx.array, scale: float) -> mx.array:
        if not self.rotary_dim:
            return x
        return mx.fast.rope(
            x,
            self.rotary_dim,
            traditional=False,
            base=None,
            scale=scale,
            offset=position,
            freqs=self.periods,
        )


@dataclass(frozen=True)
class TokenRotation:
    """One token's rotation, computed once and used in every layer.

    `mx.fast.rope` computes its angles at each call. On the CPU backend it takes 14 of the 50
    operations of a layer; this takes 2. On Metal it is one small kernel where this is two, but it
    uses the fast sine and cosine, whose error grows with the angle.

    Attributes:
        cos, sin: (D,) float32; the sine of a pair's first half is negative.
        partners: (1, heads, 1, D) uint32, the index of the other half of each pair.
    """

    cos: mx.array
    sin: mx.array
    partners: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate (1, heads, 1, D), in float32 and rounded once, as on Metal."""
        others = mx.take_along_axis(x, self.partners, axis=-1)
        turned = x.astype(mx.float32) * self.cos + others.astype(mx.float32) * self.sin
        return turned.astype(x.dtype)


def unchanged(x: mx.array) -> mx.array:
    """Rotate nothing."""
    return x


def query_factors(config: RopeConfig, head_dim: int) -> np.ndarray | None:
    """Return the factors on the numbers of a query where only a part of it is rotated.

    The factor of yarn or longrope is on the rotated numbers of queries and keys. Here the queries
    have its square and the keys are stored without it: (head_dim,) float32, None if all are 1.
    """
    rotary_dim = config.rotary_dim(head_dim)
    if rotary_dim == head_dim or config.attention_factor == 1:
        return None
    factors = np.ones(head_dim, np.float32)
    factors[:rotary_dim] = config.attention_factor**2
    return factors


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the radians per position of each pair: (rotary_dim / 2,) float64."""
    dim = config.rotary_dim(head_dim)
    if dim == 0:
        return np.zeros(0)
    plain = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.rope_type == "linear":
        return plain / config.factor
    if config.rope_type == "llama3":
        return llama3(config, plain)
    if config.rope_type == "yarn":
        return yarn(config, plain, dim)
    if config.rope_type == "longrope":
        return plain / np.array(config.short_factor)
    return plain


def llama3(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Slow down the pairs that turn less than `low_freq_factor` times in the original context."""
    turns = config.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * ((1 - keep) / config.factor + keep)


def yarn(config: RopeConfig, plain: np.ndarray, dim: int) -> np.ndarray:
    """Slow down pairs below `beta_slow` turns by `factor`, and none above `beta_fast` turns."""

    def pair_turning(times: float) -> float:
        original = config.original_max_position_embeddings
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (slowed / config.factor + 1 - slowed)
