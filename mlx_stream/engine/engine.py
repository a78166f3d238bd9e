"""An engine: the handle of the one thread that computes, for any other thread to hold."""

import weakref
from collections.abc import Sequence
from pathlib import Path

from mlx_stream.chat.session import DEFAULT_MAX_TOKENS
from mlx_stream.engine.handle import OnEvict, OnToken, Session
from mlx_stream.engine.listener import Listener
from mlx_stream.engine.listener_stream import ListenerOptions
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import MlxStreamError, ValueRefused
from mlx_stream.sampling import Sampling

SECONDS_TO_CLOSE = 5.0
BACKLOG = 65_536


class Engine:
    """A model on a thread of its own, the only one of the process that touches MLX.

    Returns at once; the model is loaded on the thread. Every method may be called on any thread, a
    user interface's too: none waits but `wait` and `close`.

    Args:
        source, dtype, keep_quantized: see `mlx_stream.load`.
        memory_budget: bytes that weights and the streams of all sessions may take; by default,
            what the device recommends.
        queue_size: commands that may be waiting or in progress, replies included.

    Raises:
        ValueRefused: a number out of range.
        EngineClosed: another engine of this process is open.
    """

    def __init__(
        self,
        source: str | Path = "starter",
        memory_budget: int | None = None,
        queue_size: int = 64,
        dtype: str | None = None,
        keep_quantized: bool | None = None,
    ):
        if queue_size < 1 or (memory_budget is not None and memory_budget < 1):
            raise ValueRefused(
                "queue_size and memory_budget must be at least 1, not "
                f"{queue_size} and {memory_budget}"
            )
        self._host = ModelHost(source, memory_budget, dtype, keep_quantized)
        self._worker = Worker(self._host.load, self._host.leave, queue_size)
        weakref.finalize(self, self._worker.end).atexit = False

    @property
    def model_name(self) -> str:
        """The source it was made with."""
        return self._host.name

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self._worker.ready and not self._worker.closing

    @property
    def error(self) -> MlxStreamError | None:
        """Why the model could not be loaded."""
        return self._worker.error

    @property
    def notices(self) -> list[str]:
        """What was fetched or converted to load the model, in lines: a copy."""
        return [*self._host.notices]

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes in use by weights and streams, and the budget (0 until loading has begun)."""
        return self._host.budget.used, self._host.budget.limit

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the model is loaded.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds.
            EngineClosed: the engine was closed before.
            MlxStreamError: it cannot be loaded; see `mlx_stream.load`.
        """
        self._worker.wait(timeout)

    def session(
        self,
        system: str | None = None,
        window: int | None = None,
        sinks: int | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        evict: str | None = None,
        kv_bits: int | None = None,
        name: str | None = None,
        on_evict: OnEvict | None = None,
        on_token: OnToken | None = None,
    ) -> Session:
        """Begin a conversation; returns at once. What is wrong is raised on its first use.

        Args:
            system, window, sinks, sampling, max_tokens, stop, evict, kv_bits: see `ChatSession`.
            name: go on with the conversation saved under it, or begin it; each exchange is on disk
                before the next can be asked for.
            on_evict: called with the exchanges and the tokens that left...
            on_token: ...and with each piece, on the thread of whoever reads the reply.

        Raises:
            QueueFull: the engine has too much to do.
            EngineClosed: it is closed.
        """
        options = {
            "system": system,
            "window": window,
            "sinks": sinks,
            "evict": evict,
            "sampling": sampling,
            "max_tokens": max_tokens,
            "stop": stop,
            "kv_bits": kv_bits,
        }
        return Session(self._worker, self._host, options, name, on_evict, on_token, self)

    def listen(
        self,
        system: str | None = None,
        window: int | None = None,
        sinks: int | None = None,
        kv_bits: int | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        backlog: int = BACKLOG,
        on_evict: OnEvict | None = None,
        restore: str | Path | None = None,
    ) -> Listener:
        """Begin to listen; returns at once. What is wrong is raised on its first use.

        Args:
            system, window, sinks, kv_bits, sampling, max_tokens: see `ChatSession`; the last two
                for answers.
            backlog: characters that may wait to be read.
            on_evict: called with 0 and the tokens that left, on the thread of whoever feeds, asks,
                flushes or saves next.
            restore: go on with what `Listener.save` wrote there, if it is there and will do; a
                notice says why if it will not.

        Raises:
            QueueFull: the engine has too much to do.
            EngineClosed: it is closed.
        """
        place = None if restore is None else Path(restore).absolute()
        chosen = sampling or Sampling()
        options = ListenerOptions(system, window, sinks, kv_bits, chosen, max_tokens, place)
        return Listener(self._worker, self._host, options, backlog, on_evict, self)

    def close(self, timeout: float = SECONDS_TO_CLOSE) -> bool:
        """End replies, save what is saved, and let go of everything.

        Leaving the process does the same.

        Args:
            timeout: seconds to wait for that; it goes on also if it takes longer.

        Returns:
            Whether it is done.
        """
        self._worker.end()
        return self._worker.join(timeout)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
