"""Converts Markdown to blocks that widgets can show: plain text with a kind; uses no widgets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_stream.program.markdown import LISTS, parse_markdown


@dataclass(frozen=True)
class Block:
    """A part of a reply.

    Attributes:
        kind: "text", "heading", "code", or "quote".
        indent: how deeply it is nested in lists and quotations.
    """

    kind: str
    text: str
    indent: int = 0


def blocks_of(text: str) -> list[Block]:
    """Return the blocks of Markdown text; inline styles are dropped."""
    return [*blocks_in(parse_markdown(text).children)]


def blocks_in(nodes: Sequence[Any], indent: int = 0, kind: str = "text") -> Iterator[Block]:
    for node in nodes:
        if node.type in LISTS:
            for item in node.children:
                marker = f"{item.info}{item.markup} " if node.type == "ordered_list" else "• "
                within = [*blocks_in(item.children, indent + 1, kind)]
                if within and within[0].kind == kind:
                    marker += within.pop(0).text
                yield Block(kind, marker, indent)
                yield from within
        elif node.type == "blockquote":
            yield from blocks_in(node.children, indent + 1, "quote")
        elif node.type == "fence":
            yield Block("code", node.content.rstrip("\n"), indent)
        elif node.type == "table":
            yield Block("code", table_text(node), indent)
        elif node.type == "hr":
            yield Block(kind, "―" * 12, indent)
        else:
            yield Block("heading" if node.type == "heading" else kind, inline_text(node), indent)


def inline_text(node: Any) -> str:
    """Return the text of a block."""
    if node.type in ("softbreak", "hardbreak"):
        return "\n"
    text = "".join(map(inline_text, node.children)) if node.children else node.content
    address = node.attrs.get("href") if node.type == "link" else None
    return f"{text} ({address})" if address and address != text else text


def table_text(node: Any) -> str:
    """Return a table as text in aligned columns."""
    rows = [
        [inline_text(cell) for cell in row.children]
        for part in node.children
        for row in part.children
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["─" * width for width in widths])
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines
    )
