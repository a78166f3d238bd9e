"""Formats command-line help in plain words, to the terminal's width; independent of commands."""

import re
from shutil import get_terminal_size
from typing import Any

import typer

# Plain words for the types that various versions of typer show.
TAKEN = {"str": "TEXT", "int": "NUMBER", "float": "NUMBER", "path": "PATH"}


class HelpFormatter(typer.Context.formatter_class):
    """Writes help in plain words, for narrow terminals: long options get a line of their own."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__(width=max(20, min(80, get_terminal_size().columns) - 2))

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, re.sub(r"\{([^{}]*)\}(\.\.\.)?", r"\1", args), prefix)

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        rows = [(without_types(term), *texts) for term, *texts in rows]
        super().write_dl(rows, min(col_max, self.width // 3), col_spacing)


def without_types(term: str) -> str:
    """Return an option and its value, or an argument, without the names of Python types.

    >>> without_types("-p, --prompt <str>"), without_types("FILE <list[str]>")
    ('-p, --prompt TEXT', 'FILE')
    """
    found = re.fullmatch(r"(.+) <(?:list\[)?(\w+)\]?>", term)
    if not found:
        return term
    return f"{found[1]} {TAKEN.get(found[2], 'VALUE')}" if term.startswith("-") else found[1]


class HelpContext(typer.Context):
    """The context of every command."""

    formatter_class = HelpFormatter


def with_help(command: Any) -> Any:
    """Let a command and its subcommands format their help in the same way."""
    command.context_class = HelpContext
    for part in getattr(command, "commands", {}).values():
        with_help(part)
    return command
