"""Text on its way to a stream that listens; knows no tokens and no stream."""

from collections import deque

CHARACTERS_A_STEP = 1_024  # that are encoded at once


class Backlog:
    """Text that was fed and not taken yet; for any thread, under the owner's lock.

    Attributes:
        fed, taken: characters, in all.
        encoded: characters taken and not read.
    """

    def __init__(self, capacity: int):
        self.capacity, self.fed, self.taken, self.encoded = capacity, 0, 0, 0
        self.pieces: deque[str] = deque()

    @property
    def size(self) -> int:
        return self.fed - self.taken + self.encoded

    def add(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.fed += len(text)

    def put_back(self, text: str) -> None:
        """Put text before all other, as if it had been fed and not been taken."""
        if text:
            self.pieces.appendleft(text)
            self.taken -= len(text)

    def take(self) -> str:
        """Return the oldest text, at most what is encoded at once."""
        if not self.pieces:
            return ""
        text = self.pieces.popleft()
        if len(text) > CHARACTERS_A_STEP:
            self.pieces.appendleft(text[CHARACTERS_A_STEP:])
            text = text[:CHARACTERS_A_STEP]
        self.taken += len(text)
        return text
