"""A package's public names, imported on first use; independent of any package."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def fetch_name(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Import a name from the module that `homes` maps it to, for a package's `__getattr__`."""
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
