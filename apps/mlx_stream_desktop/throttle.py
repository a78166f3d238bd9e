"""Limits redraws to 20 a second, ending with the latest state; independent of widgets.

A slow redraw (a long conversation on a slow machine) is followed by a longer pause, so that three
quarters of the time remains for typing and scrolling.
"""

from asyncio import AbstractEventLoop
from collections.abc import Callable

SECONDS_BETWEEN = 0.05
SHARE = 4


class Throttle:
    """Redraws soon after each call, with a pause between redraws."""

    def __init__(self, draw: Callable[[], None], loop: AbstractEventLoop):
        self._draw, self._loop = draw, loop
        self._next, self._waits = 0.0, False

    def __call__(self) -> None:
        if not self._waits:
            self._waits = True
            self._loop.call_later(max(0.0, self._next - self._loop.time()), self._now)

    def _now(self) -> None:
        self._waits, began = False, self._loop.time()
        self._draw()
        self._next = began + max(SECONDS_BETWEEN, SHARE * (self._loop.time() - began))
