"""mlx-lm's model with the same tensors, to compare with."""

from importlib import import_module
from typing import Any

from tests.fakes.tiny_models import Tensors


def peer_of(raw: dict, tensors: Tensors) -> Any:
    # mlx-lm reads a Mistral as a Llama.
    family = "llama" if raw["model_type"] == "mistral" else raw["model_type"]
    module = import_module(f"mlx_lm.models.{family}")
    peer = module.Model(module.ModelArgs.from_dict(raw))
    peer.load_weights(list(tensors.items()))
    return peer
