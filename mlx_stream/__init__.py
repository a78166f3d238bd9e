"""Run Llama, Mistral and Qwen models on an endless stream, in memory that never grows.

The public names are imported when they are first used: importing the package does not load MLX.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (a checkout; pip refuses to install it)
    raise SystemExit(
        "mlx_stream needs Python 3.11 or newer, but this is "
        f"{sys.version_info[0]}.{sys.version_info[1]}: install a newer one, for example with "
        "`uv python install 3.13`"
    )

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_stream import backend as _backend  # noqa: F401  (a fast BLAS, before MLX is imported)
from mlx_stream import errors

if TYPE_CHECKING:
    from mlx_stream.chat.exchange import Exchange
    from mlx_stream.chat.messages import Message
    from mlx_stream.chat.session import ChatSession
    from mlx_stream.engine import Engine, Listener, Session
    from mlx_stream.generate.completion import stream
    from mlx_stream.generate.model import Model
    from mlx_stream.generate.stats import Stats
    from mlx_stream.load import load
    from mlx_stream.sampling import Sampling
    from mlx_stream.text.pieces import Piece
    from mlx_stream.text.tool_calls import ToolCall

__all__ = [
    "ChatSession",
    "Engine",
    "Exchange",
    "Listener",
    "Message",
    "Model",
    "Piece",
    "Sampling",
    "Session",
    "Stats",
    "ToolCall",
    "errors",
    "load",
    "stream",
]

_HOMES = {
    "ChatSession": "mlx_stream.chat.session",
    "Engine": "mlx_stream.engine",
    "Exchange": "mlx_stream.chat.exchange",
    "Listener": "mlx_stream.engine",
    "Message": "mlx_stream.chat.messages",
    "Model": "mlx_stream.generate.model",
    "Piece": "mlx_stream.text.pieces",
    "Sampling": "mlx_stream.sampling",
    "Session": "mlx_stream.engine",
    "Stats": "mlx_stream.generate.stats",
    "ToolCall": "mlx_stream.text.tool_calls",
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
    """The package, in which `load` and `stream` remain functions.

    Importing a module of the same name would otherwise replace the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
