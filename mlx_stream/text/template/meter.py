"""What a stranger's template may use up: time, memory, the size of a value; knows no Jinja.

Nothing here interrupts: no signal, no thread. What a template runs calls `tick` before each step
and `made` with each new value, and no single step on values of bounded size takes long. So the
limits hold on any thread, and a template that stays inside them does not notice.
"""

import time
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

# A rendering of a published template takes milliseconds. Both must have passed: a machine that is
# swapping or asleep can be slow with honest work.
SECONDS = 1.0
CPU_SECONDS = 0.5
# What a template may add to the messages, in characters: to its output, and to any one value.
MAX_ADDED = 1_000_000
# Times that all values a template makes, kept or not, may be as large as the largest one.
TURNOVER = 32
# What a value costs beside its characters, and an item of a list: pointers and headers.
VALUE_COST, ITEM_COST = 64, 8
# Bits of a whole number; arithmetic on larger ones is slow, and no template needs 3,000 digits.
MAX_BITS = 10_000

CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView)


class LimitPassed(Exception):
    """A template used more than it may; says what of."""


class Meter:
    """What is left of one use of a template.

    Attributes:
        limit: characters or items of one value.
        over: the use has ended, be it by an interrupt.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.over = False
        self.left = TURNOVER * limit
        self.began, self.began_cpu = time.monotonic(), time.thread_time()

    def tick(self) -> None:
        """Raise if the time is over."""
        if time.monotonic() - self.began < SECONDS:
            return
        if time.thread_time() - self.began_cpu > CPU_SECONDS:
            raise LimitPassed(f"it ran for more than {SECONDS:g} s")

    def room_for(self, size: int) -> None:
        """Raise if a value of this size, not made yet, would be too large."""
        if size > self.limit:
            raise LimitPassed(f"it makes a value larger than {self.limit} characters")

    def made(self, value: Any) -> Any:
        """Take a new value into account and return it."""
        if isinstance(value, str):
            self.room_for(len(value))
            self.spend(len(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitPassed(f"it makes a number of more than {MAX_BITS} bits")
            self.spend(0)
        else:
            self.weigh(value)
            self.spend(ITEM_COST * len(value) if isinstance(value, list | tuple | dict) else 0)
        return value

    def spend(self, amount: int) -> None:
        self.left -= VALUE_COST + amount
        if self.left < 0:
            raise LimitPassed("the values it makes take too much memory")

    def weigh(self, *values: Any) -> None:
        """Raise if values, written out, would be too large, with what is in a list twice twice.

        A list of a list twice, of that one twice, and so on, is small in memory and has no end
        when it is written, compared or counted.
        """
        weight, waiting, steps = 0, list(values), 0
        while waiting:
            value = waiting.pop()
            steps += 1
            if steps % 4_096 == 0:
                self.tick()
            if isinstance(value, str):
                weight += len(value)
            elif isinstance(value, dict | ItemsView):
                for pair in value.items() if isinstance(value, dict) else value:
                    waiting += pair
            elif isinstance(value, CONTAINERS):
                waiting += value
            weight += 1
            if weight + len(waiting) > self.limit:
                self.room_for(weight + len(waiting))


METER: ContextVar[Meter] = ContextVar("mlx_stream.text.template.meter")


def metered(work: Callable[[], T], characters: int = 0) -> T:
    """Return what `work` returns, metered; inside another use, on that one's account.

    `characters` are those of the messages, which an honest template copies and cuts.
    """
    limit = MAX_ADDED + 4 * characters
    meter = METER.get(None)
    if meter and not meter.over:
        meter.limit = max(meter.limit, limit)
        return work()
    meter = Meter(limit)
    # Marked, not put back, and no generator's `with`: an interrupt at its border, whose traceback
    # somebody keeps, would leave this one in use until its time is up, and for ever after.
    try:
        METER.set(meter)
        return work()
    finally:
        meter.over = True
