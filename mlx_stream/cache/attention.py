"""The attention of a model's layers: heads, scale, rotation. Independent of rows and streams."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_stream.cache.positions import Rope


@dataclass(frozen=True)
class AttentionShape:
    """The shape of every layer's attention, shared by all streams of a model.

    Attributes:
        query_heads, kv_heads, head_dim: H, K, D.
        ropes: the rotation of each layer; layers with the same rotation share one object.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    ropes: tuple[Rope, ...]

    @property
    def layers(self) -> int:
        return len(self.ropes)

    def scale(self, layer: int) -> float:
        """Return the factor applied to a layer's scores, including its rotation's factor."""
        return self.head_dim**-0.5 * self.ropes[layer].score_factor

    def rotate_layers(self, x: mx.array, position: mx.array) -> mx.array:
        """Rotate (L, heads, T, D), one layer per index, so that row r is at position + r."""
        kinds = list(dict.fromkeys(self.ropes))
        turned = kinds[0].rotate(x, position)
        for rope in kinds[1:]:
            chosen = mx.array([one is rope for one in self.ropes]).reshape(-1, 1, 1, 1)
            turned = mx.where(chosen, rope.rotate(x, position), turned)
        return turned
