"""Renders Markdown as styled lines with Rich; independent of terminals and of streaming.

Code keeps its fences and its indentation, so that it can be copied. A table that is too wide is
shown as one line for each cell.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from markdown_it.tree import SyntaxTreeNode
from pygments.token import Comment, Keyword, Name, Number, String
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text

from mlx_stream.program.markdown import LISTS, parse_markdown
from mlx_stream.program.terminal import is_styled, line_breaks

STYLES = {"strong": "bold", "em": "italic", "s": "strike", "link": "underline"}
CODE = "cyan"
LONGEST_RULE, NARROWEST = 40, 10
# Only those of the sixteen terminal colours that are legible on light and dark backgrounds.
THEME = ANSISyntaxTheme(
    {
        Comment: Style(dim=True),
        Keyword: Style(color="magenta"),
        Name.Builtin: Style(color="blue"),
        Name.Function: Style(bold=True),
        Name.Class: Style(bold=True),
        Number: Style(color="cyan"),
        String: Style(color="green"),
    }
)

Lines = list[Text]


def render_lines(text: str, width: int) -> Lines:
    """Return the lines of Markdown blocks, none wider than `width` cells."""
    nodes = parse_markdown(text).children
    indent = min(len(text) - len(text.lstrip(" ")), width // 2)
    return indented(render_blocks(nodes, text, width - indent), " " * indent)


def as_ansi(line: Text) -> str:
    """Return a line as the terminal shows it."""
    with console().capture() as captured:
        console().print(line, end="", soft_wrap=True)
    return captured.get()


@cache
def console() -> Console:
    # Rich itself leaves colours out if NO_COLOR is set.
    system = "standard" if is_styled() else None
    return Console(force_terminal=True, color_system=system, highlight=False, emoji=False)


def render_blocks(nodes: Sequence[SyntaxTreeNode], text: str, width: int) -> Lines:
    """Return the lines of blocks, separated by an empty line where the source has one."""
    source, lines, end = text.splitlines(), [], None
    for node in nodes:
        start, next_end = node.map or (0, 0)
        if end is not None and not all(source[end - 1 : start]):
            lines.append(Text())
        lines += RENDERERS.get(node.type, render_text)(node, text, max(NARROWEST, width))
        end = next_end
    return lines


def render_text(node: SyntaxTreeNode, text: str, width: int) -> Lines:
    return wrapped(inline(node), width)


def render_heading(node: SyntaxTreeNode, text: str, width: int) -> Lines:
    style = "bold underline" if node.tag == "h1" else "bold"
    return wrapped(Text(style=style).append_text(inline(node)), width)


def render_rule(node: SyntaxTreeNode, text: str, width: int) -> Lines:
    return [Text("─" * min(width, LONGEST_RULE), "dim")]


def render_code(node: SyntaxTreeNode, text: str, width: int) -> Lines:
    language = node.info.split()[0] if node.info.split() else ""
    syntax = Syntax("", language or "text", theme=THEME)
    code = syntax.highlight(node.content)
    code.rstrip()
    start, end = node.map or (0, 0)
    lines = wrapped(code, width) if node.content else []
    last = text.splitlines()[end - 1].strip() if end - start > 1 else ""
    closed = last.startswith(node.markup) and not last.strip(node.markup[0])
    return [Text(node.markup + language, "dim"), *lines, *([Text(last, "dim")] if closed else [])]


def render_list(node: SyntaxTreeNode, text: str, width: int) -> Lines:
    lines: Lines = []
    for item in node.children:
        marker = f"{item.info}{item.markup} " if node.type == "ordered_list" else "• "
        within = render_blocks(item.children, text, width - len(marker)) or [Text()]
        lines += indented(within, " " * len(marker), marker)
    return lines


def render_quote(node: SyntaxTreeNode, text: str, width: int) -> Lines:
    return indented(render_blocks(node.children, text, width - 2), "│ ", style="dim")


def render_table(node: SyntaxTreeNode, text: str, width: int) -> Lines:
    head, *body = (row.children for part in node.children for row in part.children)
    rows = [[inline(cell) for cell in row] for row in (head, *body)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for cell, name in zip(head, rows[0], strict=True):
        right = "right" in str(cell.attrs.get("style"))
        table.add_column(name, justify="right" if right else "left")
    for row in rows[1:]:
        table.add_row(*row)
    unlimited = console().options.update(max_width=10**6)
    if Measurement.get(console(), unlimited, table).minimum > width:
        return render_records(rows, width)
    found = console().render_lines(table, console().options.update(width=width), pad=False)
    return [without_end(Text.assemble(*map(styled, segments))) for segments in found]


def render_records(rows: Sequence[Sequence[Text]], width: int) -> Lines:
    """Return a table as one line per cell, each beginning with its column's name."""
    lines: Lines = []
    for row in rows[1:]:
        for name, cell in zip(rows[0], row, strict=True):
            lines += wrapped(Text.assemble((name.plain, "bold"), ": ", cell), width)
        lines.append(Text())
    return lines[:-1]


RENDERERS: dict[str, Callable[[SyntaxTreeNode, str, int], Lines]] = {
    "heading": render_heading,
    "hr": render_rule,
    "fence": render_code,
    "blockquote": render_quote,
    "table": render_table,
    **dict.fromkeys(LISTS, render_list),
}


def inline(node: SyntaxTreeNode) -> Text:
    """Return the text of a block with the styles of its words."""
    if node.type in ("softbreak", "hardbreak"):
        return Text("\n")
    if not node.children:
        return Text(node.content, CODE if node.type == "code_inline" else "")
    text = Text(style=STYLES.get(node.type, ""))
    for child in node.children:
        text.append_text(inline(child))
    address = node.attrs.get("href") if node.type == "link" else None
    if address and address != text.plain:
        return Text.assemble(text, f" ({address})")
    return text


def wrapped(text: Text, width: int) -> Lines:
    """Break text into lines of at most `width` cells."""
    text.expand_tabs(4)
    lines = []
    for line in text.split("\n", allow_blank=True):
        lines += map(without_end, line.divide(line_breaks(line.plain, width)))
    return lines


def without_end(line: Text) -> Text:
    line.rstrip()
    return line


def styled(segment: Segment) -> Any:
    return (segment.text, segment.style or "")


def indented(lines: Lines, indent: str, first: str = "", style: str = "") -> Lines:
    """Put `indent` before each line, or `first`, if given, before the first line."""
    heads = [first or indent, *[indent] * len(lines)][: len(lines)]
    shown = zip(heads, lines, strict=True)
    return [without_end(Text.assemble((head, style), line)) for head, line in shown]
