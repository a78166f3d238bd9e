"""What templates are compiled in: transformers' words for them, under Jinja's immutable sandbox.

The sandbox keeps strangers' templates from Python's insides. Here each new value and each turn of a
loop is charged for besides, and what can be much larger than its parts is checked before.
"""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial, wraps
from typing import Any

from jinja2 import compiler, exceptions, ext, filters, nodes, pass_environment, utils
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_stream.text.template.meter import METER

FILTERS = str.split("""abs batch capitalize center count d default dictsort e escape first float
groupby indent int items join last length list lower map max min reject rejectattr replace reverse
round safe select selectattr slice sort string title tojson trim truncate unique upper""")
# Methods that no prompt needs, and whose results can be large.
FORBIDDEN = str.split("""encode expandtabs format format_map from_bytes fromkeys maketrans striptags
to_bytes translate unescape""")
# Filters and methods that take a width or a number, or a text that they are slow to search for.
NARROW = str.split("""batch center indent ljust lstrip rfind rindex rjust round rpartition rsplit
rstrip slice strip trim zfill""")
MAX_WIDTH = 99
CONVERSION = re.compile(r"%(\([^()%]*\))?[#0\- +]*\d{0,2}(\.\d{0,2})?[hlL]?[a-zA-Z%]")
# Expressions whose value is new, or that can have thousands of parts.
COMPOUND = (nodes.BinExpr, nodes.CondExpr, nodes.Compare, nodes.List, nodes.Dict, nodes.Tuple)


class LimitedCode(compiler.CodeGenerator):
    """Jinja's compiler, whose code charges for compound expressions and turns of loops."""

    def visit(self, node: nodes.Node, *arguments: Any, **named: Any) -> None:
        METER.get().check()
        chain = isinstance(node, nodes.Compare) and len(node.ops) > 3
        if chain or isinstance(node, nodes.ScopedEvalContextModifier):
            self.fail("long comparisons and autoescape are not supported", node.lineno)
        if isinstance(node, nodes.Concat):
            parts = [nodes.List(node.nodes)]
            node = nodes.Call(nodes.EnvironmentAttribute("concat"), parts, [], None, None)
        made = isinstance(node, COMPOUND) and getattr(node, "ctx", "load") == "load"
        if isinstance(node, nodes.Getitem):
            made = isinstance(node.arg, nodes.Slice)
        self.write("environment.made(" if made else "")
        super().visit(node, *arguments, **named)
        self.write(")" if made else "")

    def enter_frame(self, frame: compiler.Frame) -> None:
        super().enter_frame(frame)  # of a loop's turn, or a macro's call
        self.writeline("environment.made(0)")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits, where forbidden names are refused at once."""

    code_generator_class = LimitedCode
    intercepted_binops = frozenset(("*", "%", "**"))
    made = staticmethod(lambda value: METER.get().made(value))

    def __init__(self, now: datetime):
        # Jinja does not run what takes the environment while it compiles.
        written = pass_environment(lambda self, value: self.made(str(value)))
        tags = [GenerationTag, ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=tags, finalize=written)
        self.optimized, self.now = False, now
        for name in ("indent", "join", "replace", "tojson"):
            self.filters[name] = getattr(self, name)
        self.filters = {name: self.limited(name, self.filters[name]) for name in FILTERS}
        self.tests = {name: self.limited(name, test) for name, test in self.tests.items()}
        # Not the class dict: of its attributes some change a dict, and numbers can make it slow.
        self.globals |= {"dict": lambda **named: named, "namespace": Namespace}
        self.globals |= {name: getattr(self, name) for name in ("raise_exception", "strftime_now")}
        del self.globals["lipsum"]

    def limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter or a test that checks its arguments and charges for its result."""

        @wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            self.check_narrow(name, *arguments[1:], *named.values())
            return self.made(function(*arguments, **named))

        return run

    def check_narrow(self, name: str, *arguments: Any) -> None:
        for value in arguments if name in NARROW else ():
            width = len(value) if isinstance(value, str) else value
            if isinstance(width, int) and abs(width) > MAX_WIDTH:
                raise RuntimeError(f"it gives {name} a width or text of more than {MAX_WIDTH}")

    def concat(self, parts: Iterable[Any], separator: str = "") -> str:
        meter, texts, size = METER.get(), [], 0
        for part in parts:
            texts.append(str(part))
            size += len(texts[-1]) + len(separator)
            if size > meter.limit:
                meter.check(size)
        return self.made(separator.join(texts))

    def join(self, parts: Any, d: Any = "", attribute: Any = None) -> str:
        return self.concat(map(filters.make_attrgetter(self, attribute), parts), str(d))

    def replace(self, text: Any, old: Any, new: Any, count: int = -1) -> str:
        return self.concat(str(text).split(str(old), count), str(new))

    def indent(self, text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        METER.get().check(len(str(text)) + (len(str(text).splitlines()) + 1) * MAX_WIDTH)
        return filters.do_indent(str(text), width, first, blank)

    def tojson(self, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        self.check_narrow("indent", indent, 10 * "".join(separators or ()))
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
        encoder = json.JSONEncoder(**options, sort_keys=sort_keys)
        return self.concat(encoder.iterencode(value))

    def raise_exception(self, message: str) -> None:
        raise exceptions.TemplateError(message)

    def strftime_now(self, form: str) -> str:
        # The C library pads a date to any width it is told.
        if not re.fullmatch(r"([^%]|%[-_^#]?[a-zA-Z%]){0,99}", form, re.DOTALL):
            raise RuntimeError(f"it writes the date as {form[:40]!r}, which is not supported")
        return self.now.strftime(form)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter, size = METER.get(), 0
        if operator == "%" and isinstance(left, str):
            rest, fields = CONVERSION.subn("", left)
            if "%" in rest:
                raise RuntimeError(f"it formats by {left[:40]!r}, which is not supported")
            size = len(left) + fields * (400 + meter.weigh(right))  # a float can have 400 digits
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            size = (left.bit_length() * max(right, 0)) ** 2 // 100
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    size = len(sequence) * times
        meter.check(size)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:
        METER.get().weigh((arguments, named))
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if name in FORBIDDEN:
            raise exceptions.SecurityError(f"the method {name!r} is not supported")
        if isinstance(text, str):
            __self.check_narrow(name, *arguments, *named.values())
            if name == "join":
                __obj = partial(__self.concat, separator=text)
            elif name == "replace":
                __obj = partial(__self.replace, text)
        return __self.made(super().call(__context, __obj, *arguments, **named))

    def getitem(self, obj: Any, argument: Any) -> Any:
        METER.get().check()  # for each part of map(attribute="a.b.c")
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise exceptions.SecurityError(f"{attribute!r} of a {type(obj).__name__} is not allowed")


class GenerationTag(ext.Extension):
    """Accept {% generation %}, which marks replies for training; it writes nothing itself."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def filter_stream(self, stream: Any) -> Any:
        return (token for token in stream if not METER.get().check())

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(utils.Namespace):
    """A namespace without underscored names, which Jinja's own code would look up unguarded."""

    __repr__ = object.__repr__  # Jinja's writes what it holds, which may be itself

    def __init__(self, /, **named: Any):
        super().__init__()
        for name in named:
            self[name] = named[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)
