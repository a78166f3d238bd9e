"""What a conversation tells its recorder; plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from mlx_stream.chat.exchange import Exchange


class ChangeKind(Enum):
    """What has happened to a turn."""

    ASK = "ask"  # its question is about to be read; a turn of that number is replaced
    ANSWER = "answer"  # it has ended, maybe not for the first time
    UNDO = "undo"  # it is taken back
    STAND = "stand"  # nothing: where the conversation stands has changed, or its ids


@dataclass(frozen=True)
class Change:
    """What has happened, and where the conversation stands after it.

    Attributes:
        number: the turn it happened to; for `STAND`, the last one.
        exchanges: by number, what is to be written of turns.
        first: the number of the oldest turn attended; one more than the last where none is.
        sampler: the state of the random numbers, hexadecimal.
    """

    kind: ChangeKind
    number: int
    exchanges: Mapping[int, Exchange]
    first: int
    sampler: str
    system: str | None
    window: int


class Recorder(Protocol):
    """Writes a conversation down."""

    def record(self, change: Change) -> None:
        """Note what is to be written; noted twice in a row, it is written as if noted once."""
        ...

    def flush(self) -> None:
        """Write all that was noted; the conversation is at rest, or about to read a question.

        Raises:
            SessionError, SnapshotError: it could not be written; the next call tries again.
        """
        ...
