"""mlx-lm's model of the same tensors, to compare with."""

from mlx_lm.models import llama as mlx_lm_llama

from tests.fakes.tiny_models import Tensors


def peer_of(raw: dict, tensors: Tensors) -> mlx_lm_llama.Model:
    peer = mlx_lm_llama.Model(mlx_lm_llama.ModelArgs.from_dict(raw))
    peer.load_weights(list(tensors.items()))
    return peer
