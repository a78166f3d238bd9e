"""Replies on the thread, or in the event loop, of whoever asked for them; knows no model."""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from numbers import Integral

from mlx_stream.engine.task import Task
from mlx_stream.errors import TextError, ValueRefused
from mlx_stream.text.pieces import Piece
from mlx_stream.text.tokenizer import check_text

Deliver = Callable[[Piece | None], None]


def iterate(ask: Callable[[], Task], deliver: Deliver) -> Generator[Piece, None, None]:
    """Ask, and yield the pieces; closing the generator cancels the task.

    Args:
        deliver: called before each piece with it, and at the end with None.
    """
    task = ask()
    try:
        while (piece := task.take()) is not None:
            deliver(piece)
            yield piece
        deliver(None)
    finally:
        task.cancel()


async def iterate_async(ask: Callable[[], Task], deliver: Deliver) -> AsyncGenerator[Piece, None]:
    """As `iterate`, without holding up the event loop."""
    import asyncio

    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            loop.call_soon_threadsafe(arrived.set)

    task = ask()
    try:
        task.on_arrival(tell)
        while True:
            arrived.clear()
            done = task.done  # before looking, or what comes between would be missed
            piece = task.take_now()
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
