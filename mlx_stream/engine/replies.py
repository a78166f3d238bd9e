"""Replies on the caller's thread or in its event loop; knows no model."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from numbers import Integral

from mlx_stream.engine.task import Task
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.text.pieces import Piece
from mlx_stream.text.tokenizer import check_text

Submit = Callable[[], Task]
Deliver = Callable[[Piece | None], None]


def iterate(worker: Worker, submit: Submit, deliver: Deliver) -> Generator[Piece, None, None]:
    """Submit a task and yield its pieces; closing the generator cancels the task.

    Args:
        deliver: called with each piece before it is yielded, and with None at the end.
    """
    task = submit()
    try:
        while (piece := worker.take(task)) is not None:
            deliver(piece)
            yield piece
        deliver(None)
    finally:
        task.cancel()


async def iterate_async(
    worker: Worker, submit: Submit, deliver: Deliver
) -> AsyncGenerator[Piece, None]:
    """Do what `iterate` does, without blocking the event loop."""
    worker.check_elsewhere()
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(arrived.set)

    task = submit()
    task.tell = tell
    try:
        while True:
            arrived.clear()
            done = task.done  # read first, or a piece that comes now would be missed
            piece = worker.take_now(task)
            if piece is not None:
                deliver(piece)
                yield piece
            elif done:
                break
            else:
                await arrived.wait()
        deliver(None)
    finally:
        task.cancel()


def check_question(question: str) -> None:
    check_text(question)
    if not question:
        raise TextError("the question is empty")


def check_limit(max_tokens: int | None) -> None:
    if max_tokens is not None and not (isinstance(max_tokens, Integral) and max_tokens >= 1):
        raise ValueRefused(f"max_tokens must be a whole number, at least 1, not {max_tokens!r}")
