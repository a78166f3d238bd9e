"""A stream that listens, as the engine's thread holds it."""

from dataclasses import replace
from datetime import datetime

import mlx.core as mx

from mlx_stream.engine.backlog import Backlog
from mlx_stream.engine.listener_snapshot import load_listener
from mlx_stream.engine.listener_stream import ListenerOptions, ListenerStream
from mlx_stream.engine.model_host import ModelHost
from mlx_stream.engine.task import Task, Work
from mlx_stream.engine.worker import Worker
from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.generate.stats import Stats, eviction_notice
from mlx_stream.window import PREFILL_CHUNK

BUSY_CHUNK = 32  # tokens of a step while others wait for their replies


class ListenerWorker:
    """One stream that listens; see `StreamOwner`.

    Attributes:
        stream: None until it is open, and after it was closed.
        restored: the note of the snapshot it continues.
    """

    def __init__(self, worker: Worker, host: ModelHost, options: ListenerOptions, backlog: Backlog):
        self.worker, self.host, self.options, self.backlog = worker, host, options, backlog
        self.key = host.new_key()
        self.stream: ListenerStream | None = None
        self.restored: dict[str, str | int] | None = None
        self.published, self.evicted = Stats(), (0, 0)
        self._counted = 0  # of the tokens that left

    @property
    def usable(self) -> bool:
        return self.stream is not None and not self.stream.tokens.failed

    def open(self) -> Work:
        """Begin, or continue a snapshot; a coroutine."""
        yield from ()
        path, found, reason = self.options.restore, None, ""
        if path and path.exists():
            try:
                found = load_listener(path, self.host.model, self.backlog.capacity)
            except SnapshotError as error:
                reason = str(error)
        try:
            stream = self._begin(found[1].began if found else None)
            if found:
                try:
                    stream.restore(found[0], found[1])
                    self.restored, self._counted = found[1].note, stream.cache.evicted
                except ValueRefused as error:
                    reason = f"{path} does not fit this window and system prompt ({error})"
                    stream = self._begin()
        finally:
            found = None
            mx.clear_cache()  # of what a snapshot was loaded into
        if reason:
            stream.stats.add_notices(f"begins anew, without what was heard before: {reason}")
        self.stream = stream

    def _begin(self, began: datetime | None = None) -> ListenerStream:
        """Allocate a stream; read nothing yet."""
        self.host.budget.set_stream(self.key, 0)
        model, began = self.host.model_for(self.key), began or datetime.now().astimezone()
        changed = self.worker.changed
        return ListenerStream(
            model, self.options, began, self.backlog, changed, lambda: self.after(None)
        )

    def current(self) -> ListenerStream:
        assert self.stream
        return self.stream

    def waiting(self) -> bool:
        return self.stream is not None and bool(self.stream.ids or self.backlog.pieces)

    def step(self) -> None:
        """Read a little more of what was fed."""
        self.current().read_step(BUSY_CHUNK if self.worker.busy() else PREFILL_CHUNK)

    def after(self, task: Task | None) -> None:
        if self.stream is None:
            return
        stats, cache = self.stream.stats, self.stream.cache
        if task:
            self.host.budget.set_stream(self.key, cache.nbytes)
            if task.cancelled and task.error:  # no other place will show it
                stats.add_notices(str(task.error))
        stats.attended, stats.evicted = cache.attended, cache.evicted
        if stats.evicted and not self._counted and not self.restored:
            stats.add_notices(eviction_notice(stats.window))
        left, self._counted = stats.evicted - self._counted, stats.evicted
        with self.worker.lock:
            self.evicted = 0, self.evicted[1] + left
        self.published = replace(stats, notices=[*stats.notices])

    def close(self) -> None:
        """Let go of the ring."""
        self.stream = None
        self.host.budget.set_stream(self.key, 0)
