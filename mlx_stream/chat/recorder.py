"""The changes that a conversation reports to its recorder, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from mlx_stream.chat.exchange import Exchange


class ChangeKind(Enum):
    """A kind of change to a turn."""

    ASK = "ask"  # Its question is about to be read; replaces any turn with the same number.
    ANSWER = "answer"  # Its reply has ended, or has been replaced by a retry.
    UNDO = "undo"  # It was undone.
    STAND = "stand"  # No single turn: the attended turns or their ids have changed.


@dataclass(frozen=True)
class Change:
    """A change, and the state of the conversation after it.

    Attributes:
        number: the turn that changed; for `STAND`, the last turn.
        exchanges: the turns to write, by number.
        first: number of the oldest attended turn; one more than the last turn's if there is none.
        sampler: state of the random number generator, in hexadecimal.
        recall_from: number of the oldest turn that may be recalled.
    """

    kind: ChangeKind
    number: int
    exchanges: Mapping[int, Exchange]
    first: int
    sampler: str
    system: str | None
    window: int
    recall_from: int = 1


class Recorder(Protocol):
    """Saves a conversation."""

    def record(self, change: Change) -> None:
        """Queue a change; if it is queued twice in a row, it is written only once."""
        ...

    def flush(self) -> None:
        """Write the queued changes.

        Raises:
            SessionError: the changes could not be written; the next call tries again.
        """
        ...

    def checkpoint(self) -> None:
        """Save the stream's state if that is due; called between turns.

        Raises:
            SessionError, SnapshotError: the state could not be written.
        """
        ...
