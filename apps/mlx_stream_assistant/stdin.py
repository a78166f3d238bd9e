"""Standard input -> chunks of text; independent of the journal and streams.

A pipe cannot be read twice, so a process that is killed may lose what it has just read, but nothing
else.
"""

import os
from typing import Any

from mlx_stream.program.notices import Notify
from mlx_stream_assistant.decode import CHUNK, NotText, TextDecoder, line_end, refuse_binary
from mlx_stream_assistant.journal import Chunk

NAME = "standard input"


class StandardInput:
    """A pipe, a terminal or a file that is read once, from its current position."""

    def __init__(self, tell: Notify, file: int = 0):
        self.name, self.ended, self._tell, self.file = NAME, False, tell, file
        self._data, self._at = b"", 0
        self._decoder, self._complaint = TextDecoder(tell), ""

    def fileno(self) -> int:
        return self.file

    @property
    def state(self) -> dict[str, Any]:
        return {"ended": self.ended, "complaint": self._complaint}

    @property
    def wants(self) -> bool:
        """Whether `read` should be called when input is available."""
        return not self.ended and len(self._data) < CHUNK

    def read(self) -> None:
        """Read what is available, or wait for it."""
        try:
            data = os.read(self.file, CHUNK - len(self._data))
        except OSError as error:
            self._tell(f"{NAME}: cannot be read: {error.strerror}; reading stops")
            data = b""
        self._data += data
        if not data:
            self.ended = True
            self._tell(f"{NAME}: ended")

    def poll(self) -> Chunk | None:
        """Return what was read, or None; the result stays the same until `ack` is called."""
        more = len(self._data) == CHUNK
        try:
            if self._at == 0:
                refuse_binary(self._data, NAME, whole=more)
        except NotText as error:
            self._close(str(error))
        count = len(self._data) if self.ended else line_end(self._data, more, growing=False)
        data = self._data[:count]
        if not data:
            return None
        return Chunk(NAME, "input", NAME, data, self._decoder.decode(data, NAME, self._at))

    def ack(self, chunk: Chunk) -> None:
        """Drop what `poll` returned, which is now on disk."""
        self._data, self._at = self._data[len(chunk.data) :], self._at + len(chunk.data)

    def _close(self, why: str) -> None:
        """Stop reading, and let the writer know: its writes fail instead of blocking forever."""
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, self.file)  # the next file opened must not reuse the descriptor
        os.close(null)
        self._tell(f"{why}; no longer read")
        self._complaint, self.ended, self._data = why, True, b""
