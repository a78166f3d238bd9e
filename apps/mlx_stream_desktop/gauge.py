"""A bar that shows the pinned tokens, the latest ones and the free space; depends only on Toga.

It is drawn, not laid out: it changes with every token, and each layout would move the whole window.
"""

from collections.abc import Callable

import toga
from toga.constants import SYSTEM, Baseline
from toga.fonts import SYSTEM_DEFAULT_FONT_SIZE
from toga.style.pack import Pack

from mlx_stream_desktop.colours import Colours
from mlx_stream_desktop.model_session import Gauge

BAR, LINE = 8, 18


class GaugeBar:
    """The bar with its numbers below; `wrapped` breaks text into lines of a given width."""

    def __init__(self, colours: Colours, wrapped: Callable[[str, float], str]):
        self._colours, self._wrapped = colours, wrapped
        self.now, self._width = Gauge(), 0.0
        self._font = toga.Font(SYSTEM, SYSTEM_DEFAULT_FONT_SIZE)
        self.widget = toga.Canvas(
            style=Pack(height=BAR + 2 * LINE, margin=(2, 14, 4, 14)), on_resize=self._on_resize
        )
        self._draw()

    @property
    def text(self) -> str:
        return str(self.now)

    @property
    def shares(self) -> tuple[int, int, int]:
        """The tokens that are never evicted, the other attended ones, and the free space."""
        now = self.now
        return now.pinned, now.attended - now.pinned, max(0, now.capacity - now.attended)

    def show(self, gauge: Gauge) -> None:
        if gauge != self.now:
            self.now = gauge
            self._draw()

    def _on_resize(self, widget: toga.Canvas, width: float, height: float, **_: object) -> None:
        self._width = width
        self._draw()

    def _draw(self) -> None:
        canvas, colours = self.widget, self._colours
        canvas.root_state.drawing_actions.clear()
        shares = self.shares if self.now.capacity else (0, 0, 1)
        left, per_token = 0.0, self._width / max(1, sum(shares))
        for share, ground in zip(
            shares, (colours.pinned, colours.ring, colours.track), strict=True
        ):
            with canvas.fill(fill_style=ground):
                canvas.rect(left, 0, share * per_token, BAR)
            left += share * per_token
        canvas.fill_style = colours.text
        text = self._wrapped(self.text, self._width)
        canvas.fill_text(text, 0, BAR + 5, font=self._font, baseline=Baseline.TOP)
        canvas.redraw()
