"""The conversation as bubbles in a scrolling column; depends on Toga, not on the engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import toga
from toga.constants import (
    BOLD,
    COLUMN,
    ITALIC,
    MONOSPACE,
    NORMAL,
    ROW,
    SYSTEM,
    TRANSPARENT,
)
from toga.fonts import SYSTEM_DEFAULT_FONT_SIZE
from toga.style.pack import Pack

from mlx_stream.chat import plural
from mlx_stream_desktop.blocks import Block, blocks_of
from mlx_stream_desktop.colours import Colours
from mlx_stream_desktop.history import Message, clock
from mlx_stream_desktop.text_layout import escape_markup, visible, wrap

EXCHANGES_SHOWN = 20
WIDEST, INSET, BESIDE = 640, 12, 60
NEAR_THE_END, INDENT = 40, 18
# The height of a line of code, and of the padding around the lines, in pixels.
CODE_LINE, CODE_EDGE = 19, 16
MARKS = {None: " \N{HORIZONTAL ELLIPSIS}", "interrupted": " [stopped]", "length": " [cut]"}


@dataclass(frozen=True)
class Row:
    """A bubble ("you", "model"), or a remark between bubbles ("note")."""

    kind: str
    text: str
    attended: bool = True
    time: str = ""
    mark: str = ""

    @property
    def blocks(self) -> list[Block]:
        """The blocks to show: for a reply, its Markdown and the mark at its end."""
        if self.kind != "model":
            return [Block("text", self.text)]
        found, mark = blocks_of(self.text.removesuffix(self.mark)), self.mark
        if mark and found and found[-1].kind != "code":
            last = found.pop()
            return [*found, replace(last, text=last.text + mark)]
        return [*found, Block("text", mark)] if mark else found


def rows_of(said: Sequence[Message], attended: int, name: str | None) -> list[Row]:
    """Return the rows to show: the latest exchanges, and a note where attention starts."""
    first, gone = max(0, len(said) - EXCHANGES_SHOWN), len(said) - attended
    rows = []
    if first:
        rows.append(Row("note", f"{first:,} earlier: mlx_stream sessions show {name}", False))
    for number, one in enumerate(said[first:], first):
        if number == gone and gone:
            note = f"above, no longer in the window: {plural(gone)}"
            rows.append(Row("note", note, False))
        rows.append(Row("you", visible(one.question), number >= gone, clock(one.time)))
        mark = MARKS.get(one.finish, "")
        rows.append(Row("model", ending(one), number >= gone, mark=mark))
        if one.recalled:
            lines = "\n".join(("quoted before this question:", *one.recalled))
            rows.append(Row("note", escape_markup(lines), number >= gone))
    if said and gone == len(said):
        rows.append(Row("note", "everything above has left the window", False))
    return rows


def ending(one: Message) -> str:
    """Return a reply, with a mark if it did not end on its own."""
    return visible(one.reply.rstrip()) + MARKS.get(one.finish, "")


class BlockView:
    """One block as a widget: a label or, for code, selectable text."""

    def __init__(self, block: Block, colours: Colours):
        self.is_code, self._lines, self._colour = block.kind == "code", "", ""
        margin = (3, INSET, 3, INSET + INDENT * block.indent)
        if self.is_code:
            style = Pack(margin=margin, font_family=MONOSPACE, background_color=colours.ground)
            self.widget = toga.MultilineTextInput(readonly=True, style=style)
        else:
            weight = BOLD if block.kind == "heading" else NORMAL
            slope = ITALIC if block.kind == "quote" else NORMAL
            style = Pack(margin=margin, font_weight=weight, font_style=slope)
            self.widget = toga.Label("", style=style)

    def show(self, lines: str, colour: str, width: float) -> None:
        if colour != self._colour:
            self._colour = self.widget.style.color = colour
        if lines == self._lines:
            return
        self._lines = lines
        if isinstance(self.widget, toga.Label):
            self.widget.text = escape_markup(lines)
        else:
            self.widget.value, self.widget.style.width = lines, round(width)
            self.widget.style.height = CODE_LINE * (lines.count("\n") + 1) + CODE_EDGE


class Bubble:
    """One row as widgets: the speaker's name and the time, and blocks on a coloured background."""

    def __init__(self, row: Row, colours: Colours):
        self.row, self._colours = row, colours
        self._views, self._blocks, self._shapes = list[BlockView](), list[Block](), list[Any]()
        mine, note = row.kind == "you", row.kind == "note"
        self._column = toga.Box(style=Pack(direction=COLUMN, margin=(0, 0, 6, 0)))
        parts: list[toga.Widget] = [self._column]
        if not note:
            colour = colours.accent if mine else colours.faded
            style = Pack(margin=(8, INSET, 0, INSET), font_weight=BOLD, font_size=10, color=colour)
            name = f"You  {row.time}".rstrip() if mine else "Model"
            parts.insert(0, toga.Label(name, style=style))
        ground = TRANSPARENT if note else colours.asked if mine else colours.answered
        box = toga.Box(children=parts, style=Pack(direction=COLUMN, background_color=ground))
        before = [toga.Box(style=Pack(flex=1))] if mine else []
        self.widget = toga.Box(children=[*before, box], style=Pack(direction=ROW, margin=(6, 12)))

    def show(self, row: Row, width: float, wrapped: Callable[[str, float, bool], str]) -> None:
        """Show a row; only the blocks that have changed are updated."""
        same = row.text == self.row.text and bool(self._views)
        blocks = self._blocks if same else row.blocks
        self.row, self._blocks = row, blocks
        shapes = [(block.kind, block.indent) for block in blocks]
        kept = 0
        while kept < min(len(shapes), len(self._views)) and shapes[kept] == self._shapes[kept]:
            kept += 1
        for view in self._views[kept:]:
            self._column.remove(view.widget)
        del self._views[kept:]
        for block in blocks[kept:]:
            self._views.append(BlockView(block, self._colours))
            self._column.add(self._views[-1].widget)
        self._shapes = shapes
        colour = self._colours.text if row.attended else self._colours.faded
        for view, block in zip(self._views, blocks, strict=True):
            room = width - INDENT * block.indent
            inside = room - CODE_EDGE if view.is_code else room
            view.show(wrapped(block.text, inside, view.is_code), colour, room)


