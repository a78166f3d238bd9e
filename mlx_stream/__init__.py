"""Run Llama and Mistral models on a stream without end, in memory that never grows."""

from mlx_stream import backend as _backend  # noqa: F401  (OpenBLAS, before MLX is imported)
from mlx_stream import errors
from mlx_stream.engine import Engine
from mlx_stream.load import Model, load
from mlx_stream.sampling import Sampling
from mlx_stream.session import ChatSession
from mlx_stream.stream import Piece, Stats, stream

__all__ = [
    "ChatSession",
    "Engine",
    "Model",
    "Piece",
    "Sampling",
    "Stats",
    "errors",
    "load",
    "stream",
]
