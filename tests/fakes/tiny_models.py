"""Tiny models built from tensors in memory, without a tokenizer, and the logits they compute."""

import mlx.core as mx
import numpy as np

from mlx_stream.cache import Cache
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import build_model
from tests.fakes.tiny import tiny_weights

Tensors = dict[str, mx.array]


def make(
    raw: dict,
    tensors: Tensors,
    dtype: mx.Dtype = mx.float32,
    keep_quantized: bool = False,
) -> Model:
    """Build a model from tensors, without a tokenizer; the tensors are used up."""
    model = build_model("tiny", raw, tensors, dtype, keep_quantized)
    assert not tensors, "the caller's handles are dropped"
    return model


def tensors_of(raw: dict, seed: int = 0) -> Tensors:
    return {name: mx.array(w) for name, w in tiny_weights(raw, seed).items()}


def some_ids(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, count).tolist()


def all_logits(model: Model, cache: Cache, ids: list[int], chunk: int) -> np.ndarray:
    """Return the logits (n, V) after each token."""
    stream = TokenStream(model, cache)
    hidden = mx.concatenate(list(stream.steps(ids, chunk)), axis=1)
    return np.array(model.network.logits(hidden)[0].astype(mx.float32))
