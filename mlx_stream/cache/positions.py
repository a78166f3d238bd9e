"""The only place that rotates queries and keys by position; independent of caches and models.

The frequencies never change, so a stored key can be rotated back later.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_stream.rope import RopeConfig, inverse_frequencies


class Rope:
    """Rotate the first dimensions of queries and keys by their position on a clock.

    Attributes:
        rotary_dim: how many dimensions of a head are rotated, an even number; 0 rotates nothing.
        frequencies: (rotary_dim / 2,) float64, the radians per position for each pair.
        periods: their reciprocals in float32.
        score_factor: the yarn or longrope factor for queries and keys, applied to the scale of the
            scores, so that rotating a key again does not apply it twice. It is 1 if only a part of
            a head is rotated; the model then multiplies its queries by `query_factors`.
    """

    def __init__(self, config: RopeConfig, head_dim: int):
        self.frequencies = inverse_frequencies(config, head_dim)
        self.head_dim, self.rotary_dim = head_dim, 2 * len(self.frequencies)
        whole = self.rotary_dim == head_dim
        self.score_factor = config.attention_factor**2 if whole else 1.0
        self.periods = mx.array((1.0 / self.frequencies).astype(np.float32))
        # Evaluated here for `token_rotation`; otherwise every traced step would recompute them. The
        # reciprocal is computed as in `mx.fast.rope`, so both use the same angles.
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

        `position` is int32 with one element and never negative: Metal computes position + row as an
        unsigned integer. Metal also reads one position for each B, past the end of a one-element
        array, so B is folded into the heads.
        """
        return self._apply(x.reshape(1, -1, *x.shape[2:]), position, 1.0).reshape(x.shape)

    def rotate_all(self, x: mx.array, position: int, backwards: bool = False) -> mx.array:
        """Rotate every row of (B, heads, T, D) by the same angle, forwards or backwards."""
        rows = x.reshape(1, -1, 1, self.head_dim)
        place = mx.array([position], mx.int32)
        return self._apply(rows, place, -1.0 if backwards else 1.0).reshape(x.shape)

    def token_rotation(self, positions: mx.array, heads: int) -> "Callable[[mx.array], mx.array]":
        """Return a function that rotates B tokens, all heads, to their positions, (B,) int32."""
        if not self.rotary_dim:
            return unchanged
        angles = positions.astype(mx.float32).reshape(-1, 1, 1, 1) * self._rates
        partners = mx.broadcast_to(self._partners, (len(positions), heads, 1, self.head_dim))
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
    """The rotation of one token for each B, computed once and used in every layer.

    `mx.fast.rope` computes its angles on each call. On the CPU backend it takes 14 of the 50
    operations of a layer; this takes 2. On Metal it is one small kernel and this is two, but it
    uses the fast sine and cosine, whose error grows with the angle.

    Attributes:
        cos, sin: (B, 1, 1, D) float32; the sine of a pair's first half is negative.
        partners: (B, heads, 1, D) uint32, the index of the other half of each pair.
    """

    cos: mx.array
    sin: mx.array
    partners: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate (B, heads, 1, D) in float32, rounding once, as on Metal."""
        others = mx.take_along_axis(x, self.partners, axis=-1)
        turned = x.astype(mx.float32) * self.cos + others.astype(mx.float32) * self.sin
        return turned.astype(x.dtype)


def unchanged(x: mx.array) -> mx.array:
    """Return `x` without rotating it."""
    return x
