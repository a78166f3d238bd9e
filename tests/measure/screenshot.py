"""Drives the desktop app as an offscreen window: asks, looks, stops. Also used by a test.

    QT_QPA_PLATFORM=offscreen TOGA_BACKEND=toga_qt \\
        python -m tests.measure.screenshot [--dark] MODEL FOLDER QUESTION...

Writes FOLDER/large.png while the last reply streams, and FOLDER/small.png, of a smaller window,
when the reply has ended; prints a line of JSON with what was shown.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_stream import Sampling
from mlx_stream_desktop.app import Desktop
from mlx_stream_desktop.transcript import ending

WINDOW, MAX_TOKENS, SIZE, SMALL = 124, 48, (900, 640), (640, 420)


class Seen(Desktop):
    """The application, driven by a script."""

    def __init__(self, model: str, folder: Path, questions: list[str], is_dark: bool):
        self._folder, self._questions, self._is_dark = folder, questions, is_dark
        super().__init__(model, WINDOW, Sampling(temperature=0), MAX_TOKENS, status_icon=False)

    @property
    def dark_mode(self) -> bool:
        return self._is_dark

    def startup(self) -> None:
        if self._is_dark:  # off screen, no desktop makes the widgets dark
            from PySide6.QtWidgets import QApplication

            style = dark_style()
            QApplication.setStyle(style)
            QApplication.setPalette(style.standardPalette())
        super().startup()

    async def on_running(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            print(json.dumps(await self._used()), flush=True)
        finally:
            self.request_exit()

    async def _used(self) -> dict[str, Any]:
        self.view.main.size = SIZE
        await self.controller.start()
        for count, question in enumerate(self._questions, 1):
            await self._until(lambda: self.controller.status.idle and self.view.send.enabled)
            self.view.question.value = question
            self.view.send._impl.native.click()
            await self._until(lambda count=count: len(self.controller.said) == count)
        await self._until(lambda: len(self._last()) > 40)
        await self._until(lambda: self._last()[:20] in self._shown())
        self._draw(self._folder / "large.png")
        self.controller.stop()
        await self._until(lambda: self.controller.status.idle)
        self.view.main.size = SMALL
        await self._until(lambda: self._shown().endswith(ending(self.controller.said[-1])))
        self._draw(self._folder / "small.png")
        return {
            "shown": self._shown(),
            "gauge": self.view.gauge.text,
            "listed": [row.title for row in self.view.conversations.data],  # type: ignore[attr-defined]
            "notice": self.view.notice.text,
        }

    def _last(self) -> str:
        return self.controller.said[-1].reply

    def _shown(self) -> str:
        return self.view.transcript.text

    async def _until(self, so: Callable[[], object]) -> None:
        while not so():
            await asyncio.sleep(0.02)

    def _draw(self, path: Path) -> None:
        self.view.draw()
        path.write_bytes(self.view.main.as_image().data)


def dark_style() -> Any:
    """Return a style whose palette, which Toga gives to each widget, is dark."""
    from PySide6.QtGui import QColor, QPalette
    from PySide6.QtWidgets import QProxyStyle

    roles, palette = QPalette.ColorRole, QPalette(QColor("#3a3a3e"), QColor("#2a2a2c"))
    for role in (roles.WindowText, roles.Text, roles.ButtonText):
        palette.setColor(role, QColor("#e8e8ea"))
    for role in (roles.Base, roles.AlternateBase):
        palette.setColor(role, QColor("#1e1e20"))

    class DarkStyle(QProxyStyle):
        def standardPalette(self) -> QPalette:
            return palette

    return DarkStyle("Fusion")


if __name__ == "__main__":
    model, folder, *questions = [word for word in sys.argv[1:] if word != "--dark"]
    Seen(model, Path(folder), questions, "--dark" in sys.argv).main_loop()
