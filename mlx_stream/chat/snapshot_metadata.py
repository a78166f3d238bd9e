"""A conversation's metadata in its snapshot, as plain JSON values; untrusted when read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlx_stream.chat.exchange import ConversationState
from mlx_stream.chat.migrations import head_of_version_1
from mlx_stream.chat.store import Store
from mlx_stream.errors import SnapshotError

if TYPE_CHECKING:
    from mlx_stream.generate.snapshot import Snapshot


@dataclass(frozen=True)
class SnapshotMetadata:
    """The conversation that a stream's state belongs to, and its state at that point.

    Attributes:
        session: the session's id.
        head: the transcript's checksum of the attended turns; in a version 1 snapshot, of all turns
            up to the last.
    """

    session: str
    head: str
    state: ConversationState

    def is_of(self, store: Store, found: "Snapshot") -> bool:
        """Return whether a transcript contains the turns of the snapshot with this metadata."""
        if self.state.turns > store.state.count:
            return False
        if found.version == 1:
            header = replace(store.state.header, fingerprint=found.model)
            return self.head == head_of_version_1(header, store.whole()[0][: self.state.turns])
        return self.head == store.head(self.state.first, self.state.turns)

    def plain(self) -> dict[str, Any]:
        """Return the metadata as plain JSON values."""
        return {"session": self.session, "head": self.head, **plain_state(self.state)}


def parse_metadata(found: "Snapshot") -> SnapshotMetadata:
    """Return the metadata of a snapshot; the inverse of `plain`.

    Raises:
        SnapshotError: the snapshot is not a conversation's.
    """
    plain = found.about
    try:
        if found.version == 1:
            turns = of_type(int, plain["count"])
            starts = [of_type(int, base) + len(lead) for _, _, base, lead in plain["places"]]
            places = [*enumerate(starts, turns - len(starts) + 1)]
            plain = {**plain, "turns": turns, "places": places}
        state = parse_state(plain)
        return SnapshotMetadata(of_type(str, plain["session"]), of_type(str, plain["head"]), state)
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError("it is not a conversation's snapshot") from error


def plain_state(state: ConversationState) -> dict[str, Any]:
    """Return a conversation's state as plain JSON values."""
    places = [list(place) for place in state.places]
    return {"turns": state.turns, "places": places, "sampler": state.sampler}


def parse_state(plain: Mapping[str, Any]) -> ConversationState:
    """Return the state that `plain_state` returned as plain values.

    Raises:
        KeyError, TypeError, ValueError: the values are not a conversation's state.
    """
    turns = of_type(int, plain["turns"])
    places = tuple((of_type(int, n), of_type(int, at)) for n, at in plain["places"])
    numbers = [number for number, _ in places]
    if not 0 < turns < 2**53 or sorted({0, *numbers, turns + 1}) != [0, *numbers, turns + 1]:
        raise ValueError(f"turns {numbers[:3]} ... are not valid for a total of {turns}")
    return ConversationState(turns, places, of_type(str, plain["sampler"]))


def of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, not {value!r:.40}")
    return value
