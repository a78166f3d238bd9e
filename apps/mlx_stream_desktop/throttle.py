"""How often to draw: at most so many times a second, the newest state last; knows no widgets.

A drawing that takes long, in a long conversation on a slow machine, is followed by a longer pause:
three quarters of the time stay free for typing and scrolling.
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
    """Draw soon after each call, with a pause between two drawings."""

    def __init__(self, draw: Callable[[], None], clock: Clock):
        self._draw, self._clock = draw, clock
        self._next, self._waits = 0.0, False

    def __call__(self) -> None:
        if not self._waits:
            self._waits = True
            self._clock.call_later(max(0.0, self._next - self._clock.time()), self._now)

    def _now(self) -> None:
        self._waits, began = False, self._clock.time()
        self._draw()
        self._next = began + max(SECONDS_BETWEEN, SHARE * (self._clock.time() - began))
