"""When to draw: at most so many times a second, and always what is newest; knows no widgets."""

from collections.abc import Callable
from typing import Protocol

SECONDS_BETWEEN = 0.05


class Clock(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> object: ...


class Pacer:
    """Draw soon after each call, however often it is called, with a pause between two drawings."""

    def __init__(self, draw: Callable[[], None], clock: Clock, seconds: float = SECONDS_BETWEEN):
        self._draw, self._clock, self._seconds = draw, clock, seconds
        self._last, self._waits = -seconds, False

    def __call__(self) -> None:
        if not self._waits:
            self._waits = True
            pause = self._last + self._seconds - self._clock.time()
            self._clock.call_later(max(0.0, pause), self._now)

    def _now(self) -> None:
        self._waits, self._last = False, self._clock.time()
        self._draw()
