"""Streams responses as server-sent events; independent of any API's objects.

When a client disconnects, its request is cancelled immediately, even if the handler is waiting.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.types import Receive, Send

from mlx_stream.server.api_errors import ApiError

# A comment at least this often keeps proxies and impatient clients from disconnecting.
SECONDS_OF_SILENCE = 1.0
EVENTS_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
Item = TypeVar("Item")
Result = TypeVar("Result")


class Client:
    """The client of a request.

    Attributes:
        left: whether the client closed the connection.
    """

    def __init__(self, receive: Receive):
        self._receive, self.left = receive, False

    @asynccontextmanager
    async def present(self) -> AsyncIterator[None]:
        """Run a block, and cancel it if the client disconnects."""
        task = asyncio.current_task()
        assert task

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.left = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if not self.left or task.uncancel() > 0:
                raise
        finally:
            watcher.cancel()


async def with_silences(
    items: AsyncGenerator[Item, None], stopping: asyncio.Event, seconds: float = SECONDS_OF_SILENCE
) -> AsyncGenerator[Item | None, None]:
    """Yield a generator's items, and None after every `seconds` without one; then close it.

    Raises:
        ApiError: 503, the server is shutting down.
    """
    stop = asyncio.create_task(stopping.wait())
    following: asyncio.Task[Item] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.ensure_future(anext(items))  # type: ignore[arg-type]
            waiting = {following, stop}
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                try:
                    item = following.result()
                except StopAsyncIteration:
                    return
                following = None
                yield item
            elif stop.done():
                raise ApiError(503, "the server is shutting down", "shutting_down")
            else:
                yield None
    finally:
        stop.cancel()
        if following:
            following.cancel()
            await asyncio.wait({following})
        await items.aclose()


async def off_loop(large: bool, call: Callable[..., Result], *values: Any) -> Result:
    """Call a function; use another thread if the work is large, so that other requests proceed."""
    return await asyncio.to_thread(call, *values) if large else call(*values)


class EventStream:
    """Sends events to a client as they occur.

    Args:
        headers: response headers besides those of every event stream.
    """

    def __init__(self, send: Send):
        self._send, self.begun = send, False

    async def begin(self, headers: Mapping[str, str]) -> None:
        raw = [(k.lower().encode(), v.encode()) for k, v in {**EVENTS_HEADERS, **headers}.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        self.begun = True

    async def data(self, *values: Mapping[str, Any] | str) -> None:
        """Send unnamed events: objects as JSON, strings unchanged."""
        for value in values:
            text = value if isinstance(value, str) else as_json(value)
            await self._write(f"data: {text}\n\n")

    async def comment(self, text: str) -> None:
        await self._write(f": {text}\n\n")

    async def _write(self, text: str) -> None:
        body = text.encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body"})


def as_json(value: Any) -> str:
    """Return a value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
