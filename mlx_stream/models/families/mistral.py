"""Mistral (arXiv 2310.06825), as transformers' `MistralForCausalLM` computes it.

Its `sliding_window` is a bound on the window of a stream, held where streams are made.
"""

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import Block, CausalLM, Weights


def mistral(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Mistral: Llama's blocks, never a bias."""
    return CausalLM(config, weights, Block())
