"""Checks argument types against a function's annotations, if any; does not check values."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from mlx_stream.errors import TypeRefused

P = ParamSpec("P")
R = TypeVar("R")
WORDS = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
NUMBERS = {int: Integral, float: Real}


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function refuse arguments of the wrong type.

    Otherwise they would cause errors later and elsewhere, such as in an engine on another thread.
    """
    signature = inspect.signature(function)
    hints = functools.cache(lambda: get_type_hints(function))

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # raises the TypeError for an invalid call
        refuse_wrong_types(given, hints())
        return function(*args, **kwargs)

    return run


def refuse_wrong_types(given: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse a value that does not fit the annotation for its name.

    Raises:
        TypeRefused: a value has the wrong type.
    """
    for name, value in given.items():
        if name in hints and not fits(value, hints[name]):
            raise TypeRefused(f"`{name}` must be {type_words(hints[name])}, not {value!r:.60}")


def fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Callable:
        return callable(value)
    if origin is Sequence:
        return isinstance(value, Sequence) and all(fits(item, parts[0]) for item in value)
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def type_words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(type_words, parts))
    if origin is Callable:
        return "callable"
    if origin is Sequence:
        return f"a sequence of {parts[0].__name__}"
    return WORDS.get(hint) or f"a {(origin or hint).__name__}"
