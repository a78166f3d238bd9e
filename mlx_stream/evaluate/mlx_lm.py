"""mlx-lm as a peer: the same weights, its own caches; independent of the experiments.

The cache is bounded explicitly, because mlx-lm's own `max_kv_size` has no effect on these models.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_stream.errors import SourceError
from mlx_stream.generate.model import Model


def why_no_peer(folder: Path) -> str | None:
    """Return why mlx-lm cannot be measured here, or None if it can."""
    if importlib.util.find_spec("mlx_lm") is None:
        return "it is not installed: pip install mlx-lm"
    return None if folder.is_dir() else "it reads folders: convert the model to one"


def load_peer(folder: Path, model: Model) -> Any:
    """Load the same weights with mlx-lm, with the same dtype and quantization.

    Raises SourceError if mlx-lm is not installed or the model is not a folder.
    """
    if reason := why_no_peer(folder):
        raise SourceError(f"mlx-lm: {reason}")
    from mlx_lm.utils import dequantize_model, load_model

    peer, _ = load_model(folder)
    if not model.quantized:
        # Convert the scales to float32 first: dequantizing in 16 bits would round.
        peer.update(tree_map(to_float(mx.float32), peer.parameters()))
        peer = dequantize_model(peer)
    peer.update(tree_map(to_float(model.dtype), peer.parameters()))
    mx.eval(peer.parameters())
    return peer


def to_float(dtype: mx.Dtype) -> Callable[[mx.array], mx.array]:
    def convert(array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    return convert


def rotating_caches(peer: Any, size: int, keep: int) -> list[Any]:
    """Return, for each layer, a cache of `size` tokens that always keeps the first `keep`."""
    from mlx_lm.models.cache import RotatingKVCache

    return [RotatingKVCache(max_size=size, keep=keep) for _ in peer.layers]


def head_of(peer: Any) -> Callable[[mx.array], mx.array]:
    """Return the map from hidden states to logits."""
    return peer.model.embed_tokens.as_linear if peer.args.tie_word_embeddings else peer.lm_head
