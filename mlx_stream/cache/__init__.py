"""The keys and values of one stream in all layers; handles positions and eviction, not models.

Shape letters, used throughout the package: B batch (always 1), T new tokens, N attended rows,
H query heads, K key/value heads, D head dimension, S sinks, W window, X spare rows, R = W + X ring
rows, L layers. Tokens of a stream are numbered t = 0, 1, 2, ... The oldest token that t attends to,
apart from the sinks, is o.
"""

from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_stream.cache.attention import AttentionShape
from mlx_stream.cache.dense import DenseCache
from mlx_stream.cache.storage import stream_bytes
from mlx_stream.cache.stream import StreamCache

__all__ = ["AttentionShape", "Cache", "DenseCache", "Step", "StreamCache", "stream_bytes"]


class Step(Protocol):
    """One pass of new tokens through all layers; what the layers share is computed only once.

    Attributes:
        count: the number of tokens read.
        rows: T, the number of token rows the model computes: the tokens, and padding up to one of
            a few lengths. Padding is never stored, and no token attends to it.
    """

    count: int
    rows: int

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        """Compute a layer's attention, and its rows including the new keys and values.

        Takes (B, H + 2K, T, D): unrotated queries, keys and values stacked along the heads.
        Returns (B, H, T, D).
        """
        ...


class Cache(Protocol):
    """The interface that attention and `generate` need from a cache."""

    @property
    def length(self) -> int:
        """Tokens read so far; the next one is t = length."""
        ...

    @property
    def attended(self) -> int:
        """Tokens that the newest token attends to, itself included."""
        ...

    @property
    def evicted(self) -> int:
        """Tokens read that no later token can attend to."""
        ...

    @property
    def rewindable(self) -> int:
        """How many of the newest tokens can be rolled back."""
        ...

    def row(self, token: int) -> int:
        """Return the row that stores a token's key and value."""
        ...

    def attended_rows(self, before: int = 0) -> list[int]:
        """Return the rows that the newest token attends to, in text order.

        Args:
            before: use the token this many before the newest one instead.
        """
        ...

    def attended_next(self) -> np.ndarray:
        """Return which rows the next token will attend to, except its own: (rows,) bool."""
        ...

    @property
    def version(self) -> object:
        """An object that is replaced whenever the stream changes."""
        ...

    @property
    def max_verify(self) -> int:
        """How many tokens a step can read so that all but the first can be rolled back, or 1."""
        ...

    def max_step(self, waiting: int) -> int:
        """Return how many of `waiting` tokens the next step can read."""
        ...

    def is_ready(self, count: int) -> bool:
        """Return whether a step of `count` tokens can be planned without `prepare`."""
        ...

    def prepare(self, count: int) -> None:
        """Make a step of `count` tokens possible, without changing what is attended."""
        ...

    def plan(self, count: int, verify: bool = False, pad: bool = True) -> Any:
        """Plan the step that reads the next `count` tokens. Changes nothing.

        Args:
            verify: plan a step whose tokens, except the first, can be rolled back without loss.
            pad: whether the step may have more rows than tokens.
        """
        ...

    def commit(self, step: Any) -> None:
        """Adopt the result of one of this cache's steps as the stream's state.

        Nothing else may hold the old rows when the new ones are evaluated, or they are copied.
        """
        ...

    def arrays(self) -> list[mx.array]:
        """Return the arrays of the state, for evaluation."""
        ...

    def rewind(self, count: int) -> None:
        """Roll back the newest `count` tokens."""
        ...

    def release(self) -> None:
        """Release the buffers, whose contents are unknown after a failed step."""
        ...

    def erase(self) -> None:
        """Zero every row that the newest token does not attend to."""
        ...

    def state(self) -> dict[str, mx.array | int]:
        """Call `erase`, then return the whole state; the arrays are not copies."""
        ...

    def restore(self, state: dict[str, mx.array | int]) -> None:
        """Continue from the state of a cache with the same parameters."""
        ...
