"""Reads the items of a reply in progress, with or without asyncio; independent of conversations."""

import asyncio
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from mlx_stream.engine.session_worker import ReadProgress, ReplyEnd, ReplyStart
from mlx_stream.engine.task import Task
from mlx_stream.engine.worker import Worker
from mlx_stream.text.pieces import Piece

Item = Piece | ReplyStart | ReplyEnd


class ReplyReader:
    """A reply in progress, for one reader at a time.

    The items are a `ReplyStart`, pieces, and a `ReplyEnd` after the last piece. If the reply is
    cancelled, they end early. A reader that is garbage-collected cancels the reply.

    Args:
        session: kept alive by its replies.
    """

    def __init__(self, worker: Worker, task: Task, session: object):
        self._worker, self._task, self._session = worker, task, session
        self._cancel_forgotten = weakref.finalize(self, task.cancel)
        self._cancel_forgotten.atexit = False

    def take(self) -> Item | None:
        """Wait for the next item and return it; None after the last one.

        Raises:
            MlxStreamError: the reply failed.
        """
        while isinstance(item := self._worker.take(self._task), ReadProgress):
            item.report(item.done, item.total)
        return self._taken(item)

    async def take_async(self) -> Item | None:
        """Like `take`, but without blocking the event loop."""
        self._worker.check_elsewhere()
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(arrived.set)

        self._task.tell = tell
        try:
            while True:
                arrived.clear()
                done = self._task.done  # read first, or an item that arrives now would be missed
                item = self._worker.take_now(self._task)
                if isinstance(item, ReadProgress):
                    item.report(item.done, item.total)
                elif item is not None or done:
                    return self._taken(item)
                else:
                    await arrived.wait()
        finally:
            self._task.tell = None

    def cancel(self) -> None:
        """End the reply within one step; any thread may call this, and it returns immediately."""
        self._task.cancel()

    def when_done(self, call: Callable[[Future[Any]], None]) -> None:
        """Arrange for `call` to run once the reply has ended, for any reason, and been settled.

        It runs on the engine's thread, or immediately if the reply has already ended.
        """
        self._task.future.add_done_callback(call)

    def _taken(self, item: Item | None) -> Item | None:
        if isinstance(item, ReplyEnd):  # settling the turn does not need a reader
            self._cancel_forgotten.detach()
        return item
