"""What attention is in a model's layers: heads, scale, rotation; knows no rows and no stream."""

from dataclasses import dataclass

from mlx_stream.cache.positions import Rope


@dataclass(frozen=True)
class AttentionShape:
    """The shape of every layer's attention; all streams of a model share one.

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
        """The factor on scores; yarn's factor on queries and keys is in it, once."""
        return self.head_dim**-0.5 * self.rope.magnitude**2
