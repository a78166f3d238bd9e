"""Llama (arXiv 2302.13971, 2407.21783), as transformers' `LlamaForCausalLM` computes it."""

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import CausalLM, LayerSpec, Weights


def llama(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Llama: grouped heads, a tied or untied head, biases as the config says."""
    bias = config.attention_bias
    return CausalLM(config, weights, LayerSpec(bias, bias, config.mlp_bias))
