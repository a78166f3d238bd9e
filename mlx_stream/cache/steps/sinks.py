"""The sinks' position on the clock: directly before the oldest attended token."""

import mlx.core as mx

from mlx_stream.cache.attention import AttentionShape
from mlx_stream.cache.geometry import Geometry
from mlx_stream.cache.storage import CacheState, Rows, RowStorage


def place_sinks(
    shape: AttentionShape, storage: RowStorage, geometry: Geometry, state: CacheState, token: int
) -> tuple[list[Rows], int]:
    """Return each layer's keys with the sinks at their position for `token`, and that position.

    Nothing is computed if they are already there. The state itself does not change.
    """
    clock = geometry.sinks_clock(state.position, token)
    if geometry.sinks == 0 or clock == state.position.sinks_at:
        return state.keys, state.position.sinks_at
    turned = shape.rotate_layers(state.sinks, mx.array([clock], mx.int32))
    segments = [(0, geometry.sinks, 0)]
    placed = [
        storage.write(keys, turned[layer : layer + 1], segments)
        for layer, keys in enumerate(state.keys)
    ]
    return placed, clock
