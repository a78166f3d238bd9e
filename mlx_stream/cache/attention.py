"""The attention of a model's layers: heads, scale, rotation. Independent of rows and streams."""

from dataclasses import dataclass

from mlx_stream.cache.positions import Rope


@dataclass(frozen=True)
class AttentionShape:
    """The shape of every layer's attention, shared by all streams of a model.

    Attributes:
        layers, query_heads, kv_heads, head_dim: L, H, K, D.
        rope: the rotary positions.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope

    @property
    def scale(self) -> float:
        """The factor on scores, including yarn's factor on queries and on keys."""
        return self.head_dim**-0.5 * self.rope.magnitude**2
