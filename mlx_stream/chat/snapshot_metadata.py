"""What a snapshot remembers of a conversation, as plain JSON values; untrusted when it is read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_stream.chat.exchange import ConversationState
from mlx_stream.chat.store import Store
from mlx_stream.errors import SnapshotError

if TYPE_CHECKING:
    from mlx_stream.generate.snapshot import Snapshot


@dataclass(frozen=True)
class SnapshotMetadata:
    """Which conversation a stream's state belongs to, and where in it.

    Attributes:
        session: the session's id.
        head: the transcript's checksum of the turns that are attended; in a snapshot of version 1,
            of all turns up to the last.
    """

    session: str
    head: str
    state: ConversationState

    def is_of(self, store: Store, found: "Snapshot") -> bool:
        """Return whether a transcript holds the turns of a snapshot, whose metadata this is."""
        if self.state.turns > store.state.count:
            return False
        if found.version == 1:
            return self.head == store.head_of_version_1(self.state.turns, found.model)
        return self.head == store.head(self.state.first, self.state.turns)

    def plain(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {
            "session": self.session,
            "turns": self.state.turns,
            "head": self.head,
            "places": [list(place) for place in self.state.places],
            "sampler": self.state.sampler,
        }


def parse_metadata(found: "Snapshot") -> SnapshotMetadata:
    """Return what `plain` made of a snapshot.

    Raises:
        SnapshotError: it made something else.
    """
    plain = found.about
    try:
        if found.version == 1:
            turns = of_type(int, plain["count"])
            starts = [of_type(int, base) + len(lead) for _, _, base, lead in plain["places"]]
            places = tuple(enumerate(starts, turns - len(starts) + 1))
        else:
            turns = of_type(int, plain["turns"])
            places = tuple((of_type(int, n), of_type(int, at)) for n, at in plain["places"])
        numbers = [number for number, _ in places]
        if not 0 < turns < 2**53 or sorted({0, *numbers, turns + 1}) != [0, *numbers, turns + 1]:
            raise ValueError(f"turns {numbers[:3]} ... of {turns} are attended")
        state = ConversationState(turns, places, of_type(str, plain["sampler"]))
        return SnapshotMetadata(of_type(str, plain["session"]), of_type(str, plain["head"]), state)
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError("it is not a conversation's") from error


def of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, not {value!r:.40}")
    return value