class Transcript:
    """A column of bubbles; only those that have changed are updated."""

    def __init__(self, colours: Colours):
        self._colours, self._follows = colours, True
        self._column = toga.Box(style=Pack(direction=COLUMN, margin=(6, 4)))
        self.widget = toga.ScrollContainer(
            content=self._column,
            horizontal=False,
            on_scroll=self._on_scroll,  # type: ignore[arg-type]
            style=Pack(flex=1, background_color=colours.ground),
        )
        self._bubbles: list[Bubble] = []
        self._fonts = [toga.Font(name, SYSTEM_DEFAULT_FONT_SIZE) for name in (SYSTEM, MONOSPACE)]
        self._ruler = toga.Canvas()
        self._measure = lru_cache(20_000)(self._width_of)
        self.wrapped = lru_cache(4 * EXCHANGES_SHOWN)(self._wrap)

    @property
    def text(self) -> str:
        """Everything that is shown, as plain text."""
        return "\n\n".join(bubble.row.text for bubble in self._bubbles)

    def show(self, rows: Sequence[Row], width: float) -> None:
        """Show rows in a column of `width`; follow the end unless the user has scrolled away."""
        same = 0
        for bubble, row in zip(self._bubbles, rows, strict=False):
            if bubble.row.kind != row.kind:
                break
            same += 1
        for bubble in self._bubbles[same:]:
            self._column.remove(bubble.widget)
        del self._bubbles[same:]
        for row in rows[same:]:
            self._bubbles.append(Bubble(row, self._colours))
            self._column.add(self._bubbles[-1].widget)
        room = max(120, min(WIDEST, width - BESIDE)) - 2 * INSET
        for bubble, row in zip(self._bubbles, rows, strict=True):
            bubble.show(row, room, self.wrapped)
        if self._follows:
            self.to_the_end()

    def to_the_end(self) -> None:
        self._follows = True
        self.widget.vertical_position = self.widget.max_vertical_position

    def _on_scroll(self, where: toga.ScrollContainer, **_: object) -> None:
        end = where.max_vertical_position
        self._follows = where.vertical_position >= end - NEAR_THE_END

    def _wrap(self, text: str, width: float, is_code: bool = False) -> str:
        """Return text broken into lines of the given width."""
        return wrap(text, width, lambda part: self._measure(part, is_code))

    def _width_of(self, text: str, is_code: bool) -> float:
        if not text.strip():
            return (8.0 if is_code else 4.0) * len(text)
        return self._ruler.measure_text(text, self._fonts[is_code])[0]
