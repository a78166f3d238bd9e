"""What is answered through the socket: questions, notes, how it stands; knows no socket.

A question is answered from a copy of what is attended, so the stream stays what its sources make
it. One is answered at a time, for each copy takes memory.
"""

import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mlx_stream_assistant.feeder import Feeder
from mlx_stream_assistant.journal import Chunk, Journal
from mlx_stream_assistant.notes import NotesFile
from mlx_stream_assistant.paths import AssistantError

# Plain, and about the text above: a small model takes more for the text itself.
NOTE = "Summarize the text above in two sentences."
LONGEST_NOTE, LONGEST_ANSWER = 128, 256
# Characters; a longer one would push most of what is attended out, and take minutes.
LONGEST_QUESTION = 4_000
# Characters that are read before an answer without a word about it: a moment's, on any machine.
UNTOLD = 500
ASKED = "asked"
Lines = Generator[dict[str, Any], None, None]


@dataclass
class RequestHandler:
    """Answers requests about one running assistant; called from many threads.

    Attributes:
        listener: None until the model is loaded.
        describe: returns what `status` says beside what is known here.
        stop: has the assistant stop.
    """

    journal: Journal
    notes: NotesFile | None
    describe: Callable[[], dict[str, Any]]
    stop: Callable[[], None]
    listener: Any = None
    feeder: Feeder | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    _one: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: dict[str, Any]) -> Lines:
        """Answer one request; the last line has `done`.

        Raises:
            MlxStreamError: it cannot be answered.
        """
        what = request.get("what")
        if what == "status":
            yield {"done": True, **self.describe()}
        elif what == "stop":
            try:
                yield {"done": True, "pid": os.getpid()}
            finally:
                self.stop()
        elif what == "note":
            yield {"done": True, "note": self.note()}
        elif what == "ask":
            question = request.get("question")
            remember, now = request.get("remember") is True, request.get("now") is True
            if not isinstance(question, str) or not question.strip():
                raise AssistantError("there is no question")
            if len(question) > LONGEST_QUESTION:
                raise AssistantError(
                    f"a question has at most {LONGEST_QUESTION:,} characters: have it read a "
                    "longer text, with --follow or --folder"
                )
            yield from self._ask(question, remember, now)
        else:
            raise AssistantError("a request asks for status, stop, note or ask, as its `what`")

    def note(self) -> str | None:
        """Write a note of what is new since the last one and return it; None if nothing is.

        Raises:
            MlxStreamError: there is no file of notes, or it cannot be written.
        """
        diary = self.notes
        if diary is None:
            raise AssistantError("there is no file for notes: run the assistant with --notes FILE")
        with self._one:
            diary.finish()
            self._ready()
            noted, _ = self.journal.last_note_chunk
            # What waits to be fed is not in the stream: the next note is about that.
            read = self.journal.bytes_through(self.feeder.fed if self.feeder else 0)
            if read <= noted:
                return None
            text = "".join(self._pieces(NOTE, LONGEST_NOTE))
            stats = self._ready().stats
            about = (
                f"{read - noted:,} bytes read since the last note, {stats.attended:,} tokens "
                f"attended, {stats.evicted:,} evicted"
            )
            return diary.write(text, datetime.now().astimezone(), about, read)

    def _ask(self, question: str, remember: bool, now: bool) -> Lines:
        with self._one:
            texts, waiting = [], self._ready().backlog
            if waiting > UNTOLD and not now:
                yield {"waiting": waiting}
            for text in self._pieces(question, LONGEST_ANSWER, now):
                texts.append(text)
                yield {"text": text}
            if remember:
                self._remember(f"Question: {question.strip()}\nAnswer: {''.join(texts).strip()}\n")
        yield {"done": True}

    def _remember(self, text: str) -> None:
        """Have the stream read what was asked and answered, as it reads everything else."""
        data = text.encode("utf-8", "replace")
        self.journal.append(Chunk(ASKED, ASKED, ASKED, data, data.decode()))
        if feeder := self.feeder:
            feeder.wake()

    def _pieces(self, question: str, longest: int, now: bool = False) -> Generator[str, None, None]:
        pieces = self._ready().ask(question, remember=False, max_tokens=longest, now=now)
        try:
            for piece in pieces:
                if self.stopping.is_set():
                    raise AssistantError("the assistant is stopping")
                yield piece.text
        finally:
            pieces.close()

    def _ready(self) -> Any:
        if self.listener is None or self.feeder is None:
            raise AssistantError("the model is still being loaded: ask again in a moment")
        return self.listener


def stats_of(desk: RequestHandler) -> dict[str, Any]:
    """Return what `status` says of the stream: nothing before there is one."""
    listener, feeder = desk.listener, desk.feeder
    if listener is None or feeder is None:
        return {}
    # In the order in which text moves on: if nothing waits, the statistics have all of it.
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
    }
