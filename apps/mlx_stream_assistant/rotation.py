"""What rotation calls the files that a name had before, and in which order; opens none."""

import os
import re
from itertools import pairwise
from pathlib import Path

# What rotation puts after a name: a number, a date or time, or a word.
ROTATED = re.compile(r"([-._])(\d{1,4})|([-._]\d[\d.:T_-]*\d)|\.(?:old|bak|prev)|~", re.ASCII)


def rotation_number(name: str, other: str) -> tuple[str, int] | None:
    """Return how another file is named by rotation, and which turn that is: a later one is higher.

    >>> rotation_number("x.log", "x.log.2"), rotation_number("x.log", "x.log-20261128")
    (('.', -2), ('-00000000', 20261128))
    """
    match = ROTATED.fullmatch(other.removeprefix(name)) if other.startswith(name) else None
    if match is None:
        return None
    before, number, date = match.groups()
    if number:
        return before, -int(number)
    if date:
        return re.sub(r"\d", "0", date), int(re.sub(r"\D", "", date))
    return match[0], 0


def in_rotation_order(
    ours: tuple[str, int], since: float, later: list[tuple[int, Path, os.stat_result]]
) -> bool:
    """Return whether files that are later by their names were written one after the other, too.

    Numbers must go on down to 1 or 0: some programs give higher ones to later files.
    """
    scheme, turn = ours
    turns, times = [turn for turn, _, _ in later], [s.st_mtime_ns for _, _, s in later]
    whole = len(scheme) > 1 or turns in ([*range(turn + 1, 0)], [*range(turn + 1, 1)])
    return whole and all(a <= b for a, b in pairwise([since, *times]))
