"""Models inside other programs: one thread computes, any thread asks, nothing waits for it.

engine      the thread, the model, the memory budget       Engine
chat        a conversation                                 Session

"""

from mlx_stream.engine.chat import Session
from mlx_stream.engine.engine import Engine

__all__ = ["Engine", "Session"]
