"""How tests drive the desktop app: its controller alone, and its window on the dummy backend."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

# One of the installed backends; read when the first widget is made.
os.environ["TOGA_BACKEND"] = "toga_dummy"

from toga_dummy.utils import EventLog

from mlx_stream import Sampling
from mlx_stream.engine import Session
from mlx_stream_desktop.app import Desktop
from mlx_stream_desktop.controller import ChatController
from tests.fakes.shell import DEADLINE

GREEDY = Sampling(temperature=0)


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that is a coroutine."""
    return wraps(test)(lambda *args, **more: asyncio.run(test(*args, **more)))


async def until(so: Callable[[], object]) -> None:
    """Run the event loop until a condition holds."""
    async with asyncio.timeout(DEADLINE):
        while not so():
            await asyncio.sleep(0.01)


def chat_of(one: ChatController) -> Session:
    assert one._session.chat
    return one._session.chat


@asynccontextmanager
async def open_controller(
    model: Path | str, window: int = 100, max_tokens: int = 40
) -> AsyncIterator[ChatController]:
    """Yield a controller that has loaded its model."""
    one = ChatController(lambda: None, str(model), window, GREEDY, max_tokens)
    await one.start()
    try:
        yield one
    finally:
        await one.close()


@asynccontextmanager
async def app(
    model: Path | str, window: int = 100, max_tokens: int = 40, status_icon: bool = False
) -> AsyncIterator[Any]:
    """Yield the application, its model loaded and its window drawn."""
    one = Desktop(str(model), window, GREEDY, max_tokens, status_icon)
    try:
        await settled(one)
        yield one
    finally:
        one.request_exit()
        await until(lambda: has_left(one))


def has_left(one: Desktop) -> bool:
    """Return whether the application has ended, as after Quit."""
    events = (entry for entry in EventLog._log if entry.instance is one._impl)
    return any(entry.context.get("action") == "exit" for entry in events)


async def asked(one: Desktop, question: str) -> None:
    """Type a question and press Send; return once the reply has begun."""
    before = len(one.controller.said)
    one.view.question.value = question
    one.view.send._impl.simulate_press()
    await until(lambda: one.controller.status.can_stop or len(one.controller.said) > before)


async def answered(one: Desktop, question: str) -> None:
    """Type a question, press Send, and wait for the end of the reply."""
    await asked(one, question)
    await settled(one)


def shows(one: Desktop) -> bool:
    """Return whether the window has caught up with the controller."""
    status, view = one.controller.status, one.view
    buttons = (view.send.enabled, view.stop.enabled)
    return not one._draw_soon._waits and buttons == (status.idle, status.can_stop)


async def settled(one: Desktop) -> None:
    """Wait until the effect of every click is complete and visible in the window."""
    await until(lambda: one.controller.status.can_choose and not one.view._tasks and shows(one))
