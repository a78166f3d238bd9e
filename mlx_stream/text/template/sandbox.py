"""The environment that compiles templates: transformers' names, in Jinja's immutable sandbox.

The sandbox keeps untrusted templates away from Python's internals. In addition, every new value
and every loop iteration is charged to a budget, and a value that can be much larger than its parts
is checked before it is created.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

from jinja2 import compiler, exceptions, ext, filters, nodes, pass_environment, utils
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_stream.text.template.meter import METER

FILTERS = str.split("""abs batch capitalize center count d default dictsort e escape first float
groupby indent int items join last length list lower map max min reject rejectattr replace reverse
round safe select selectattr slice sort string title tojson trim truncate unique upper""")
# Methods that no prompt needs and whose results can be large.
FORBIDDEN = str.split("""encode expandtabs format format_map from_bytes fromkeys maketrans to_bytes
translate""")
# Filters and methods that take a width, a number, or a text that is slow to search for.
NARROW = str.split("""batch center groupby indent ljust lstrip rfind rindex rjust round rpartition
rsplit rstrip slice sort strftime strip tojson trim zfill""")
MAX_WIDTH = 99
CONVERSION = re.compile(r"%(\([^()%]*\))?[#0\- +]*\d{0,2}(\.\d{0,2})?[hlL]?[a-zA-Z%]")
# Expressions that create a new value or take time.
COMPOUND = (nodes.BinExpr, nodes.Compare, nodes.List, nodes.Dict, nodes.Tuple)


class LimitedCode(compiler.CodeGenerator):
    """Jinja's compiler, extended to charge for compound expressions and loop iterations."""

    def visit(self, node: nodes.Node, *arguments: Any, **named: Any) -> None:
        METER.get().check()
        chain = isinstance(node, nodes.Compare) and len(node.ops) > 3
        if chain or isinstance(node, nodes.ScopedEvalContextModifier):
            self.fail("long chains of comparisons and autoescape are not supported", node.lineno)
        if isinstance(node, nodes.For) and node.test:  # an And is charged for each item
            node.test = nodes.And(node.test, nodes.Const(True))
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
        super().enter_frame(frame)  # for a loop iteration or a macro call
        self.writeline("environment.made(0)")


class Namespace(utils.Namespace):
    """A Jinja namespace that does not print its contents, because it may contain itself."""

    __repr__ = object.__repr__


class GenerationTag(ext.Extension):
    """Accepts {% generation %}, which marks replies for training and outputs nothing itself."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits; it refuses forbidden names immediately."""

    code_generator_class = LimitedCode
    intercepted_binops = frozenset(("*", "%", "**"))
    made = staticmethod(lambda value: METER.get().made(value))

    def __init__(self) -> None:
        # At compile time, Jinja does not run functions that take the environment.
        written = pass_environment(lambda self, value: self.made(str(value)))
        options = {"trim_blocks": True, "lstrip_blocks": True, "optimized": False}
        super().__init__(extensions=[GenerationTag, ext.loopcontrols], finalize=written, **options)
        for name in ("indent", "join", "replace", "tojson"):
            self.filters[name] = getattr(self, name)
        # Text is never marked as safe: such text has its own methods and operators.
        self.filters["safe"] = self.filters["string"]
        self.filters["e"] = self.filters["escape"] = lambda x: str(filters.FILTERS["e"](str(x)))
        self.filters = {name: self.limited(name, self.filters[name]) for name in FILTERS}
        self.tests = {name: self.limited(name, test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        # Not the class `dict`: some of its methods change a dict, and hash collisions make it slow.
        self.globals |= {"dict": lambda **named: named, "raise_exception": raise_exception}
        self.globals |= {"namespace": lambda **named: Namespace(named)}

    def limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter or a test that checks its arguments and charges for its result."""

        @wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            check_narrow(name, *arguments[1:], *named.values())
            return self.made(function(*arguments, **named))

        return run

    def concat(self, parts: Iterable[Any], separator: str = "") -> str:
        meter, texts, size = METER.get(), [], 0
        for part in parts:
            texts.append(str(part))
            size += len(texts[-1]) + len(separator)
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
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
        return self.concat(json.JSONEncoder(**options, sort_keys=sort_keys).iterencode(value))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter, size = METER.get(), 0
        if operator == "%" and isinstance(left, str):
            rest, fields = CONVERSION.subn("", left)
            if "%" in rest:
                raise RuntimeError(f"it formats with {left[:40]!r}, which is not supported")
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
        check_narrow(name, *arguments, *named.values())
        if isinstance(text, str) and name == "join":
            __obj = partial(__self.concat, separator=text)
        elif isinstance(text, str) and name == "replace":
            __obj = partial(__self.replace, text)
        return __self.made(super().call(__context, __obj, *arguments, **named))

    def getitem(self, obj: Any, argument: Any) -> Any:
        METER.get().check()  # for each part of map(attribute="a.b.c")
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise exceptions.SecurityError(f"{attribute!r} of a {type(obj).__name__} is not allowed")


def check_narrow(name: str, *arguments: Any) -> None:
    for value in arguments if name in NARROW else ():
        width = len(value) if isinstance(value, str) else value
        if isinstance(width, int) and abs(width) > MAX_WIDTH:
            raise RuntimeError(f"it calls {name} with a width or length above {MAX_WIDTH}")


def raise_exception(message: str) -> None:
    raise exceptions.TemplateError(message)
