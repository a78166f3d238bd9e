"""A list of models worth pulling, with short names and sources; fetches and plans nothing.

The data is in `catalog.toml`, next to this file.
"""

import difflib
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class ListedModel:
    """A model in the list.

    Attributes:
        name: the short name, which `resolve` takes.
        repository: the Hub id; `seen` says where and when it was found.
        config: the parts of its config.json that affect shapes; `shape_source` is where they were
            found.
        tested: whether the tests run the model itself, not just its family.
        suggested: whether `mlx_stream chat` may offer it.
        bytes: the size of its weights on the Hub, if known; `bytes_source` is where it was found.
    """

    name: str
    repository: str
    license: str
    seen: str
    license_source: str
    shape_source: str
    config: dict[str, Any] = field(repr=False)
    tested: bool = False
    suggested: bool = False
    bytes: int | None = None
    bytes_source: str | None = None


@cache
def listed_models() -> tuple[ListedModel, ...]:
    """Return the list, smallest model first."""
    text = files("mlx_stream.hub").joinpath("catalog.toml").read_text("utf-8")
    return tuple(ListedModel(**entry) for entry in tomllib.loads(text)["model"])


def listed_repository(name: str) -> str | None:
    """Return the Hub id for a short name, ignoring case; None if the list does not contain it."""
    found = (model for model in listed_models() if model.name == name.lower())
    return next((model.repository for model in found), None)


def similar_names(source: str) -> str:
    """Return "did you mean ...? " with the names of similar models, or "" if there are none."""
    known = {model.name: model.name for model in listed_models()}
    known |= {model.repository.lower(): model.name for model in listed_models()}
    close = difflib.get_close_matches(source.lower(), known, 3, 0.6)
    names = dict.fromkeys(known[one] for one in close)
    return f"did you mean {', '.join(names)}? " if names else ""
