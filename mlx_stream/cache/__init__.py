"""The keys and values of one stream, all layers; knows positions and eviction, no model.

Shape letters, used throughout the package: B batch (always 1), T new tokens, N attended rows,
H query heads, K key/value heads, D head dimension, S sinks, W window, X spare rows, R = W + X ring
rows, L layers. Tokens of a stream are numbered t = 0, 1, 2, ...
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
    """One pass of new tokens through all layers: what is the same for every layer, once.

    Attributes:
        count: how many tokens are read.
        rows: T, the number of token rows the model must compute: the real ones, and others that
            pad the step to one of a few lengths and are never stored nor attended by real rows.
    """

    count: int
    rows: int

    def attend(self, layer: int, heads: mx.array) -> mx.array:
        """Compute a layer's attention, and its rows with the new keys and values in them.

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

    @property
    def version(self) -> object:
        """What the stream is now: the same object as long as nothing has changed."""
        ...

    @property
    def max_verify(self) -> int:
        """How many tokens a step can read of which all but the first may be taken back; 1: none."""
        ...

    def max_step(self, waiting: int) -> int:
        """Return how many of `waiting` tokens the next step can read."""
        ...

    def is_ready(self, count: int) -> bool:
        """Return whether a step of `count` tokens can be planned without `prepare`."""
        ...

    def prepare(self, count: int) -> None:
        """Make a step of `count` tokens possible; what is attended stays as it was."""
        ...

    def plan(self, count: int, verify: bool = False) -> Any:
        """Plan the step that reads the next `count` tokens; changes nothing.

        Args:
            verify: all but the first of them may be taken back without a loss.
        """
        ...

    def commit(self, step: Any) -> None:
        """Make what a step of this cache computed the stream's state.

        Neither the step nor anything else may hold the rows of before when they are evaluated: they
        would be copied.
        """
        ...

    def arrays(self) -> list[mx.array]:
        """Return the arrays that hold the state, for evaluation."""
        ...

    def rewind(self, count: int) -> None:
        """Take back the newest `count` tokens."""
        ...

    def release(self) -> None:
        """Let go of the buffers, of which a step that failed may have made anything."""
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
