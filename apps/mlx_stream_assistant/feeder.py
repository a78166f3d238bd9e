"""Feeds the journal's chunks to the listener, in order, on a thread; independent of sources.

It also saves the stream, with the number of its last chunk, and then removes from the journal
any chunks that are no longer needed.
"""

import threading
import time
from pathlib import Path
from typing import Any

from mlx_stream import errors
from mlx_stream.program.notices import Notify
from mlx_stream_assistant.journal import Journal, StoredChunk

# When this many chunks are waiting, nothing more is read.
MOST_WAITING = 4
# Seconds without new text after which the stream is saved.
REST = 60.0
# Characters kept in the journal for each token of the window, to rebuild the stream. English has
# about four per token; a line of spaces may have dozens.
CHARACTERS = 32
# Seconds before a failed save is retried.
AGAIN = 30.0
# The maximum number of seconds that one attempt to feed may take.
PATIENCE = 0.2


class Feeder:
    """Feeds a listener the chunks after `fed`, and saves it at intervals.

    After an exception it stops feeding, and `failure` holds the exception.

    Attributes:
        fed, saved: the number of the last chunk fed, and of the last chunk in a snapshot.
        characters: the number of characters fed since the start.
    """

    def __init__(
        self,
        listener: Any,
        journal: Journal,
        snapshot: Path,
        fed: int,
        every: float,
        tell: Notify,
    ):
        self._listener, self._journal, self._snapshot = listener, journal, snapshot
        self.fed = self.saved = fed
        self.failure: Exception | None = None
        self.characters = 0
        self._every, self._tell = every, tell
        self._stopping, self._awake = threading.Event(), threading.Event()
        self._last_save = self._last_fed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of chunks in the journal that have not been fed."""
        return self._journal.last - self.fed

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be read now."""
        return self.waiting >= MOST_WAITING

    @property
    def read(self) -> int:
        """The number of characters read since the start."""
        return max(0, self.characters - self._listener.backlog)

    @property
    def speed(self) -> float:
        """Characters read per second of reading time; 0 if nothing has been read."""
        seconds = self._listener.stats.prompt_seconds
        return self.read / seconds if seconds else 0.0

    def wake(self) -> None:
        """Wake the thread, because the journal has new chunks."""
        self._awake.set()

    def stop(self, timeout: float) -> None:
        """Save the stream and stop, within `timeout` seconds if possible."""
        self._stopping.set()
        self._awake.set()
        self._thread.join(timeout)

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
                left = max(0.0, self._save_due - time.monotonic())
                self._awake.wait(min(left, threading.TIMEOUT_MAX))
            if self.saved < self.fed:
                self._save()
        # Whatever the error, nothing more is fed, and the main thread has to know.
        except Exception as error:
            self.failure = error

    def _feed(self, chunk: StoredChunk) -> None:
        while not self._stopping.is_set():
            try:
                self._listener.feed(chunk.fed, timeout=PATIENCE)
            except errors.QueueFull:
                continue
            self.fed, self._last_fed = chunk.number, time.monotonic()
            self.characters += len(chunk.fed)
            return

    @property
    def _save_due(self) -> float:
        if self.saved == self.fed:
            return float("inf")
        return min(self._last_save + self._every, self._last_fed + REST)

    def _save_if_due(self) -> None:
        if self._save_due <= time.monotonic():
            self._save()

    def _save(self) -> None:
        number = self.fed
        try:
            self._listener.save(self._snapshot, {"journal": self._journal.id, "chunk": number})
            self._journal.prune(number, CHARACTERS * self._listener.stats.window)
        except errors.MlxStreamError as error:
            if not self._stopping.is_set():
                self._tell(f"{error}; the journal keeps the text until a snapshot holds it")
                self._last_fed = self._last_save = time.monotonic() + AGAIN
            return
        self.saved, self._last_save = number, time.monotonic()
