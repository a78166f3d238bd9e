"""The window: what the desk says, as widgets, and what is clicked, as calls of the desk."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

import toga
from toga.constants import BOLD, CENTER, COLUMN, ROW
from toga.style.pack import Pack

from mlx_stream.chat import SessionSummary, plural
from mlx_stream_desktop.colours import DARK, LIGHT
from mlx_stream_desktop.controller import WINDOWS, ChatController
from mlx_stream_desktop.gauge import GaugeBar
from mlx_stream_desktop.text_layout import escape_markup
from mlx_stream_desktop.transcript import Transcript, rows_of

SIDEBAR, SMALLEST_COLUMN, MARGIN = 220, 320, 14
SIZE, TITLE = (980, 680), "mlx_stream"


class ChatWindow:
    """Everything in one window; `draw` brings it up to date and is cheap if nothing changed."""

    def __init__(self, desk: ChatController, redraw: Callable[[], None], dark: bool | None):
        self._desk, self._redraw = desk, redraw
        self._colours = DARK if dark else LIGHT
        self._filling, self._put = False, {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.conversations = toga.DetailedList(
            on_select=self._on_open, style=Pack(flex=1, width=SIDEBAR)
        )
        self.new = toga.Button("New conversation", on_press=self.begin, style=Pack(margin=8))
        self.model = toga.Selection(on_change=self._on_model, style=Pack(flex=1))
        self.window = toga.Selection(on_change=self._on_window, style=Pack(width=110))
        self.transcript = Transcript(self._colours)
        self.gauge = GaugeBar(self._colours, self.transcript.in_lines)
        self.notice = toga.Label("", style=Pack(margin=(4, 14)))
        self.question = toga.TextInput(
            placeholder="Ask something, then press Enter",
            on_confirm=self._on_send,
            style=Pack(flex=1),
        )
        self.send = toga.Button("Send", on_press=self._on_send, style=Pack(width=72, margin_left=8))
        self.stop = toga.Button(
            "Stop", on_press=self._on_stop, style=Pack(width=72, margin_left=8), enabled=False
        )
        self.main = toga.MainWindow(title=TITLE, size=SIZE, on_resize=self._on_resize)
        self.main.content = self._layout()

    def _layout(self) -> toga.Box:
        beside = Pack(margin=(0, 6, 0, 0))
        pickers = toga.Box(
            children=[
                toga.Label("Model", style=beside),
                self.model,
                toga.Label("Window", style=Pack(margin=(0, 6, 0, 14))),
                self.window,
            ],
            style=Pack(direction=ROW, align_items=CENTER, margin=(8, 14)),
        )
        typing = toga.Box(
            children=[self.question, self.send, self.stop],
            style=Pack(direction=ROW, align_items=CENTER, margin=(4, 14, 6, 14)),
        )
        side = toga.Box(
            children=[
                self.new,
                toga.Label("Saved", style=Pack(font_weight=BOLD, margin=(4, 10))),
                self.conversations,
            ],
            style=Pack(direction=COLUMN, width=SIDEBAR),
        )
        talk = toga.Box(
            children=[
                pickers,
                toga.Divider(),
                self.transcript.widget,
                toga.Divider(),
                self.notice,
                typing,
                self.gauge.widget,
            ],
            style=Pack(direction=COLUMN, flex=1),
        )
        return toga.Box(
            children=[side, toga.Divider(direction=toga.Divider.VERTICAL), talk],
            style=Pack(direction=ROW),
        )

    # --- what the desk says ---

    @property
    def column(self) -> float:
        """The width the conversation has, in pixels."""
        return max(SMALLEST_COLUMN, self.main.size.width - SIDEBAR)

    def draw(self) -> None:
        """Show what has changed."""
        desk, status = self._desk, self._desk.status
        self._filling = True
        try:
            self._fill_pickers()
            self._fill_conversations()
        finally:
            self._filling = False
        rows = rows_of(desk.said, desk.attended, desk.name)
        self.transcript.show(rows, self.column)
        self.gauge.show(desk.gauge)
        notice = self.transcript.in_lines(escape_markup(status.notice), self.column - 2 * MARGIN)
        if self._differs("notice", (notice, status.alarming)):
            self.notice.style.color = (
                self._colours.alarm if status.alarming else self._colours.faded
            )
            self.notice.text = notice
        if desk.draft and not self.question.value:
            self.question.value, desk.draft = desk.draft, ""
        if self._differs("phase", status.phase):
            self.send.enabled, self.stop.enabled = status.idle, status.can_stop
            for widget in (self.new, self.model, self.window):
                widget.enabled = status.can_choose

    def _fill_pickers(self) -> None:
        desk = self._desk
        models = sorted({*desk.models, desk.model})
        windows = [f"{w:,}" for w in sorted({*WINDOWS, desk.window})]
        for picker, items, chosen in (
            (self.model, models, desk.model),
            (self.window, windows, f"{desk.window:,}"),
        ):
            if self._differs(picker, items):
                picker.items = items
            if picker.value != chosen:
                picker.value = chosen

    def _fill_conversations(self) -> None:
        rows = [with_title(one, one.name == self._desk.name) for one in self._desk.conversations]
        if self._differs("conversations", rows):
            self.conversations.data = rows

    def _differs(self, what: Hashable, now: object) -> bool:
        """Return whether `what` is shown otherwise; then it is put right by whoever asked."""
        before, self._put[what] = self._put.get(what), now
        return before != now

    # --- what is clicked ---

    # Of one that is called while the window is filled, nothing was clicked: so they look at once.

    def _on_send(self, *_: object, **__: object) -> None:
        text = self.question.value
        if self._desk.status.idle and text.strip():
            self.question.value = ""
            self.transcript.to_the_end()
            self._go(self._desk.send(text))

    def _on_stop(self, *_: object, **__: object) -> None:
        self._desk.stop()

    def begin(self, *_: object, **__: object) -> None:
        """Begin a new conversation."""
        self._go(self._desk.begin())
        self.question.focus()

    def _on_open(self, *_: object, **__: object) -> None:
        row = self.conversations.selection
        if row is not None and not self._filling:
            self._go(self._desk.open(row.name))  # type: ignore[attr-defined]

    def _on_model(self, *_: object, **__: object) -> None:
        if not self._filling and self.model.value:
            self._go(self._desk.choose_model(str(self.model.value)))

    def _on_window(self, *_: object, **__: object) -> None:
        if not self._filling and self.window.value:
            self._go(self._desk.choose_window(int(str(self.window.value).replace(",", ""))))

    def _go(self, doing: Coroutine[Any, Any, None]) -> None:
        """Have it done; a fault of ours in it is heard of."""
        task = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._on_close)

    def _on_close(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        task.result()

    def _on_resize(self, *_: object, **__: object) -> None:
        self._redraw()


def with_title(one: SessionSummary, is_open: bool) -> dict[str, str]:
    """Return a saved conversation as a row of the list."""
    about = f"{plural(one.exchanges)}, {one.used[:10]}" if one.header else "cannot be opened"
    title = f"\N{BULLET} {one.name}" if is_open else one.name
    return {"title": title, "subtitle": about, "name": one.name}
