"""A bar of what is attended, for good and of the latest, and what is free; knows Toga only."""

import toga
from desktop.colours import Colours
from desktop.desk import Gauge
from toga.style.pack import CENTER, COLUMN, ROW, Pack

HEIGHT = 8


class GaugeBar:
    """The bar, and under it the same in words and numbers."""

    def __init__(self, colours: Colours):
        self._now: Gauge | None = None
        self._parts = [
            toga.Box(style=Pack(flex=0, height=HEIGHT, background_color=colour))
            for colour in (colours.pinned, colours.ring, colours.track)
        ]
        self._label = toga.Label("", style=Pack(font_size=10, margin_top=4))
        bar = toga.Box(children=self._parts, style=Pack(direction=ROW, align_items=CENTER))
        self.widget = toga.Box(
            children=[bar, self._label], style=Pack(direction=COLUMN, margin=(2, 14, 10, 14))
        )
        self.show(Gauge())

    @property
    def shares(self) -> list[float]:
        """What of the bar is attended for good, attended, and free; in tokens."""
        return [part.style.flex for part in self._parts]

    @property
    def text(self) -> str:
        return self._label.text

    def show(self, gauge: Gauge) -> None:
        if gauge == self._now:
            return
        self._now = gauge
        pinned = min(gauge.pinned, gauge.attended)
        free = max(0, gauge.capacity - gauge.attended)
        shares = (pinned, gauge.attended - pinned, free if gauge.capacity else 1)
        for part, share in zip(self._parts, shares, strict=True):
            part.style.flex = share
        self._label.text = str(gauge)
