"""The server's model: loading it, unloading it while idle, its names; independent of HTTP.

The engine's thread loads the model, so requests are answered from the first second, with 503 until
it is loaded.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_stream.engine.engine import Engine
from mlx_stream.engine.handle import EngineReplyOptions
from mlx_stream.errors import EngineClosed, MlxStreamError, QueueFull, ValueRefused, one_line
from mlx_stream.server.api_errors import ApiError
from mlx_stream.server.conversation import Conversation
from mlx_stream.server.event_stream import off_loop
from mlx_stream.server.kept_lines import DEFAULT_GIB, KeptLines
from mlx_stream.server.line_reply import LineReply
from mlx_stream.server.lines import Lines
from mlx_stream.server.metrics import Counters
from mlx_stream.server.named_sessions import NamedSessions

SECONDS_TO_CLOSE = 3.0
SECONDS_WITHOUT_A_STEP = 30.0
SECONDS_FOR_A_PING = 1.0
SECONDS_TO_WAKE = 120.0
SECONDS_BETWEEN_LOOKS = 0.05
MOST_REQUESTS = 1_024
MOST_MINUTES = 1e6
MOST_GIB = 1e6


@dataclass(frozen=True)
class ServiceOptions:
    """What is served, and how many conversations and requests at once.

    Attributes:
        source, dtype, keep_quantized: see `mlx_stream.load`.
        memory_budget: see `Engine`.
        aliases: the model's names; responses use the first.
        any_model: whether every other name also means this model.
        streams: how many conversations may have their keys and values in memory.
        queue: how many requests may wait, besides those being answered.
        window, sinks, kv_bits: for each stream; see `ChatSession`.
        shared: see `Engine.session`.
        sessions: whether clients may continue saved conversations by name.
        recall: how many tokens of a saved conversation's window are kept free for quotations.
        keep: the folder in which conversations are kept when their streams are closed; None to
            keep none.
        keep_size: how much space they may take up there, in GiB.
        idle_unload: minutes without a request after which the weights are released; None for never.
    """

    source: str | Path
    aliases: tuple[str, ...]
    any_model: bool = False
    streams: int = 4
    queue: int = 16
    window: int | None = None
    sinks: int | None = None
    kv_bits: int | None = None
    idle_unload: float | None = None
    dtype: str | None = None
    keep_quantized: bool | None = None
    memory_budget: int | None = None
    shared: bool = True
    sessions: bool = False
    recall: int = 0
    keep: Path | None = None
    keep_size: float = DEFAULT_GIB

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--streams", self.streams, 1),
            ("--queue", self.queue, 0),
            ("--recall", self.recall, 0),
        ):
            if not least <= value <= MOST_REQUESTS * 1_000:
                raise ValueRefused(f"{name} must be at least {least}, not {value}")
        if self.idle_unload is not None and not 0 < self.idle_unload <= MOST_MINUTES:
            raise ValueRefused(f"--idle-unload must be above 0 minutes, not {self.idle_unload}")
        if self.recall and not self.sessions:
            raise ValueRefused("--recall is for saved conversations: add --sessions")
        if not 0 < self.keep_size <= MOST_GIB:
            raise ValueRefused(f"--keep-size must be above 0 GiB, not {self.keep_size}")
        if self.keep_size != DEFAULT_GIB and self.keep is None:
            raise ValueRefused("--keep-size is for kept conversations: add --keep")
        if not all(self.aliases):
            raise ValueRefused("--alias must not be empty")


def default_alias(source: str | Path) -> str:
    """Return a model's name for clients: never a path on this machine."""
    text = str(source)
    return Path(text).name if Path(text).expanduser().exists() or text[:1] in "./~" else text


