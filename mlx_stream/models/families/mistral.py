"""Mistral (arXiv 2310.06825) and Ministral 3, as transformers' `MistralForCausalLM` computes them.

The `sliding_window` of the one and the position limit of the other bound the window of a stream;
that is held where streams are made.
"""

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import CausalLM, LayerSpec, Weights


def mistral(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Mistral: Llama's blocks, never a bias."""
    return CausalLM(config, weights, LayerSpec())
