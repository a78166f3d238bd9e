"""A package's public names, imported on first use; independent of any package."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def fetch_name(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Return a name from the module that `homes` gives, for `__getattr__` of a package."""
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
