"""Mistral (arXiv 2310.06825) and Ministral 3, as transformers' `MistralForCausalLM` computes them.

Their `sliding_window` and position limit bound a stream's window; `window.py` applies them.
"""

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import CausalLM, LayerSpec, Weights


def mistral(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Mistral: Llama's blocks, without biases, whatever its config says."""
    return CausalLM(config, weights, LayerSpec())
