"""Settings and frequencies of rotary positions; independent of MLX and streams.

Formulas: RoPE (arXiv 2104.09864); linear, llama3, yarn (arXiv 2309.00071) and longrope (arXiv
2402.13753) as in transformers' `modeling_rope_utils`.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RopeConfig:
    """Complete rotary settings, with every default of transformers' `modeling_rope_utils`.

    `rope_type` is default, linear, llama3, yarn or longrope; fields a type does not use keep their
    defaults. `attention_factor` (yarn, longrope) multiplies queries and keys alike. Only the
    first `partial_rotary_factor` of each head is rotated.
    """

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8_192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    partial_rotary_factor: float = 1.0
    short_factor: tuple[float, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many elements of a head are rotated."""
        return int(head_dim * self.partial_rotary_factor)


def query_factors(config: RopeConfig, head_dim: int) -> np.ndarray | None:
    """Return the factors that a query's elements are multiplied by: (head_dim,) float32.

    yarn and longrope multiply the rotated elements of queries and keys by a factor. If only some
    elements are rotated, queries are multiplied by its square instead, and keys are stored without
    it. Return None if no factors are needed.
    """
    rotary_dim = config.rotary_dim(head_dim)
    if rotary_dim == head_dim or config.attention_factor == 1:
        return None
    factors = np.ones(head_dim, np.float32)
    factors[:rotary_dim] = config.attention_factor**2
    return factors


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the radians per position of each pair: (rotary_dim / 2,) float64."""
    dim = config.rotary_dim(head_dim)
    if dim == 0:
        return np.zeros(0)
    plain = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.rope_type == "linear":
        return plain / config.factor
    if config.rope_type == "llama3":
        return llama3(config, plain)
    if config.rope_type == "yarn":
        return yarn(config, plain, dim)
    if config.rope_type == "longrope":
        return plain / np.array(config.short_factor)
    return plain


def llama3(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Slow down pairs that turn fewer than `high_freq_factor` times in the original context."""
    turns = config.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * ((1 - keep) / config.factor + keep)


def yarn(config: RopeConfig, plain: np.ndarray, dim: int) -> np.ndarray:
    """Slow down pairs below `beta_slow` turns by `factor`; leave those above `beta_fast` alone."""

    def pair_turning(times: float) -> float:
        original = config.original_max_position_embeddings
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (slowed / config.factor + 1 - slowed)
