"""What a job gives, on the thread or in the event loop of whoever asked; knows no model."""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress

from mlx_stream.engine.task import Task
from mlx_stream.text.pieces import Piece

OnPiece = Callable[[Piece | None], None]


def iterate(ask: Callable[[], Task], told: OnPiece) -> Generator[Piece, None, None]:
    """Ask, and yield the pieces; closing the generator cancels the job.

    Args:
        told: called before each piece with it, and at the end with None.
    """
    job = ask()
    try:
        while (piece := job.take()) is not None:
            told(piece)
            yield piece
        told(None)
    finally:
        job.cancel()


async def iterate_async(ask: Callable[[], Task], told: OnPiece) -> AsyncGenerator[Piece, None]:
    """As `consumed`, without holding up the event loop."""
    import asyncio

    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            loop.call_soon_threadsafe(arrived.set)

    job = ask()
    try:
        job.on_arrival(tell)
        while True:
            arrived.clear()
            done = job.done  # before looking, or what comes between would be missed
            piece = job.take_now()
            if piece is not None:
                told(piece)
                yield piece
            elif done:
                break
            else:
                await arrived.wait()
        told(None)
    finally:
        job.cancel()
