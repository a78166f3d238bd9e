"""Rotary frequencies and the one rotation built on them; independent of caches and models.

Formulas: RoPE (arXiv 2104.09864); linear, llama3 and yarn (arXiv 2309.00071) as in transformers'
`modeling_rope_utils`. The frequencies never change, so a stored key can be rotated back later.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_stream.config import RopeConfig


class Rope:
    """Rotate queries and keys by their position on a clock.

    Attributes:
        periods: (D / 2,) float32; a pair is rotated by position / period radians.
        magnitude: yarn's factor on queries and keys. The scale of the scores has its square, so
            that rotating a key again does not apply it twice.
    """

    def __init__(self, config: RopeConfig, head_dim: int):
        self.head_dim = head_dim
        self.magnitude = config.attention_factor
        self.periods = mx.array((1.0 / inverse_frequencies(config, head_dim)).astype(np.float32))
        # Evaluated here for `token_rotation`, or every traced step would compute them again. The
        # reciprocal is the one of `mx.fast.rope`, so both have the same angles.
        rates, ones = mx.reciprocal(self.periods), mx.ones_like(self.periods)
        self._rates = mx.concatenate([rates, rates])
        self._signs = mx.concatenate([-ones, ones])
        self._partners = mx.roll(mx.arange(head_dim, dtype=mx.uint32), head_dim // 2)
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

    def token_rotation(self, position: mx.array, heads: int) -> "TokenRotation":
        """Return the rotation of one token's heads to `position`, int32 with one element."""
        angles = position.astype(mx.float32) * self._rates
        partners = mx.broadcast_to(self._partners, (1, heads, 1, self.head_dim))
        return TokenRotation(mx.cos(angles), mx.sin(angles) * self._signs, partners)

    def _apply(self, x: mx.array, position: mx.array, scale: float) -> mx.array:
        return mx.fast.rope(
            x,
            self.head_dim,
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


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the radians per position of each pair: (head_dim / 2,) float64."""
    plain = config.rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.rope_type == "linear":
        return plain / config.factor
    if config.rope_type == "llama3":
        return llama3(config, plain)
    if config.rope_type == "yarn":
        return yarn(config, plain, head_dim)
    return plain


def llama3(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Slow down the pairs that turn less than `low_freq_factor` times in the original context."""
    turns = config.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * ((1 - keep) / config.factor + keep)


def yarn(config: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Slow down pairs below `beta_slow` turns by `factor`, and none above `beta_fast` turns."""

    def pair_turning(times: float) -> float:
        original = config.original_max_position_embeddings
        return (
            head_dim
            * math.log(original / (times * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    slowed = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (slowed / config.factor + 1 - slowed)
