"""Mistral (arXiv 2310.06825), as transformers' `MistralForCausalLM` computes it.

Its `sliding_window` limits the window of a stream; `window.py` applies it.
"""

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import Biases, CausalLM, Weights


def mistral(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Mistral: Llama's blocks, without biases."""
    return CausalLM(config, weights, Biases())
