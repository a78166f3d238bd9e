"""Run Llama, Mistral and Qwen models on a stream without end, in memory that never grows.

The public names, each fetched when it is first asked for: importing the package loads no MLX.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_stream import backend as _backend  # noqa: F401  (OpenBLAS, before MLX is imported)
from mlx_stream import errors

if TYPE_CHECKING:
    from mlx_stream.chat.session import ChatSession
    from mlx_stream.engine import Engine, Session
    from mlx_stream.generate.completion import stream
    from mlx_stream.generate.stats import Stats
    from mlx_stream.load import Model, load
    from mlx_stream.sampling import Sampling
    from mlx_stream.text.pieces import Piece

__all__ = [
    "ChatSession",
    "Engine",
    "Model",
    "Piece",
    "Sampling",
    "Session",
    "Stats",
    "errors",
    "load",
    "stream",
]

_HOMES = {
    "ChatSession": "mlx_stream.chat.session",
    "Engine": "mlx_stream.engine",
    "Model": "mlx_stream.load",
    "Piece": "mlx_stream.text.pieces",
    "Sampling": "mlx_stream.sampling",
    "Session": "mlx_stream.engine",
    "Stats": "mlx_stream.generate.stats",
    "load": "mlx_stream.load",
    "stream": "mlx_stream.generate.completion",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]


class _Package(ModuleType):
    """The package: `load` and `stream` are functions, also once the modules of that name are in.

    Importing a module sets its name in the package, which would hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
