"""Who is told, in one line, what a user should know; knows nothing of what is said."""

from collections.abc import Callable

Notify = Callable[[str], None]


def discard(notice: str) -> None:
    """Take a notice and drop it."""
