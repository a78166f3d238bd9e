"""What a snapshot remembers of a conversation, as plain JSON values; untrusted when it is read."""

from dataclasses import dataclass
from typing import Any

from mlx_stream.chat.exchange import ConversationState, Pending
from mlx_stream.errors import SnapshotError


@dataclass(frozen=True)
class SnapshotMetadata:
    """Which conversation a stream's state belongs to, and where in it.

    Attributes:
        session: the session's id.
        count: exchanges said.
        head: the transcript's checksum after them.
    """

    session: str
    count: int
    head: str
    state: ConversationState

    def plain(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        places = [[list(u.ids), u.rest, base, list(lead)] for u, base, lead in self.state.places]
        unread = self.state.pending
        return {
            "session": self.session,
            "count": self.count,
            "head": self.head,
            "places": places,
            "unread": [list(unread.ids), unread.rest],
            "sampler": self.state.sampler,
        }


def parse_metadata(plain: dict[str, Any]) -> SnapshotMetadata:
    """Return what `plain` made.

    Raises:
        SnapshotError: it made something else.
    """
    try:
        places = tuple(
            (Pending(ids_of(ids), of_type(str, rest)), of_type(int, base), ids_of(lead))
            for ids, rest, base, lead in plain["places"]
        )
        ids, rest = plain["unread"]
        talk = ConversationState(
            places, Pending(ids_of(ids), of_type(str, rest)), of_type(str, plain["sampler"])
        )
        count = of_type(int, plain["count"])
        if not 0 < count < 2**53 or len(places) > count:
            raise ValueError(f"{len(places)} of {count} exchanges are attended")
        return SnapshotMetadata(
            of_type(str, plain["session"]), count, of_type(str, plain["head"]), talk
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError("it is not a conversation's") from error


def ids_of(values: Any) -> tuple[int, ...]:
    return tuple(of_type(int, value) for value in values)


def of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, not {value!r:.40}")
    return value
