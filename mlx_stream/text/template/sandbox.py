"""What templates are compiled in: transformers' words for them, under Jinja's immutable sandbox.

Templates come with models, from strangers. Jinja keeps them from Python's insides and `range` from
more than 100,000 steps. Here every step of what they run is metered besides, the size of a result
is known before it is made wherever it can be much larger than what it is made of, and of Python's
methods and Jinja's filters there are those that text needs.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Template, nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.lexer import Token, TokenStream
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace

from mlx_stream.text.template.limits import (
    BOUNDED_FILTERS,
    FILTER_CHECKS,
    METHOD_CHECKS,
    BoundedEscapeFormatter,
    BoundedFormatter,
    check_conversions,
    joined,
    size_of_result,
)
from mlx_stream.text.template.meter import METER, LimitPassed

# Filters that are of no use to a prompt, and slow on long texts, or not the same each time.
NO_FILTERS = (
    *("urlize", "striptags", "wordwrap", "xmlattr", "filesizeformat", "urlencode", "pprint"),
    "random",
)
STRING_METHODS = """
capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha
isascii isdecimal isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip
partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split
splitlines startswith strip swapcase title upper zfill
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(STRING_METHODS.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(("bit_length", "is_integer", "real")),
    float: frozenset(("is_integer",)),
}
# The C library pads a date to any width it is told.
MAX_DATE_FORMAT = 200
WIDTH_OF_DATE = re.compile(r"%[^A-Za-z%]*\d")


def metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    check = FILTER_CHECKS.get(name)
    # Jinja hands some filters its environment first.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        meter = METER.get()
        meter.tick()
        if check is not None:
            check(*arguments[first:], **named)
        return meter.made(function(*arguments, **named))

    return run


def metered_test(function: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(function)
    def run(*arguments: Any, **named: Any) -> bool:
        METER.get().tick()
        return function(*arguments, **named)

    return run


# --- the compiler and the runtime ---


class MeteredCode(CodeGenerator):
    """Jinja's compiler, whose code asks the environment before each step.

    What it does not ask for takes no time of its own: names, constants, `if`, `and`, `set`.
    """

    environment: "TemplateEnvironment"

    def visit(self, node: nodes.Node, *arguments: Any, **named: Any) -> Any:
        METER.get().tick()
        return super().visit(node, *arguments, **named)

    def enter_frame(self, frame: Frame) -> None:
        super().enter_frame(frame)  # of a turn of a loop, of a macro's call, of a loop's test
        self.writeline("environment.tick()")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        # Two long lists are compared in one step, and `a == b == c` are two.
        self.write(f" {operators[node.op]} (environment.tick() or ")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._made(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_ScopedEvalContextModifier(
        self, node: nodes.ScopedEvalContextModifier, frame: Frame
    ) -> None:
        self.fail("autoescape is not supported", node.lineno)

    def _made(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox on a meter, with forbidden names refused at once."""

    code_generator_class = MeteredCode
    # Intercepted operators are also not folded while compiling.
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, extensions: list[Any]):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=extensions,
            # Nothing is run while compiling.
            optimized=False,
            finalize=written,
        )
        filters = {**FILTERS, **BOUNDED_FILTERS}
        self.filters = {
            name: metered_filter(name, function)
            for name, function in filters.items()
            if name not in NO_FILTERS
        }
        self.tests = {name: metered_test(test) for name, test in TESTS.items()}

    def tick(self) -> None:
        METER.get().tick()

    def made(self, value: Any) -> Any:
        METER.get().tick()
        return METER.get().made(value)

    def concat(self, parts: Iterable[Any]) -> str:
        return joined("", parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        METER.get().room_for(size_of_result(operator, left, right))
        if operator == "%" and isinstance(left, str):
            check_conversions(left, right)
        return METER.get().made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:
        __self.tick()
        METER.get().weigh(arguments, named)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            check = METHOD_CHECKS.get(getattr(__obj, "__name__", ""))
            if check is not None:
                check(owner, *arguments, **named)
        result = super().call(__context, __obj, *arguments, **named)
        return METER.get().made(result)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja would let a forbidden name pass for as long as nothing is done with it.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text = value.__self__

        def run(*arguments: Any, **named: Any) -> str:
            if value.__name__ == "format_map":
                (named,), arguments = arguments, ()
            if hasattr(text, "__html__"):  # marked safe: what is put in is escaped
                formatter = BoundedEscapeFormatter(self, escape=text.escape)
            else:
                formatter = BoundedFormatter(self)
            return type(text)(formatter.vformat(text, arguments, named))

        return run


@pass_eval_context
def written(_: EvalContext, value: Any) -> Any:
    """Turn what a template writes into text, on its account.

    Given the context, it is not called while compiling.
    """
    return value if isinstance(value, str) else METER.get().made(str(value))


class GenerationTag(Extension):
    """Accept {% generation %}, which marks replies for training; it writes nothing itself."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for token in stream:
            METER.get().tick()
            yield token


class TemplateNamespace(Namespace):
    """A namespace without underscored names, which Jinja's own code would look up unguarded."""

    def __init__(*args: Any, **kwargs: Any):
        # As in Jinja: `self` and others are left free as names of attributes.
        self, attributes = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self)
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Jinja's shows what it holds, which may be another that holds this one.
        return "<Namespace>"


def compile_template(source: str, now: datetime) -> Template:
    """Compile a template; what Jinja or Python raise about it comes through."""
    environment = TemplateEnvironment([GenerationTag, loopcontrols])

    def strftime_now(form: str) -> str:
        if len(form) > MAX_DATE_FORMAT or WIDTH_OF_DATE.search(form):
            raise LimitPassed(f"it writes the date as {form[:40]!r}, which is not supported")
        return now.strftime(form)

    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        # A function, because a class would bring its attributes along.
        dict=lambda *args, **kwargs: dict(*args, **kwargs),
        namespace=TemplateNamespace,
    )
    # Writes any amount of filler text.
    del environment.globals["lipsum"]
    return environment.from_string(source)


def raise_exception(message: str) -> None:
    raise JinjaError(message)
