"""A listener on the engine's thread."""

from datetime import datetime
from pathlib import Path

import mlx.core as mx

from mlx_stream.engine.listener_snapshot import load_listener
from mlx_stream.engine.listener_stream import Backlog, ListenerOptions, ListenerStream
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.task import Work
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.generate.stats import Stats, eviction_notice
from mlx_stream.models.window import PREFILL_CHUNK

BUSY_CHUNK = 32  # tokens per step while sessions have tasks


class ListenerWorker:
    """One listening stream, which never shares a step; see `StreamOwner`.

    Attributes:
        stream: None before it is open and after it is closed.
        restored: the note in the snapshot that it continues from.
    """

    shared = False

    def __init__(self, worker: Worker, host: ModelHost, options: ListenerOptions, backlog: Backlog):
        self.worker, self.host, self.options, self.backlog = worker, host, options, backlog
        self.key = object()
        self.stream: ListenerStream | None = None
        self.restored: dict[str, str | int] | None = None
        self.evicted: tuple[int, int] = (0, 0)
        self._counted = 0  # tokens that had been evicted at the last update

    @property
    def usable(self) -> bool:
        return self.stream is not None and not self.stream.tokens.failed

    def open(self) -> Work:
        """Start afresh, or continue from a snapshot; a coroutine."""
        yield from ()
        path, stream, reason = self.options.restore, None, ""
        if path and path.exists():
            try:
                stream = self._continue(path)
            except SnapshotError as error:
                reason = str(error)
            except ValueRefused as error:
                reason = f"{path} does not fit this window and system prompt ({error})"
            mx.clear_cache()  # frees the buffers that the snapshot was loaded into
        stream = stream or self._new_stream()
        if reason:
            stream.stats.add_notices(f"the listener starts empty: {reason}")
        self.stream = stream

    def _continue(self, path: Path) -> ListenerStream:
        """Return a stream restored from a snapshot; see `load_listener` and `restore`."""
        state, saved = load_listener(path, self.host.model, self.backlog.capacity)
        stream = self._new_stream(saved.began)
        stream.restore(state, saved)
        self.restored, self._counted = saved.note, stream.cache.evicted
        return stream

    def _new_stream(self, began: datetime | None = None) -> ListenerStream:
        self.host.budget.set_stream(self.key, 0)
        began = began or datetime.now().astimezone()
        return ListenerStream(self.host.model_for(self.key), self.options, began, self.backlog)

    def current(self) -> ListenerStream:
        assert self.stream
        return self.stream

    def waiting(self) -> bool:
        return self.stream is not None and bool(self.stream.ids or self.backlog.pieces)

    def step(self) -> None:
        """Read one step of the text that was fed."""
        self.current().read_step(BUSY_CHUNK if self.worker.busy() else PREFILL_CHUNK)

    def update(self, task_ended: bool) -> Stats | None:
        if self.stream is None:
            return None
        stats, cache = self.stream.stats, self.stream.cache
        if task_ended:
            self.host.budget.set_stream(self.key, cache.nbytes)
        stats.attended, stats.evicted = cache.attended, cache.evicted
        if stats.evicted and not self._counted and not self.restored:
            stats.add_notices(eviction_notice(stats.window))
        with self.worker.lock:
            self.evicted = 0, self.evicted[1] + stats.evicted - self._counted
        self._counted = stats.evicted
        return stats

    def close(self) -> None:
        """Release the ring."""
        self.stream = None
        self.host.budget.set_stream(self.key, 0)
