"""Chunks of the journal -> the listener, in their order, on a thread; knows no source.

Now and then it saves the stream with the number of the last chunk in it, and lets the journal
forget what is not needed any more.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_stream import errors
from mlx_stream_assistant.journal import Journal, StoredChunk

# Chunks that wait beyond which nothing more is read.
AHEAD = 4
# Seconds without anything new after which the stream is saved.
REST = 60.0
# Characters kept in the journal for each token of the window, to build the stream again. English
# has about four a token; a line of spaces may have dozens.
CHARACTERS = 32
# Seconds before what failed is tried again.
AGAIN = 30.0
# Seconds that one try of feeding takes, at most.
PATIENCE = 0.2


class Feeder:
    """Feeds a listener what the journal holds, and what is read on.

    Args:
        listener: of `mlx_stream.Engine.listen`.
        fed: number of the last chunk in it.
        every: seconds between two snapshots while text arrives.
        tell: told in one line what the user should know.

    Attributes:
        failure: why nothing can be fed any more.
    """

    def __init__(
        self,
        listener: Any,
        journal: Journal,
        snapshot: Path,
        fed: int,
        every: float,
        tell: Callable[[str], None],
    ):
        self._listener, self._journal, self._snapshot = listener, journal, snapshot
        self.fed = self.saved = fed
        self.failure: Exception | None = None
        self._every, self._tell = every, tell
        self._stopping, self._awake = threading.Event(), threading.Event()
        self._last_save = self._last_fed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Chunks in the journal that were not fed yet."""
        return self._journal.last - self.fed

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be read now."""
        return self.waiting >= AHEAD

    def wake(self) -> None:
        """Have it look into the journal: something is new."""
        self._awake.set()

    def stop(self, timeout: float) -> bool:
        """Save the stream, and end; return whether it has ended in time."""
        self._stopping.set()
        self._awake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._awake.clear()
                for chunk in self._journal.chunks(self.fed):
                    self._feed(chunk)
                    if self._stopping.is_set():
                        break
                    self._save_if_due()
                self._save_if_due()
                self._awake.wait(self._patience())
            if self.saved < self.fed:
                self._save()
        # Whatever it is, nothing is fed any more: the main thread has to know.
        except Exception as error:
            self.failure = error

    def _feed(self, chunk: StoredChunk) -> None:
        while not self._stopping.is_set():
            try:
                self._listener.feed(chunk.fed, timeout=PATIENCE)
            except errors.QueueFull:
                continue
            self.fed, self._last_fed = chunk.number, time.monotonic()
            return

    def _patience(self) -> float | None:
        """Return the seconds until the stream is to be saved; None if it is."""
        return None if self.saved == self.fed else max(0.0, self._due - time.monotonic())

    def _save_if_due(self) -> None:
        if self._due <= time.monotonic():
            self._save()

    @property
    def _due(self) -> float:
        """When to save next."""
        if self.saved == self.fed:
            return float("inf")
        return min(self._last_save + self._every, self._last_fed + REST)

    def _save(self) -> None:
        number = self.fed
        try:
            note = {"journal": self._journal.id, "chunk": number}
            self._listener.save(self._snapshot, note)
            self._journal.prune(number, CHARACTERS * self._listener.stats.window)
        except errors.MlxStreamError as error:
            if self._stopping.is_set():
                return
            self._tell(f"{error}; the journal keeps what is not in a snapshot")
            self._last_fed = self._last_save = time.monotonic() + AGAIN
            return
        self.saved, self._last_save = number, time.monotonic()
