"""A completion of one text, without turns, on the engine's thread."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx_stream.chat.session import Progress
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.session_worker import ReadProgress
from mlx_stream.engine.task import Work
from mlx_stream.generate.completion import stream_steps
from mlx_stream.generate.stats import Stats
from mlx_stream.sampling import Sampling


@dataclass(frozen=True)
class TextOptions:
    """A text to continue; see `mlx_stream.stream`."""

    prompt: str
    max_tokens: int
    sampling: Sampling | None = None
    stop: Sequence[str] = ()
    sinks: int | None = None
    window: int | None = None
    kv_bits: int | None = None
    bias: Any = None
    logprobs: int | None = None


class TextWorker:
    """One text on a stream of its own; see `StreamOwner`."""

    def __init__(self, host: ModelHost, options: TextOptions, shared: bool):
        self.host, self.options, self.shared = host, options, shared
        self.key, self.stats = object(), Stats()
        self.evicted: tuple[int, int] = (0, 0)
        self.usable = True

    def open(self) -> Work:
        yield from ()

    def write(self, progress: Progress | None) -> Work:
        """Return the text's coroutine, which yields progress, then pieces."""
        waiting = deque[ReadProgress]()
        tell = partial(ReadProgress, progress) if progress else None
        steps = stream_steps(
            self.host.model_for(self.key),
            stats=self.stats,
            progress=tell and (lambda *counts: waiting.append(tell(*counts))),
            **vars(self.options),
        )
        self.options, result = replace(self.options, prompt=""), None  # it may be long
        try:
            while True:
                item = steps.send(result)
                while waiting:
                    yield waiting.popleft()
                result = yield item
        except StopIteration:
            return
        finally:
            steps.close()

    def update(self, task_ended: bool) -> Stats | None:
        return self.stats

    def waiting(self) -> bool:
        return False

    def step(self) -> None:
        """Do nothing: a text has no background work."""

    def close(self) -> None:
        self.usable = False
        self.host.budget.set_stream(self.key, 0)
