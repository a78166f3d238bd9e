"""Llama (arXiv 2302.13971, 2407.21783) and SmolLM3, as transformers computes them.

The configuration says which layers of a SmolLM3 have no rotary positions.
"""

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import CausalLM, LayerSpec, Weights


def llama(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Llama: grouped heads, a tied or untied head, biases if the config asks for them."""
    bias = config.attention_bias
    return CausalLM(config, weights, LayerSpec(bias, bias, config.mlp_bias))
