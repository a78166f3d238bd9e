"""When to draw: at most so many times a second, and always what is newest; knows no widgets.

A drawing that takes long, in a long conversation on a slow machine, is followed by a longer pause:
three quarters of the time belong to whoever types and scrolls.
"""

from collections.abc import Callable
from typing import Protocol

SECONDS_BETWEEN = 0.05
SHARE = 4


class Clock(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> object: ...


class Throttle:
    """Draw soon after each call, however often it is called, with a pause between two drawings."""

    def __init__(self, draw: Callable[[], None], clock: Clock, seconds: float = SECONDS_BETWEEN):
        self._draw, self._clock, self._seconds = draw, clock, seconds
        self._next, self._waits = 0.0, False

    def __call__(self) -> None:
        if not self._waits:
            self._waits = True
            self._clock.call_later(max(0.0, self._next - self._clock.time()), self._now)

    def _now(self) -> None:
        self._waits, began = False, self._clock.time()
        self._draw()
        self._next = began + max(self._seconds, SHARE * (self._clock.time() - began))