class ModelService:
    """One engine at a time, and the requests that use it.

    Args:
        notify: called with a line for the user, on any thread.

    Attributes:
        requests: how many are waiting or being answered.
        stopping: set when the server ends.

    Raises:
        ValueRefused, SessionError: the folder for kept conversations cannot be used.
    """

    def __init__(self, options: ServiceOptions, notify: Callable[[str], None]):
        self.options, self.notify = options, notify
        size = int(options.keep_size * 2**30)
        self.kept = KeptLines(options.keep, size, notify) if options.keep else None
        self.created = int(time.time())
        self.counters = Counters()
        self.requests = 0
        self.stopping = asyncio.Event()
        self.lines: Lines | None = None
        self.sessions: NamedSessions | None = None
        self._streams = asyncio.Semaphore(options.streams)
        self._idle = asyncio.Event()
        self.engine: Engine | None = None
        self._waking = False
        self._used = time.monotonic()
        self._ping: tuple[asyncio.Future[None], float] | None = None
        self.start()

    def start(self) -> None:
        """Start loading the model; returns immediately."""
        options = self.options
        self.engine = Engine(
            options.source,
            options.memory_budget,
            # Each request may need a few commands: opening or copying a stream, and the reply.
            queue_size=8 * (options.streams + options.queue + 1),
            dtype=options.dtype,
            keep_quantized=options.keep_quantized,
        )

    # --- names ---

    @property
    def name(self) -> str:
        return self.options.aliases[0]

    def check_name(self, model: str) -> None:
        """Refuse a model that is not served.

        Raises:
            ApiError: 404.
        """
        if model not in self.options.aliases and not self.options.any_model:
            names = ", ".join(self.options.aliases)
            message = f"no model here has this name: use {names}, or serve with --any-model"
            raise ApiError(404, message, "model_not_found", "model")

    # --- requests ---

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Count a request while it is waiting and being answered.

        Raises:
            ApiError: 503, too many requests are waiting.
        """
        if self.requests >= self.options.streams + self.options.queue:
            self.counters.refused += 1
            raise ApiError(503, f"{self.requests} requests are waiting: try again", "queue_full")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1
            self._used = time.monotonic()

    async def loaded(self) -> Engine:
        """Return the engine; load its model again first if it was unloaded.

        Raises:
            ApiError: 503, the model is loading for the first time or cannot be loaded, or the
                server is shutting down.
        """
        if self.stopping.is_set():
            raise ApiError(503, "the server is shutting down", "shutting_down")
        if self.engine is None:
            self._waking = True
            self.start()
        engine = self.engine
        assert engine is not None
        if not engine.ready:
            if not self._waking:
                self.check_loading(engine)
            try:
                await asyncio.to_thread(engine.wait, SECONDS_TO_WAKE)
            except TimeoutError:
                raise ApiError(503, "the model is still loading: try again", "loading") from None
            except MlxStreamError as error:
                raise ApiError(503, one_line(error), "no_model") from error
        if self.lines is None:
            self._open_lines(engine)
        return engine

    def _open_lines(self, engine: Engine) -> None:
        options, loop = self.options, asyncio.get_running_loop()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(self._idle.set)

        shape = {"sinks": options.sinks, "kv_bits": options.kv_bits}
        window = options.window or engine.largest_window(options.streams, **shape)
        self.lines = Lines(
            engine,
            options.streams,
            window,
            shared=options.shared,
            on_idle=tell,
            kept=self.kept,
            **shape,
        )
        if options.sessions:
            self.sessions = NamedSessions(
                engine,
                options.streams,
                options.window,
                recall=options.recall,
                shared=options.shared,
                **shape,
            )

    @staticmethod
    def check_loading(engine: Engine) -> None:
        if engine.error:
            raise ApiError(503, f"the model cannot be loaded: {engine.error}", "no_model")
        raise ApiError(503, "the model is loading: try again", "loading")

    async def check_health(self) -> None:
        """Check that the engine's thread responds.

        Raises:
            ApiError: 503, the model is not loaded, or no step has finished for too long.
        """
        engine = self.engine
        if self.stopping.is_set():
            raise ApiError(503, "the server is shutting down", "shutting_down")
        if engine is None:
            return
        if not engine.ready:
            self.check_loading(engine)
        late = engine.step_seconds
        if self._ping is None or self._ping[0].done():
            try:
                ping = asyncio.wrap_future(engine.ping())
            except EngineClosed as error:
                raise ApiError(503, one_line(error), "engine_closed") from error
            self._ping = ping, time.monotonic()
        ping, since = self._ping
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ping), SECONDS_FOR_A_PING)
            return
        late = max(late, time.monotonic() - since)
        if late > SECONDS_WITHOUT_A_STEP:
            raise ApiError(503, f"no step has finished for {late:.0f} seconds", "stalled")

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[None]:
        """Wait until a stream is free, in the order of the requests."""
        async with self._streams:
            yield

    async def begin(
        self, conversation: Conversation, limit: int, options: EngineReplyOptions, large: bool
    ) -> LineReply:
        """Start a reply; the caller holds one of the streams.

        Args:
            large: whether the conversation's text is large.

        Raises:
            MlxStreamError: see `Lines.begin`.
        """
        while True:
            lines = self.lines
            assert lines
            self._idle.clear()
            try:
                begin = partial(lines.begin, conversation, limit, **options)
                return await off_loop(large, begin)
            except QueueFull:  # a reply that was cancelled has not ended yet
                if not any(line.state == "replying" for line in lines.state()):
                    raise
                await self._idle.wait()

    # --- loading and unloading the model ---

    async def report_loading(self) -> None:
        """Report when the model has been loaded, or why it could not be."""
        engine = self.engine
        assert engine is not None
        while not (engine.ready or engine.error):
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        for notice in engine.notices:
            self.notify(notice)
        self.notify(one_line(engine.error) if engine.error else f"{self.name} is ready")

    async def unload_when_idle(self) -> None:
        """Release the weights whenever there has been no request for long enough; runs forever."""
        assert self.options.idle_unload is not None
        seconds = 60 * self.options.idle_unload
        while True:
            left = seconds - (time.monotonic() - self._used)
            if self.requests or not (self.engine and self.engine.ready):
                left = seconds
            if left > 0:
                await asyncio.sleep(left)
                continue
            engine, self.engine, self.lines, self.sessions = self.engine, None, None, None
            assert engine is not None
            self.notify("the model is unloaded until the next request")
            engine.close(0)  # its thread ends by itself, and the next one waits for it

    def close(self) -> bool:
        """Release everything; return whether that finished in time."""
        if self.engine is not None and not self.engine.close(SECONDS_TO_CLOSE):
            return False
        if self.kept:
            self.kept.close()
        return True
