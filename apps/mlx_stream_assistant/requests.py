"""Answers requests to the assistant; independent of the socket that they arrive through.

A question is answered from a copy of the stream, so the stream itself depends only on its sources.
Questions are answered one at a time, because each copy takes memory.
"""

import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.feeder import Feeder
from mlx_stream_assistant.journal import Chunk, Journal
from mlx_stream_assistant.notes import NotesFile

# Simple, and about the text above: small models rarely follow any other instruction.
NOTE = "Summarize the text above in two sentences."
# In tokens.
LONGEST_NOTE, LONGEST_ANSWER = 128, 256
# In characters; a longer question would evict most of the attended text, and take minutes.
LONGEST_QUESTION = 4_000
# If at most this many characters must be read before an answer, there is no notice: it is quick.
UNTOLD = 500
# Seconds between reports of how much remains to be read.
BETWEEN_REPORTS = 1.0
# Assumed characters per token before any text has been read.
USUAL = 4.0
ASKED = "asked"
Lines = Generator[dict[str, Any], None, None]


@dataclass
class RequestHandler:
    """Answers requests to one running assistant; called from many threads."""

    journal: Journal
    notes: NotesFile | None
    describe: Callable[
        [], dict[str, Any]
    ]  # what `status` prints in addition to the stream's statistics
    stop: Callable[[], None]
    listener: Any = None  # None until the model is loaded
    feeder: Feeder | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    _one: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: dict[str, Any]) -> Lines:
        """Answer one request; the last line contains `done`."""
        what = request.get("what")
        if what == "status":
            yield {"done": True, **self.describe(), **self._stats()}
        elif what == "stop":
            try:
                yield {"done": True, "pid": os.getpid()}
            finally:
                self.stop()
        elif what == "note":
            yield {"done": True, "note": self.note()}
        elif what == "ask":
            question = request.get("question")
            if not isinstance(question, str) or not question.strip():
                raise AssistantError("the question is missing")
            if len(question) > LONGEST_QUESTION:
                raise AssistantError(
                    f"a question may have at most {LONGEST_QUESTION:,} characters: use --follow "
                    "or --folder for a longer text"
                )
            remember, now = request.get("remember") is True, request.get("now") is True
            yield from self._ask(question, remember, now)
        else:
            raise AssistantError("a request's `what` must be status, stop, note or ask")

    def note(self) -> str | None:
        """Write and return a note on the text since the last one; None if there is no new text."""
        if self.notes is None:
            raise AssistantError("there is no file for notes: run the assistant with --notes FILE")
        with self._one:
            self.notes.finish()
            listener, feeder = self._ready()
            noted, _ = self.journal.last_note
            # Text that has not been fed is not in the stream yet: the next note will cover it.
            read = self.journal.bytes_through(feeder.fed)
            if read <= noted:
                return None
            text = "".join(self._pieces(NOTE, LONGEST_NOTE))
            stats = listener.stats
            about = (
                f"{read - noted:,} bytes read since the last note, {stats.attended:,} tokens "
                f"attended, {stats.evicted:,} evicted"
            )
            return self.notes.write(text, datetime.now().astimezone(), about, read)

    def _ask(self, question: str, remember: bool, now: bool) -> Lines:
        with self._one:
            listener, feeder = self._ready()
            if not now:
                yield from self._read_first(listener, feeder)
                # Do not wait for text that came after the question, or the answer might never come.
                now = listener.backlog > UNTOLD
            texts, since = [], self._reaches_back(listener, feeder)
            for text in self._pieces(question, LONGEST_ANSWER, now):
                texts.append(text)
                yield {"text": text}
            if remember:
                answer = "".join(texts).strip()
                text = f"Question: {question.strip()}\nAnswer: {answer}\n"
                data = text.encode("utf-8", "replace")
                self.journal.append(Chunk(ASKED, ASKED, ASKED, data, data.decode()))
                if self.feeder:
                    self.feeder.wake()
        yield {"done": True, **({"since": since} if since else {})}

    def _read_first(self, listener: Any, feeder: Feeder) -> Lines:
        """Wait until pending text is read; report how much is left, and the estimated time left."""
        wanted = feeder.read + listener.backlog
        while (left := wanted - feeder.read) > UNTOLD and not (feeder.failure or listener.error):
            speed = feeder.speed
            yield {"waiting": left, **({"seconds": round(left / speed)} if speed else {})}
            if self.stopping.wait(BETWEEN_REPORTS):
                raise AssistantError("the assistant is stopping")

    def _reaches_back(self, listener: Any, feeder: Feeder) -> str | None:
        """Return roughly when the oldest attended text was read, or None if nothing was evicted."""
        stats = listener.stats
        if not stats.evicted:
            return None
        length = feeder.read / stats.prompt_tokens if stats.prompt_tokens and feeder.read else USUAL
        left = length * (stats.attended - stats.pinned) + listener.backlog
        found = None
        for chunk in reversed([*self.journal.chunks(0)]):
            if chunk.number <= feeder.fed and left > 0:
                found, left = chunk.time, left - len(chunk.fed)
        return found

    def _pieces(self, question: str, longest: int, now: bool = False) -> Generator[str, None, None]:
        pieces = self._ready()[0].ask(question, remember=False, max_tokens=longest, now=now)
        try:
            for piece in pieces:
                if self.stopping.is_set():
                    raise AssistantError("the assistant is stopping")
                yield piece.text
        finally:
            pieces.close()

    def _ready(self) -> tuple[Any, Feeder]:
        listener, feeder = self.listener, self.feeder
        if listener is None or feeder is None:
            raise AssistantError("the model is still loading: ask again in a moment")
        return listener, feeder

    def _stats(self) -> dict[str, Any]:
        """Return what `status` prints about the stream; empty until there is a stream."""
        listener, feeder = self.listener, self.feeder
        if listener is None or feeder is None:
            return {}
        # Read these in the order in which text flows, so that if nothing is waiting, the statistics
        # include all text.
        waiting, backlog = feeder.waiting, listener.backlog
        stats = listener.stats
        return {
            "attended": stats.attended,
            "evicted": stats.evicted,
            "window": stats.window,
            "cache_bytes": stats.cache_bytes,
            "backlog": backlog,
            "chunks_waiting": waiting,
            "chunks_fed": feeder.fed,
            "chunks_saved": feeder.saved,
            "tokens_per_second": round(stats.prompt_tokens_per_second, 1),
            "characters_per_second": round(feeder.speed, 1),
            "since": self._reaches_back(listener, feeder),
        }
