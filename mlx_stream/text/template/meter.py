"""What one use of a template may take: time, memory, the size of a value; knows no Jinja."""

import time
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from contextvars import ContextVar
from types import GeneratorType
from typing import Any, TypeVar

T = TypeVar("T")
# Of processor time: a machine that sleeps or swaps does not stop an honest template.
SECONDS = 0.5
# The largest value is MAX_ADDED and four times the messages; each value counts as ITEM and its
# characters. All new values together, kept or not, may have TURNOVER times that size.
MAX_ADDED, TURNOVER, ITEM = 1_000_000, 32, 16
CONTAINERS = (dict, list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class Meter:
    """What is left of one use of a template. `over`: the use has ended, be it by an interrupt."""

    def __init__(self, limit: int):
        self.limit, self.left, self.over = limit, TURNOVER * limit, False
        self.began = time.thread_time()

    def check(self, size: int = 0) -> None:
        """Raise if the time is over, or a value of this size, not made yet, would be too large."""
        if time.thread_time() - self.began > SECONDS:
            raise RuntimeError(f"it ran for more than {SECONDS:g} s")
        if size > self.limit:
            raise RuntimeError(f"it makes a value larger than {self.limit} characters")

    def made(self, value: Any) -> Any:
        """Charge for a new value and return it."""
        self.left -= self.weigh(value)
        if self.left < 0:
            raise RuntimeError("the values it makes take too much memory")
        if isinstance(value, GeneratorType):
            return (self.made(item) for item in value)
        return value

    def weigh(self, value: Any) -> int:
        """Check and return a value's size; what is in a list twice counts twice.

        A list of a list twice, of that one twice, and so on, is small until written or compared.
        """
        size, waiting = 0, [value]
        while waiting and size + ITEM * len(waiting) <= self.limit:
            item = waiting.pop()
            size += ITEM
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, int):  # as large as the time that arithmetic takes
                size += item.bit_length() ** 2 // 100
            elif isinstance(item, CONTAINERS):
                waiting += item.items() if isinstance(item, dict) else item
        self.check(size + ITEM * len(waiting))
        return size


METER: ContextVar[Meter] = ContextVar("mlx_stream.text.template.meter")


def metered(work: Callable[[], T], characters: int = 0) -> T:
    """Return what `work` returns, metered; inside another use, at that one's expense."""
    limit, meter = MAX_ADDED + 4 * characters, METER.get(None)
    if meter and not meter.over:
        meter.limit = max(meter.limit, limit)
        return work()
    meter = Meter(limit)
    # Not METER.reset: an interrupt just before it would leave this meter in use forever.
    try:
        METER.set(meter)
        return work()
    finally:
        meter.over = True
