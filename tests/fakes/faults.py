"""Makes the nth call that writes, flushes or renames a file fail."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

CALLS = (
    *((os, name) for name in ("mkdir", "open", "close", "fsync", "chmod", "rename", "replace")),
    *((os, name) for name in ("write", "unlink", "rmdir")),
    (fcntl, "flock"),
)


@contextmanager
def fault(point: int, act: Callable[[], Any]) -> Iterator[list[str]]:
    """Call `act` just before call number `point`, from 0; yield the names of the calls made."""
    seen: list[str] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == point + 1:
                act()
            return call(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for owner, name in CALLS:
            stack.enter_context(patch.object(owner, name, watched(name, getattr(owner, name))))
        yield seen
