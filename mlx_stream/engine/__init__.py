"""Models inside other programs: one thread computes, any thread asks, and none waits for it.

engine      the thread, the model, the memory budget        Engine
handle      a conversation                                  Session
listener    a stream that is fed, and asked now and then    Listener
"""

from mlx_stream.engine.engine import Engine
from mlx_stream.engine.handle import Session
from mlx_stream.engine.listener import Listener

__all__ = ["Engine", "Listener", "Session"]
