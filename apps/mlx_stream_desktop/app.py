"""The application: its window, its menus, and on a Mac an icon in the menu bar."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import toga
from toga.style.pack import Pack

import mlx_stream
from mlx_stream.hub import STARTER
from mlx_stream.program.exits import fail
from mlx_stream_desktop.controller import DEFAULT_WINDOW, MAX_TOKENS, ChatController
from mlx_stream_desktop.history import Message
from mlx_stream_desktop.throttle import Throttle
from mlx_stream_desktop.window import ChatWindow

NAME, ID = "mlx_stream", "io.github.mlx-stream.desktop"


class Desktop(toga.App):
    """The application, with one window.

    Args:
        model, window: the initial model and window size.
        sampling, max_tokens: settings for each reply.
        status_icon: put an icon in the menu bar; closing the window then leaves the app running.
    """

    def __init__(
        self,
        model: str = STARTER,
        window: int = DEFAULT_WINDOW,
        sampling: mlx_stream.Sampling | None = None,
        max_tokens: int = MAX_TOKENS,
        status_icon: bool = sys.platform == "darwin",
    ):
        self._has_icon = status_icon
        self.controller = ChatController(self.changed, model, window, sampling, max_tokens)
        super().__init__(NAME, ID, app_name="mlx_stream_desktop")

    def startup(self) -> None:
        self.view = ChatWindow(self.controller, self.changed, self.dark_mode)
        self._draw_soon = Throttle(self.view.draw, self.loop)
        self.main_window = self.view.main
        self.commands.add(
            command("Send", self.view.ask, shortcut=toga.Key.MOD_1 + toga.Key.ENTER),
            command("New conversation", self.view.begin, shortcut=toga.Key.MOD_1 + "n"),
            command("Stop the reply", self.controller.stop, shortcut=toga.Key.MOD_1 + "."),
            command("Conversation as text", self._show_text, shortcut=toga.Key.MOD_1 + "t"),
        )
        if self._has_icon:
            icon = toga.MenuStatusIcon(text=NAME)
            self.status_icons.add(icon)
            self.status_icons.commands.add(
                command("Show window", self.view.main.show, group=icon),
                command("Stop the reply", self.controller.stop, group=icon),
            )
            self.view.main.on_close = self._hide
        self.view.main.show()

    # Toga awaits what its handlers return, but declares them as if it did not.
    async def on_running(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        await self.controller.start()

    async def on_exit(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        await self.controller.close()
        return True

    def changed(self) -> None:
        """Schedule a redraw of the window."""
        self._draw_soon()

    def _show_text(self) -> None:
        """Show the conversation as text that can be selected and copied."""
        window = toga.Window(title=self.controller.name or NAME, size=(640, 560))
        window.content = toga.MultilineTextInput(
            value=as_text(self.controller.said), readonly=True, style=Pack(flex=1)
        )
        window.show()

    def _hide(self, *_: object, **__: object) -> bool:
        """Hide the window and let the reply continue; the icon's menu shows the window again."""
        self.view.main.hide()
        return False


def command(text: str, action: Callable[[], object], **options: Any) -> toga.Command:
    def act(command: toga.Command, **_: object) -> bool:
        action()
        return True

    return toga.Command(act, text, **options)


def as_text(said: Sequence[Message]) -> str:
    return "\n\n".join(f"You:\n{one.question}\n\nModel:\n{one.reply}" for one in said)


def check_display() -> None:
    """Exit with a one-line message if there is no display; Qt would abort the process."""
    names = "DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"
    if sys.platform == "linux" and not any(map(os.environ.get, names)):
        fail("there is no display to show a window on; `mlx_stream chat` works without one")


def main(
    arguments: Sequence[str] | None = None, program: str = "python -m mlx_stream_desktop"
) -> None:
    """Open the window; `program` is the name that the help shows."""
    parser = argparse.ArgumentParser(prog=program, description="Chat with a model in a window.")
    model = "A folder, a Hub id, a .gguf file, or starter, which is the default."
    window = f"Number of recent tokens to attend to. Default: {DEFAULT_WINDOW:,}."
    parser.add_argument("model", nargs="?", default=STARTER, metavar="MODEL", help=model)
    parser.add_argument("--window", type=int, default=DEFAULT_WINDOW, metavar="TOKENS", help=window)
    given = parser.parse_args(arguments)
    check_display()
    try:
        app = Desktop(given.model, given.window)
    except ImportError as error:  # Toga imports its GUI backend, which needs system libraries
        fail(f"the window cannot be drawn: {error}; on Linux, install the libraries that Qt needs")
    app.main_loop()
