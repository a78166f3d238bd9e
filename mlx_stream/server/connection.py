"""Time limits on connections, which uvicorn lacks; independent of the contents of requests."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_FOR_HEADERS = 10.0
SECONDS_UNREAD = 60.0
MOST_CONNECTIONS = 4_096
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class TimedConnection(H11Protocol):
    """A connection that is closed if its peer is slow to send headers, or does not read.

    Attributes:
        seconds_for_headers: time limit from the first byte of a request, or from connecting.
        seconds_unread: how long bytes may wait for the client to read them.
        most: the maximum number of connections; a new one beyond it replaces the oldest idle one.
        since: when the connection was made, by the loop's clock.
    """

    seconds_for_headers = SECONDS_FOR_HEADERS
    seconds_unread = SECONDS_UNREAD
    most = MOST_CONNECTIONS

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.since = self.loop.time()
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Makes `pause_writing` run as soon as there are bytes that the client has not read.
        transport.set_write_buffer_limits(high=0)
        self._wait_for_headers()
        if len(self.connections) > self.most:
            self._replace_one()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._headers_due, self._reading_due)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.waits_for_headers:
            self._headers_due = self._stop(self._headers_due)
        elif self._headers_due is None and not self.transport.is_closing():
            self._wait_for_headers()

    @property
    def waits_for_headers(self) -> bool:
        """Whether no request has begun, or the last one has been answered."""
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading_due is None:
            self._reading_due = self.loop.call_later(self.seconds_unread, self.transport.abort)

    def resume_writing(self) -> None:
        self._reading_due = self._stop(self._reading_due)
        super().resume_writing()

    def _wait_for_headers(self) -> None:
        self._headers_due = self.loop.call_later(self.seconds_for_headers, self._too_slow)

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(TIMED_OUT)
            self.transport.close()

    def _replace_one(self) -> None:
        """Close the oldest connection on which no request is being answered."""
        idle = [
            one
            for one in self.connections
            if isinstance(one, TimedConnection) and one.waits_for_headers
            if not (one is self or one.transport.is_closing())
        ]
        min(idle, key=lambda one: one.since, default=self).transport.abort()

    @staticmethod
    def _stop(*timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer:
                timer.cancel()
