"""What tests of the engine share: engines on tiny models, and the results that they must equal."""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx_stream
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import said

GREEDY = Sampling(temperature=0)
DEADLINE = 60.0
LONG = "and the man of the house " * 60  # several steps of a prompt


def engine_of(folder: Path, **options: Any) -> mlx_stream.Engine:
    return mlx_stream.Engine(folder, dtype="float32", keep_quantized=False, **options)


def alone(folder: Path, questions: Iterable[str], **options: Any) -> tuple[list[str], list[Any]]:
    """Return the replies and the exchanges of a separate session on this thread."""
    model = mlx_stream.load(folder, dtype="float32", keep_quantized=False)
    chat = mlx_stream.ChatSession(model, sampling=GREEDY, **options)
    return [said(chat.reply(question)) for question in questions], chat.exchanges


def together(*tasks: Callable[[], None]) -> None:
    """Run each task on its own thread, to the end; raise what one of them raises."""
    raised: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "a deadlock"
    if raised:
        raise raised[0]


def eventually(holds: Callable[[], object]) -> None:
    """Wait until a condition holds; fail if it never does."""
    until = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.001)
