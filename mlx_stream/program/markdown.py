"""Parses a model's Markdown and splits it into blocks; displays nothing.

No text is lost: HTML, entities and link definitions stay as they were written. A line of
`---` is a rule, never the underline of a heading, so that a line never changes the lines before it.
"""

from functools import cache
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

LISTS = ("bullet_list", "ordered_list")


@cache
def parser() -> MarkdownIt:
    """Return the parser; its `render` returns HTML in which none of the text is markup."""
    rules = MarkdownIt("commonmark", {"html": False, "breaks": True})
    rules.enable(["table", "strikethrough"])
    return rules.disable(["code", "entity", "html_inline", "lheading", "reference", "image"])


def parse_markdown(text: str) -> SyntaxTreeNode:
    """Parse text; the children of the result are its blocks."""
    return SyntaxTreeNode(parser().parse(text))


def split_blocks(text: str) -> list[str]:
    """Split text into blocks whose concatenation is the whole text; each list item is a block.

    Appending text can only change the last block.
    """
    starts = []
    for node in parse_markdown(text).children:
        starts += [each.map for each in (node.children if node.type in LISTS else [node])]
    lines = text.splitlines(keepends=True)
    first = [0, *(place[0] for place in starts[1:] if place), len(lines)]
    parts = ["".join(lines[a:b]) for a, b in pairwise(first)]
    return [part for part in parts if part]
