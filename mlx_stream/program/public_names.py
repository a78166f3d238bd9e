"""Public names of a package, each fetched when it is first asked for; knows no package."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def fetch_name(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Return a name from the module that defines it: what `__getattr__` of a package returns.

    Args:
        homes: the modules by the public names that they define.

    Raises:
        AttributeError: it is none of them.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
