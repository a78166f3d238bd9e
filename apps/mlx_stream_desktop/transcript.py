"""The conversation as bubbles in a scrolling column; depends on Toga, not on the engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import toga
from toga.constants import BOLD, COLUMN, ROW, SYSTEM, TRANSPARENT
from toga.fonts import SYSTEM_DEFAULT_FONT_SIZE
from toga.style.pack import Pack

from mlx_stream.chat import plural
from mlx_stream_desktop.colours import Colours
from mlx_stream_desktop.history import Message
from mlx_stream_desktop.text_layout import escape_markup, wrap

EXCHANGES_SHOWN = 20
WIDEST, INSET, BESIDE = 640, 12, 60
NEAR_THE_END = 40
MARKS = {None: " \N{HORIZONTAL ELLIPSIS}", "interrupted": " [stopped]", "length": " [cut]"}


@dataclass(frozen=True)
class Row:
    """A bubble ("you", "model"), or a remark between bubbles ("note")."""

    kind: str
    text: str
    attended: bool = True


def rows_of(said: Sequence[Message], attended: int, name: str | None) -> list[Row]:
    """Return what is shown: the latest exchanges, and where attention begins."""
    first, gone = max(0, len(said) - EXCHANGES_SHOWN), len(said) - attended
    rows = []
    if first:
        rows.append(Row("note", f"{first:,} earlier: mlx_stream sessions show {name}", False))
    for number, one in enumerate(said[first:], first):
        if number == gone and gone:
            note = f"{plural(gone)} above left the window and are not attended"
            rows.append(Row("note", note, False))
        rows.append(Row("you", escape_markup(one.question), number >= gone))
        rows.append(Row("model", ending(one), number >= gone))
        if one.recalled:
            lines = "\n".join(("quoted before this question:", *one.recalled))
            rows.append(Row("note", escape_markup(lines), number >= gone))
    if said and gone == len(said):
        rows.append(Row("note", "all of the above left the window and are not attended", False))
    return rows


def ending(one: Message) -> str:
    """Return a reply with a mark if it did not end by itself."""
    return escape_markup(one.reply.rstrip()) + MARKS.get(one.finish, "")


class Bubble:
    """One row as widgets: the speaker's name, and text on a coloured background."""

    def __init__(self, row: Row, colours: Colours):
        self.row, self._lines, self._colour = row, "", ""
        mine, note = row.kind == "you", row.kind == "note"
        self.body = toga.Label("", style=Pack(margin=(2 if not note else 0, INSET, 8, INSET)))
        parts: list[toga.Widget] = [self.body]
        if not note:
            colour = colours.accent if mine else colours.faded
            style = Pack(margin=(8, INSET, 0, INSET), font_weight=BOLD, font_size=10, color=colour)
            parts.insert(0, toga.Label("You" if mine else "Model", style=style))
        ground = TRANSPARENT if note else colours.asked if mine else colours.answered
        box = toga.Box(children=parts, style=Pack(direction=COLUMN, background_color=ground))
        before = [toga.Box(style=Pack(flex=1))] if mine else []
        self.widget = toga.Box(children=[*before, box], style=Pack(direction=ROW, margin=(6, 12)))

    def show(self, row: Row, lines: str, colours: Colours) -> None:
        self.row = row
        colour = colours.text if row.attended else colours.faded
        if colour != self._colour:
            self._colour = self.body.style.color = colour
        if lines != self._lines:
            self._lines = self.body.text = lines


class Transcript:
    """A column of bubbles, of which only those that have changed are touched."""

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
        self._font = toga.Font(SYSTEM, SYSTEM_DEFAULT_FONT_SIZE)
        self._ruler = toga.Canvas()
        self._measure = lru_cache(20_000)(self._width_of)
        self.wrapped = lru_cache(4 * EXCHANGES_SHOWN)(self._wrap)

    @property
    def text(self) -> str:
        """All that is shown, as plain text."""
        return "\n\n".join(bubble.row.text for bubble in self._bubbles)

    def show(self, rows: Sequence[Row], width: float) -> None:
        """Show rows in a column of `width`; follow the end unless the user scrolled away."""
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
            bubble.show(row, self.wrapped(row.text, room), self._colours)
        if self._follows:
            self.to_the_end()

    def to_the_end(self) -> None:
        self._follows = True
        self.widget.vertical_position = self.widget.max_vertical_position

    def _on_scroll(self, where: toga.ScrollContainer, **_: object) -> None:
        end = where.max_vertical_position
        self._follows = where.vertical_position >= end - NEAR_THE_END

    def _wrap(self, text: str, width: float) -> str:
        """Return a text broken into lines of a width."""
        return wrap(text, width, self._measure)

    def _width_of(self, text: str) -> float:
        return self._ruler.measure_text(text, self._font)[0] if text.strip() else 4.0 * len(text)
