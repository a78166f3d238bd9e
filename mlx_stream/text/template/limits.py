"""What can be much larger than what it is made of, checked before it is made; knows no template.

"%9999999999d" has twelve characters. Each function here takes what Python or Jinja would be given,
and raises `LimitPassed` where the result would pass the limit of the meter that is running.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import Environment, pass_environment, pass_eval_context
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.sandbox import SandboxedEscapeFormatter, SandboxedFormatter

from mlx_stream.text.template.meter import MAX_BITS, METER, LimitPassed

# A width, a precision, an indentation, a number of rows.
MAX_WIDTH = 1_000
MAX_INDENT = 100  # of JSON, where it grows with the depth
CONVERSION = re.compile(r"%(?:\([^()%]*\))?[#0\- +]*(\d*)(?:\.(\d*))?[hlL]?[diouxXeEfFgGcrsa%]")


def small(value: Any) -> int:
    """Return how wide a width, or a text in place of one, is; raise if it is no small number."""
    if isinstance(value, int) and abs(value) > MAX_WIDTH:
        raise LimitPassed(f"it asks for a width of more than {MAX_WIDTH}")
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 0


def check_widths(_: Any, *arguments: Any, **named: Any) -> None:
    for argument in (*arguments, *named.values()):
        small(argument)


def check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    text = str(text)
    METER.get().room_for(len(text) + text.count(str(old)) * len(str(new)))


def check_expandtabs(text: str, tabsize: int = 8) -> None:
    METER.get().room_for(len(text) + text.count("\t") * small(tabsize))


def check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    text = str(text)
    METER.get().room_for(len(text) + (len(text.splitlines()) + 1) * small(width))


def check_join(separator: str, parts: Any) -> None:
    if isinstance(parts, list | tuple | dict | str):  # a generator's items are counted as they come
        METER.get().room_for(len(separator) * len(parts))


def check_conversions(form: Any, *values: Any, **named: Any) -> None:
    """See to `form % values`, as the operator or the filter has them."""
    meter, form, count = METER.get(), str(form), 0
    given = values[0] if len(values) == 1 and isinstance(values[0], tuple | dict) else values
    meter.weigh(given, named)
    for match in CONVERSION.finditer(form):
        count += 1
        for digits in match.groups(""):
            small(int(digits[:9] or 0))
    if "%" in CONVERSION.sub("", form):
        raise LimitPassed(f"it formats by {form[:40]!r}, which is not supported")
    items = (*(given.values() if isinstance(given, dict) else given), *named.values())
    largest = max((len(str(item)) for item in items), default=0)
    meter.room_for(len(form) + count * largest)


class BoundedFormatter(SandboxedFormatter):
    """str.format with fields of bounded width, and bounded as a whole."""

    def __init__(self, env: Any, **more: Any):
        super().__init__(env, **more)
        self.length = 0

    def format_field(self, value: Any, format_spec: str) -> str:
        METER.get().tick()
        for digits in re.findall(r"\d+", format_spec):
            small(int(digits[:9]))
        text = super().format_field(value, format_spec)
        self.length += len(text)
        METER.get().room_for(self.length)
        return text


class BoundedEscapeFormatter(BoundedFormatter, SandboxedEscapeFormatter):
    """The same for text that was marked safe: what is put into it is escaped."""


def joined(separator: str, parts: Iterable[Any]) -> str:
    """Join the texts of parts, seeing before each that there is room for it."""
    meter, texts, length = METER.get(), [], 0
    for part in parts:
        meter.tick()
        texts.append(str(part))
        length += len(texts[-1]) + len(separator)
        meter.room_for(length - len(separator))
    return meter.made(separator.join(texts))


@pass_eval_context
def join(eval_ctx: EvalContext, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(eval_ctx.environment, attribute), value)
    return joined(str(d), value)


@pass_environment
def add_up(environment: Environment, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    # Lists added one by one are copied once for each that follows.
    if not isinstance(start, int | float):
        raise LimitPassed("it sums what are no numbers")
    return FILTERS["sum"](environment, iterable, attribute, start)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    meter = METER.get()
    meter.weigh(value)
    for size in (indent, *(separators or ())):
        if small(size) > MAX_INDENT:
            raise LimitPassed(f"it asks for an indentation of more than {MAX_INDENT}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return joined("", encoder.iterencode(value))


def size_of_result(operator: str, left: Any, right: Any) -> int:
    """Return how large, at most, what an operator makes can be; 0 where it is not large.

    Raises:
        LimitPassed: a number would have too many digits.
    """
    if isinstance(left, int) and isinstance(right, int):
        times = abs(right) if operator == "**" else 1
        if left.bit_length() * times + right.bit_length() > MAX_BITS:
            raise LimitPassed(f"it makes a number of more than {MAX_BITS} bits")
        return 0
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                return len(sequence) * times
    if operator == "+" and isinstance(left, str | list | tuple):
        return len(left) + (len(right) if isinstance(right, str | list | tuple) else 0)
    return 0


# Before methods of strings are called, and filters; and filters in place of Jinja's.
METHOD_CHECKS: dict[str, Callable[..., None]] = {
    "replace": check_replace,
    "expandtabs": check_expandtabs,
    "join": check_join,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), check_widths),
}
FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "indent": check_indent,
    "replace": check_replace,
    "format": check_conversions,
    **dict.fromkeys(("center", "batch", "slice", "round"), check_widths),
}
BOUNDED_FILTERS = {"tojson": to_json, "join": join, "sum": add_up}
