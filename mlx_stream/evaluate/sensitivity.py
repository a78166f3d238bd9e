"""Measures what quantizing one part does to predictions; independent of files and recipes.

A part is a matrix that the model multiplies by in one operation: the queries, keys and values of a
layer form one part. Only the part's layer and those after it are recomputed.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_stream.config import Quantization
from mlx_stream.errors import TextError
from mlx_stream.evaluate.divergence import divergences, log_probabilities
from mlx_stream.generate.model import Model
from mlx_stream.models.layers import DecoderLayer
from mlx_stream.models.weights import Linear

# The number of tokens read at once; each attends to all tokens before it.
TOKENS = 512
LEAST = 128


def measure_sensitivity(
    model: Model,
    ids: Sequence[int],
    quantization: Quantization,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, ...], float]:
    """Return, for each part, the mean KL divergence in nats when only that part is quantized.

    The model must not hold quantized weights; it is unchanged afterwards. A part is named by its
    modules' paths; a part whose rows do not divide into groups is left out. Raises TextError for
    fewer than 128 tokens.
    """
    if len(ids) < LEAST:
        raise TextError(f"the calibration text has {len(ids)} tokens: at least {LEAST} are needed")
    passes = Passes(model, ids[:TOKENS])
    layers = model.network.layers
    found: dict[tuple[str, ...], float] = {}
    for index, layer in enumerate(layers):
        for matrices, module in parts_of(layer).items():
            if module.weight.shape[-1] % quantization.group_size == 0:
                paths = tuple(f"model.layers.{index}.{matrix}" for matrix in matrices)
                original = module.weight
                try:
                    module.set_weight(round_weights(original, quantization))
                    found[paths] = passes.divergence_from(index)
                finally:
                    module.set_weight(original)
        progress(index + 1, len(layers))
    return found


def parts_of(layer: DecoderLayer) -> dict[tuple[str, ...], Linear]:
    """Return the modules of a layer, keyed by the checkpoint matrices that each holds."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): attention.qkv_proj,
        ("self_attn.o_proj",): attention.o_proj,
        ("mlp.gate_proj", "mlp.up_proj"): mlp.gate_up_proj,
        ("mlp.down_proj",): mlp.down_proj,
    }


def round_weights(weight: mx.array, quantization: Quantization) -> mx.array:
    """Return the weights that the quantized weights represent."""
    settings = {
        "group_size": quantization.group_size,
        "bits": quantization.bits,
        "mode": quantization.mode,
    }
    return mx.dequantize(*mx.quantize(weight, **settings), **settings).astype(weight.dtype)


class Passes:
    """A model's pass over one text: the inputs of each layer, and the predictions."""

    def __init__(self, model: Model, ids: Sequence[int]):
        self.network = model.network
        self.new_cache = model.new_dense_cache
        self.count = len(ids)
        x = self.network.embed_tokens(mx.array([*ids], mx.int32))
        step, self.inputs = self.new_cache().plan(self.count), []
        for index, layer in enumerate(self.network.layers):
            self.inputs.append(x)
            x = layer(x, step, index)
            mx.eval(x)
        self.predicted = self._predict(x)
        mx.eval(self.predicted)

    def divergence_from(self, index: int) -> float:
        """Recompute layer `index` and those after it; return how far the predictions moved."""
        x, step = self.inputs[index], self.new_cache().plan(self.count)
        for place, layer in enumerate(self.network.layers[index:], index):
            x = layer(x, step, place)
        return float(divergences(self.predicted, self._predict(x)).mean().item())  # type: ignore[arg-type]

    def _predict(self, x: mx.array) -> mx.array:
        return log_probabilities(self.network.logits(self.network.norm(x)))
