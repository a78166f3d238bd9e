"""Qwen2 and 2.5 (arXiv 2412.15115) and Qwen3 (arXiv 2505.09388), as transformers computes them."""

from mlx_stream.config import ModelConfig
from mlx_stream.models.layers import CausalLM, LayerSpec, Weights


def qwen2(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Qwen2 or 2.5: Llama's blocks with a bias on queries, keys and values."""
    return CausalLM(config, weights, LayerSpec(qkv_bias=True))


def qwen3(config: ModelConfig, weights: Weights) -> CausalLM:
    """Build a Qwen3: each query and key head is normalized before it is rotated."""
    bias = config.attention_bias
    return CausalLM(config, weights, LayerSpec(bias, bias, head_norms=True))
