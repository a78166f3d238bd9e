"""Rotation and attention in numpy, in float64: the reference that a device is checked against.

Shapes: H query heads, K key heads, T queries, N keys, D head dimension.
"""

import numpy as np


def rotate(x: np.ndarray, places: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotate rows x (heads, T, D) to positions (T,), pairing d with d + n for n frequencies."""
    angles = np.asarray(places, np.float64)[:, None] * frequencies
    pairs = len(frequencies)
    first, second, rest = np.split(x.astype(np.float64), [pairs, 2 * pairs], axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attend(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    seen: np.ndarray | None = None,
    added: np.ndarray | None = None,
) -> np.ndarray:
    """Return softmax(q k) v: (H, T, D).

    Args:
        seen: (T, N) bool, what each query attends to.
        added: (H, T, N), added to the scores.
    """
    group = len(queries) // len(keys)
    keys, values = (np.repeat(x.astype(np.float64), group, axis=0) for x in (keys, values))
    scores = scale * queries.astype(np.float64) @ keys.swapaxes(-1, -2)
    if added is not None:
        scores = scores + added
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)) @ values


class SlowStream:
    """One layer of a stream, as a list of unrotated keys: sinks and a forward-only window.

    With 2 sinks and a window of 3, token 6 attends to 0, 1, 4, 5, 6 at positions 0, 1, 2, 3, 4.
    """

    def __init__(self, sinks: int, window: int, scale: float, frequencies: np.ndarray):
        self.sinks, self.window, self.scale = sinks, window, scale
        self.frequencies = frequencies
        self.rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, token: int, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Return a token's attention to everything it sees, including itself: (H, 1, D).

        Args:
            query, key, value: (H, 1, D), (K, 1, D) and (K, 1, D), unrotated.
        """
        self.rows[token] = key, value
        oldest = max(self.sinks, token - self.window + 1)
        attended = [*range(min(self.sinks, token + 1)), *range(oldest, token + 1)]
        places = np.arange(len(attended))
        keys, values = (
            np.concatenate([self.rows[t][i] for t in attended], axis=1) for i in range(2)
        )
        turned = rotate(keys, places, self.frequencies)
        query = rotate(query, places[-1:], self.frequencies)
        return attend(query, turned, values, self.scale)
