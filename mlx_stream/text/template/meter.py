"""Limits the time of one use of a template and the size of its values; independent of Jinja."""

import time
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from contextvars import ContextVar, copy_context
from types import GeneratorType
from typing import Any, TypeVar

T = TypeVar("T")
# In CPU time, so that sleep or swapping does not stop a harmless template, which needs 0.01 s. A
# garbage collection of a large process counts as well; it has taken half a second.
SECONDS = 1.0
# For all values of one render together: their characters, plus ITEM for each value and each loop
# iteration. Harmless templates need a tenth of it.
BUDGET, BUDGET_PER_CHARACTER, ITEM = 1_000_000, 32, 16
CONTAINERS = (dict, list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class Meter:
    """The time and the budget remaining for one use of a template."""

    def __init__(self) -> None:
        self.left, self.ends = BUDGET, time.thread_time() + SECONDS

    def check(self, size: int = 0) -> None:
        """Raise if the time is up, or if the budget is too small for a value of this size."""
        if time.thread_time() > self.ends:
            raise RuntimeError(f"it ran for more than {SECONDS:g} s")
        if size > self.left:
            raise RuntimeError("its values are too numerous or too large")

    def made(self, value: Any) -> Any:
        """Charge for a new value and return it."""
        self.left -= self.weigh(value)
        if isinstance(value, GeneratorType):
            return (self.made(item) for item in value)
        return value

    def weigh(self, value: Any) -> int:
        """Check and return a value's size; an item that is in a list twice counts twice.

        A list that holds one list twice, which in turn holds one list twice, and so on, is small
        until it is printed or compared.
        """
        size, waiting = 0, [value]
        while waiting and size + ITEM * len(waiting) <= self.left:
            item = waiting.pop()
            size += ITEM
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, int):  # the size stands in for the time that arithmetic takes
                size += item.bit_length() ** 2 // 100
            elif isinstance(item, CONTAINERS):
                waiting += item.items() if isinstance(item, dict) else item
        self.check(size + ITEM * len(waiting))
        return size


METER: ContextVar[Meter] = ContextVar("mlx_stream.text.template.meter")


def metered(work: Callable[[], T], characters: int = 0) -> T:
    """Run `work` metered and return its result; a nested use shares the outer one's limits."""
    meter, context = METER.get(None) or Meter(), copy_context()
    meter.left = BUDGET + BUDGET_PER_CHARACTER * characters
    context.run(METER.set, meter)
    return context.run(work)
