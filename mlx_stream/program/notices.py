"""Functions that are called with a line for the user."""

from collections.abc import Callable

Notify = Callable[[str], None]


def discard(notice: str) -> None:
    """Drop a notice."""
