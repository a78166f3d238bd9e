"""The keys and values of one stream, all layers; knows positions and eviction, no model.

Shape letters, used throughout the package: B batch (always 1), T new tokens, N attended rows,
H query heads, K key/value heads, D head dimension, S sinks, W window, X spare rows, R = W + X ring
rows, L layers. Tokens of a stream are numbered t = 0, 1, 2, ...
"""

from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_stream.cache.dense import DenseCache
from mlx_stream.cache.storage import stream_bytes
from mlx_stream.cache.stream import StreamCache

__all__ = ["Cache", "DenseCache", "Step", "StreamCache", "stream_bytes"]


class Step(Protocol):
    """One pass of new tokens through all layers: what is the same for every layer, once.

    `rows` is T, the number of token rows the model must compute; `count` of them are real, the
    rest pad the step to one of a few lengths and are never stored nor attended by real rows.
    """

    rows: int
    count: int

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        """Store a layer's new keys and values and attend.

        Takes (B, H + 2K, T, D): unrotated queries, keys and values stacked along the heads.
        Returns (B, H, T, D).
        """
        ...


class Cache(Protocol):
    """What attention and `generate` need of a cache."""

    @property
    def length(self) -> int:
        """Tokens read so far; the next one is t = length."""
        ...

    @property
    def attended(self) -> int:
        """Tokens held: what the newest token attends to, itself included."""
        ...

    @property
    def evicted(self) -> int:
        """Tokens read that no later token can attend to."""
        ...

    @property
    def rewindable(self) -> int:
        """How many of the newest tokens can be taken back."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        ...

    def row(self, token: int) -> int:
        """Return the row a token's key and value are stored in."""
        ...

    def attended_rows(self, before: int = 0) -> list[int]:
        """Return the rows of what the newest token attends to, in the order of the text.

        Args:
            before: of the token that many before it instead.
        """
        ...

    def attended_next(self) -> np.ndarray:
        """Return which rows the next token will attend to, its own not among them: (rows,) bool."""
        ...

    def version(self) -> object | None:
        """Return what the stream is now, if a step of one token can be planned without a change.

        Two calls give the same object as long as nothing has changed; None if it cannot.
        """
        ...

    def max_step(self, waiting: int) -> int:
        """Return how many of `waiting` tokens the next step can read."""
        ...

    def begin(self, count: int) -> Step:
        """Plan the step that reads the next `count` tokens; changes nothing attended."""
        ...

    def commit(self, step: Any) -> None:
        """Make what a step of this cache computed the stream's state."""
        ...

    def arrays(self) -> list[mx.array]:
        """Return the arrays that hold the state, for evaluation."""
        ...

    def rewind(self, count: int) -> None:
        """Take back the newest `count` tokens."""
        ...

    def evict(self, count: int) -> None:
        """Drop the oldest `count` attended tokens that are not sinks."""
        ...

    def erase(self) -> None:
        """Make every row zero that the newest token does not attend to, as `state` does."""
        ...

    def state(self) -> dict[str, mx.array | int]:
        """Return the whole state; the arrays are the live ones, not copies.

        Rows that the newest token does not attend to are zero.
        """
        ...

    def restore(self, state: dict[str, mx.array | int]) -> None:
        """Continue from a state of a cache made with the same parameters."""
        ...
