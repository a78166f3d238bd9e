"""Runs models inside other programs: one thread computes, and any thread may use it.

engine      the thread, the model, the memory budget        Engine
handle      a conversation                                  Session
listener    a stream that is fed text and answers questions Listener
"""

from mlx_stream.engine.engine import Engine
from mlx_stream.engine.handle import Session
from mlx_stream.engine.listener import Listener

__all__ = ["Engine", "Listener", "Session"]
