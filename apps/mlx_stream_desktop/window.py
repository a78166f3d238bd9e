"""The window: shows the controller's state in widgets, and turns clicks into calls to it."""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

import toga
from toga.constants import BOLD, CENTER, COLUMN, ROW
from toga.style.pack import Pack

from mlx_stream.chat import SessionSummary, plural
from mlx_stream_desktop.colours import DARK, LIGHT
from mlx_stream_desktop.controller import WINDOWS, ChatController
from mlx_stream_desktop.gauge import GaugeBar
from mlx_stream_desktop.history import clock, title_of
from mlx_stream_desktop.text_layout import escape_markup, visible
from mlx_stream_desktop.transcript import Transcript, rows_of

SIDEBAR, SMALLEST_COLUMN, MARGIN = 220, 320, 14
QUESTION = 64  # pixels
SIZE, TITLE = (980, 680), "mlx_stream"


class ChatWindow:
    """All widgets in one window; `draw` updates them and is cheap if nothing has changed."""

    def __init__(self, controller: ChatController, redraw: Callable[[], None], dark: bool | None):
        self._controller = controller
        self._colours = DARK if dark else LIGHT
        self._filling, self._shown = False, {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.conversations = toga.DetailedList(
            on_select=self._on_open, style=Pack(flex=1, width=SIDEBAR)
        )
        self.new = toga.Button("New conversation", on_press=self.begin, style=Pack(margin=8))
        self.search = toga.TextInput(
            placeholder="Search", on_confirm=self._on_search, style=Pack(margin=(0, 8, 4, 8))
        )
        self.model = toga.Selection(on_change=self._on_model, style=Pack(flex=1))
        self.window = toga.Selection(on_change=self._on_window, style=Pack(width=110))
        self.transcript = Transcript(self._colours)
        self.gauge = GaugeBar(self._colours, self.transcript.wrapped)
        self.notice = toga.Label("", style=Pack(margin=(4, 14)))
        key = "Cmd" if sys.platform == "darwin" else "Ctrl"
        self.question = toga.MultilineTextInput(
            placeholder=f"Ask something; {key}-Enter sends", style=Pack(flex=1, height=QUESTION)
        )
        self.title = toga.TextInput(
            placeholder="A new conversation", on_confirm=self._on_rename, style=Pack(flex=1)
        )
        self.remove = toga.Button("Delete", on_press=self._on_delete, style=Pack(margin_left=8))
        button = Pack(width=72, margin_left=8)
        self.send = toga.Button("Send", on_press=self.ask, style=button)
        self.stop = toga.Button("Stop", on_press=self._on_stop, style=button, enabled=False)
        self.main = toga.MainWindow(title=TITLE, size=SIZE, on_resize=lambda *_, **__: redraw())
        self.main.content = self._layout()

    def _layout(self) -> toga.Box:
        pickers = toga.Box(
            children=[
                toga.Label("Model", style=Pack(margin=(0, 6, 0, 0))),
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
        saved = toga.Label("Saved", style=Pack(font_weight=BOLD, margin=(4, 10)))
        side = toga.Box(
            children=[self.new, saved, self.search, self.conversations],
            style=Pack(direction=COLUMN, width=SIDEBAR),
        )
        named = toga.Box(
            children=[self.title, self.remove],
            style=Pack(direction=ROW, align_items=CENTER, margin=(0, 14, 8, 14)),
        )
        line, transcript, gauge = toga.Divider(), self.transcript.widget, self.gauge.widget
        talk = toga.Box(
            children=[pickers, named, line, transcript, toga.Divider(), self.notice, typing, gauge],
            style=Pack(direction=COLUMN, flex=1),
        )
        return toga.Box(
            children=[side, toga.Divider(direction=toga.Divider.VERTICAL), talk],
            style=Pack(direction=ROW),
        )

    # --- what is shown ---

    @property
    def column(self) -> float:
        """The width of the conversation, in pixels."""
        return max(SMALLEST_COLUMN, self.main.size.width - SIDEBAR)

    def draw(self) -> None:
        """Show what has changed."""
        controller, status, colours = self._controller, self._controller.status, self._colours
        self._filling = True
        try:
            self._fill_pickers()
            self._fill_conversations()
        finally:
            self._filling = False
        rows = rows_of(controller.said, controller.attended, controller.name)
        self.transcript.show(rows, self.column)
        self.gauge.show(controller.gauge)
        notice = self.transcript.wrapped(
            escape_markup(visible(status.notice)), self.column - 2 * MARGIN
        )
        if self._differs("notice", (notice, status.alarming)):
            self.notice.style.color = colours.alarm if status.alarming else colours.faded
            self.notice.text = notice
        if controller.draft and not self.question.value:
            self.question.value, controller.draft = controller.draft, ""
        if self._differs("name", (controller.name, controller.lists.conversations)):
            summary = controller.lists.summary(controller.name)
            self.title.value = title_of(summary) if summary else controller.name or ""
        if self._differs("phase", (status.phase, controller.name)):
            can_change = status.idle and controller.name is not None
            self.title.enabled = self.remove.enabled = can_change
            self.send.enabled, self.stop.enabled = status.idle, status.can_stop
            for widget in (self.new, self.model, self.window):
                widget.enabled = status.can_choose

    def _fill_pickers(self) -> None:
        controller = self._controller
        models = sorted({*controller.lists.models, controller.model})
        windows = [f"{w:,}" for w in sorted({*WINDOWS, controller.window})]
        for picker, items, chosen in (
            (self.model, models, controller.model),
            (self.window, windows, f"{controller.window:,}"),
        ):
            if self._differs(picker, items):
                picker.items = items
            if picker.value != chosen:
                picker.value = chosen

    def _fill_conversations(self) -> None:
        rows = [
            with_title(one, one.name == self._controller.name)
            for one in self._controller.lists.conversations
        ]
        if self._differs("conversations", rows):
            self.conversations.data = rows

    def _differs(self, what: Hashable, now: object) -> bool:
        """Return whether `what` has changed since it was last shown; the caller then shows it."""
        before, self._shown[what] = self._shown.get(what), now
        return before != now

    # --- what is clicked ---

    # Toga also calls these when `draw` fills a widget; `_filling` is then set.

    def _on_rename(self, *_: object, **__: object) -> None:
        if not self._filling:
            self._start(self._controller.rename(self.title.value))

    def _on_delete(self, *_: object, **__: object) -> None:
        self._start(self._delete())

    async def _delete(self) -> None:
        question = f"Remove {self.title.value!r} for good, with its text and its state?"
        if await self.main.dialog(toga.ConfirmDialog("Delete this conversation", question)):
            await self._controller.delete()

    def ask(self, *_: object, **__: object) -> None:
        """Send the typed text."""
        text = self.question.value
        if self._controller.status.idle and text.strip():
            self.question.value = ""
            self.transcript.to_the_end()
            self._start(self._controller.send(text))

    def _on_stop(self, *_: object, **__: object) -> None:
        self._controller.stop()

    def begin(self, *_: object, **__: object) -> None:
        """Start a new conversation."""
        self._start(self._controller.begin())
        self.question.focus()

    def _on_open(self, *_: object, **__: object) -> None:
        row = self.conversations.selection
        if row is not None and not self._filling:
            self._start(self._controller.open(row.name))  # type: ignore[attr-defined]

    def _on_search(self, *_: object, **__: object) -> None:
        self._start(self._controller.lists.search(self.search.value))

    def _on_model(self, *_: object, **__: object) -> None:
        if not self._filling and self.model.value:
            self._start(self._controller.choose_model(str(self.model.value)))

    def _on_window(self, *_: object, **__: object) -> None:
        if not self._filling and self.window.value:
            self._start(
                self._controller.choose_window(int(str(self.window.value).replace(",", "")))
            )

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background; the event loop reports its exceptions."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        task.result()


def with_title(one: SessionSummary, is_open: bool) -> dict[str, str]:
    """Return a saved conversation as a row in the list."""
    about = f"{plural(one.exchanges)}, {clock(one.used)}" if one.header else "cannot be opened"
    title = f"\N{BULLET} {title_of(one)}" if is_open else title_of(one)
    return {"title": title, "subtitle": about, "name": one.name}
