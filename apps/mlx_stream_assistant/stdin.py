"""Standard input -> what arrives on it; knows no journal and no stream.

What was read from a pipe cannot be read again, so a process that is killed may take with it what
it had read in the moment before, and nothing else.
"""

import os
from collections.abc import Callable
from typing import Any

from mlx_stream_assistant.decode import NotText, decode
from mlx_stream_assistant.journal import Chunk
from mlx_stream_assistant.tail import CHUNK, line_end

NAME = "standard input"


class StandardInput:
    """A pipe, a terminal or a file that is read once, from where it stands.

    Args:
        tell: told in one line what the user should know.
        file: its descriptor.

    Attributes:
        ended: there is nothing more to come.
    """

    def __init__(self, tell: Callable[[str], None], file: int = 0):
        self.name, self.ended, self._tell, self.file = NAME, False, tell, file
        self._data = b""
        self._complaint = ""

    def fileno(self) -> int:
        return self.file

    @property
    def state(self) -> dict[str, Any]:
        return {"ended": self.ended, "complaint": self._complaint}

    @property
    def wants(self) -> bool:
        """Whether to call `read` when something is there."""
        return not self.ended and len(self._data) < CHUNK

    def read(self) -> None:
        """Take what is there, or wait for it."""
        try:
            data = os.read(self.file, CHUNK - len(self._data))
        except OSError as error:
            self._tell(f"{NAME}: cannot be read: {error.strerror}; not read any more")
            data = b""
        self._data += data
        if not data:
            self.ended = True
            self._tell(f"{NAME}: ended")

    def poll(self) -> Chunk | None:
        """Return what was read, if anything was; the same again until `taken` is called."""
        more = len(self._data) == CHUNK
        count = len(self._data) if self.ended else line_end(self._data, more, growing=False)
        data = self._data[:count]
        if not data:
            return None
        try:
            return Chunk(NAME, "input", NAME, data, decode(data, NAME))
        except NotText as error:
            self._tell(f"{error}; not read any more")
            self._complaint, self.ended, self._data = str(error), True, b""
            return None

    def ack(self, arrival: Chunk) -> None:
        """Go on after what `poll` returned: it is on disk."""
        self._data = self._data[len(arrival.data) :]

    def close(self) -> None:
        """Leave the descriptor as it is: it is not ours."""
