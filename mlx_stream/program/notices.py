"""Callbacks that receive a line of text for the user."""

from collections.abc import Callable

Notify = Callable[[str], None]


def discard(notice: str) -> None:
    """Ignore a notice."""
