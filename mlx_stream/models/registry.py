"""The registry of models: the function that builds each `model_type`."""

from collections.abc import Callable

from mlx_stream.config import ModelConfig
from mlx_stream.models.families.llama import llama
from mlx_stream.models.families.mistral import mistral
from mlx_stream.models.families.phi3 import phi3
from mlx_stream.models.families.qwen import qwen2, qwen3
from mlx_stream.models.layers import CausalLM, Weights

MODELS: dict[str, Callable[[ModelConfig, Weights], CausalLM]] = {
    "llama": llama,
    "mistral": mistral,
    "ministral3": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "smollm3": llama,
}
