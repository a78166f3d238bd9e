"""Phi-3, 3.5, 4 and 4-mini (arXiv 2404.14219), as transformers' `Phi3ForCausalLM` computes them."""

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import CausalLM, LayerSpec, Weights


def phi3(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Phi-3 model: Llama's blocks without biases and with fused projections."""
    return CausalLM(config, weights, LayerSpec(fused=True))
