"""The handle to the one thread that computes, for use from any other thread."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_stream.chat.messages import Message
from mlx_stream.chat.resume import SessionOptions
from mlx_stream.chat.session import DEFAULT_MAX_TOKENS, ChatSession
from mlx_stream.engine.handle import OnEvict, OnToken, Session, TextReply
from mlx_stream.engine.listener import Listener
from mlx_stream.engine.listener_stream import ListenerOptions
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.text_worker import TextOptions
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import MlxStreamError, ValueRefused
from mlx_stream.errors.argument_types import check_arguments
from mlx_stream.sampling import Sampling, check_bias

SECONDS_TO_CLOSE = 5.0
BACKLOG = 65_536


class Engine:
    """A model on its own thread, the only thread in the process that touches MLX.

    The constructor returns immediately; the thread loads the model. Any thread may call the
    methods, including a user interface's thread: only `wait` and `close` make the caller wait.

    Args:
        source, dtype, keep_quantized: see `mlx_stream.load`.
        memory_budget: bytes for the weights and the streams of all sessions. Default: what the
            device recommends.
        queue_size: how many commands may be waiting or in progress, including replies.

    Raises:
        ValueRefused: a number is out of range.
        EngineOpen: another engine is open in this process.
    """

    @check_arguments
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

    def __repr__(self) -> str:
        state = f"failed: {self.error}" if self.error else "ready" if self.ready else "loading"
        state = "closed" if self._worker.closing else state
        used, limit = self.memory
        return f"Engine({self.model_name!r}: {state}, {used / 1e6:,.1f} of {limit / 1e6:,.1f} MB)"

    @property
    def model_name(self) -> str:
        """The source of the model, as it was given."""
        return self._host.name

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        loading = self._worker.loading
        return loading.done and not loading.error and not self._worker.closing

    @property
    def error(self) -> MlxStreamError | None:
        """Why the model could not be loaded."""
        return self._worker.error

    @property
    def notices(self) -> list[str]:
        """A line for each thing that was fetched or converted to load the model (a copy)."""
        return [*self._host.notices]

    @property
    def names_date(self) -> bool:
        """Whether the model's chat template may write the date; False until it is loaded."""
        template = self._host.model.tokenizer.template if self.ready else None
        return template is not None and template.names_date

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes in use by weights and streams, and the budget (0 until loading has begun)."""
        return self._host.budget.used, self._host.budget.limit

    @property
    def step_seconds(self) -> float:
        """How long the step in progress has taken so far; 0 between steps and while loading."""
        started = self._worker.round_started
        return 0.0 if started is None else time.monotonic() - started

    def ping(self) -> Future[None]:
        """Return a future that is done when the step in progress is.

        Raises:
            EngineClosed: the engine is closed.
        """
        return self._worker.ping()

    def largest_window(
        self, streams: int = 1, sinks: int | None = None, kv_bits: int | None = None
    ) -> int | None:
        """Return the largest standard window with which several sessions fit the budget.

        It leaves room for a system prompt. Returns None if no window fits. The model must be
        loaded.
        """
        return self._host.largest_window(streams, sinks, kv_bits)

    def check_options(
        self,
        bias: Mapping[int, float] | None = None,
        think: bool | None = None,
        reasoning_effort: str | None = None,
    ) -> None:
        """Refuse options that a session or a reply would refuse later. The model must be loaded.

        Raises:
            ValueRefused, TemplateError: see `ReplyOptions` and `ChatSession`.
        """
        check_bias(bias or {}, self._host.model.config.vocab_size)
        template = self._host.model.tokenizer.template
        if template and (think is not None or reasoning_effort is not None):
            template.with_options(think, reasoning_effort)

    def bytes_of(self, id: int) -> bytes:
        """Return the bytes that a token stands for, which may be part of a character.

        The model must be loaded.
        """
        return self._host.model.tokenizer.bytes_of(id)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the model is loaded.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds.
            EngineClosed: the engine was closed first.
            MlxStreamError: loading failed; see `mlx_stream.load`.
        """
        self._worker.outcome(self._worker.loading, timeout)

    @check_arguments
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
        think: bool | None = None,
        reasoning_effort: str | None = None,
        shared: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        history: Sequence[Message] = (),
        recall: int | None = 0,
        began: datetime | None = None,
        restore: Callable[[ChatSession], None] | None = None,
    ) -> Session:
        """Start a conversation; returns immediately.

        Most invalid options raise an error only on first use.

        Args:
            system, window, sinks, sampling, max_tokens, stop, evict, kv_bits, think,
                reasoning_effort, tools, history: see `ChatSession`.
            name: resume the conversation saved under this name, or start it. Each exchange is on
                disk before the next one can begin.
            on_evict: called with the numbers of exchanges and tokens evicted, on the thread that
                reads the reply.
            recall: how many tokens of the window are kept free to quote exchanges that have left
                it; requires `name`. None means `ChatSession`'s default.
            on_token: called with each piece, on the same thread.
            began: when the conversation begins, for templates that name the date. Default: when the
                model was loaded.
            restore: called on the engine's thread with the new conversation, to restore a saved
                state. If it raises an error, every use of the session does.
            shared: whether its steps may read tokens of other sessions too, which makes several
                replies at once much faster. A shared step rounds differently: a greedy reply can
                differ where two tokens tie. Default: yes, unless `sampling` has a seed.

        Raises:
            ValueRefused: `max_tokens` is below 1.
            QueueFull: too many commands are waiting.
            EngineClosed: the engine is closed.
        """
        options = SessionOptions(
            system,
            window,
            sinks,
            evict,
            sampling,
            max_tokens,
            stop,
            kv_bits,
            think=think,
            reasoning_effort=reasoning_effort,
            tools=tools,
            history=history,
            recall_tokens=recall,
            began=began,
        )
        if shared is None:
            shared = sampling is None or sampling.seed is None
        return Session(
            self._worker, self._host, options, name, on_evict, on_token, self, shared, restore
        )

    @check_arguments
    def complete(
        self,
        prompt: str,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        window: int | None = None,
        sinks: int | None = None,
        kv_bits: int | None = None,
        bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        shared: bool = True,
    ) -> TextReply:
        """Continue plain text on a stream of its own; returns immediately.

        Args:
            prompt, max_tokens, sampling, stop, window, sinks, kv_bits, bias, logprobs: see
                `mlx_stream.stream`.
            shared: see `session`.

        Raises:
            ValueRefused: `max_tokens` is below 1.
            QueueFull: too many commands are waiting.
            EngineClosed: the engine is closed.
        """
        options = TextOptions(
            prompt, max_tokens, sampling, stop, sinks, window, kv_bits, bias, logprobs
        )
        return TextReply(self._worker, self._host, options, self, shared)

    @check_arguments
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
        """Start listening; returns immediately.

        Most invalid options raise an error only on first use.

        Args:
            system, window, sinks, kv_bits: see `ChatSession`.
            sampling, max_tokens: settings for answers; see `ChatSession`.
            backlog: the maximum number of characters that may be waiting to be read.
            on_evict: called with 0 and the number of tokens evicted, on the thread that next feeds,
                asks, flushes or saves.
            restore: continue from the snapshot that `Listener.save` wrote to this path, if any. If
                it cannot be used, the listener starts empty and a notice gives the reason.

        Raises:
            ValueRefused: `backlog` or `max_tokens` is below 1.
            QueueFull: too many commands are waiting.
            EngineClosed: the engine is closed.
        """
        path = None if restore is None else Path(restore).absolute()
        chosen = sampling or Sampling()
        options = ListenerOptions(system, window, sinks, kv_bits, chosen, max_tokens, path)
        return Listener(self._worker, self._host, options, backlog, on_evict, self)

    def close(self, timeout: float = SECONDS_TO_CLOSE) -> bool:
        """End replies, save named sessions and release everything, as happens at process exit.

        Args:
            timeout: seconds to wait for this to finish. If it takes longer, it continues anyway.

        Returns:
            Whether it has finished.
        """
        self._worker.end()
        return self._worker.join(timeout)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
