"""The snapshot of a listener: its stream and the text around it. Untrusted when read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_stream.chat.snapshot_metadata import of_type
from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.generate.model import Model
from mlx_stream.generate.snapshot import State, load_snapshot

KIND = "listener"
LONGEST_NOTE = 65_536  # bytes, as JSON
BYTES_BESIDE = 2**20
BYTES_PER_CHARACTER = 12  # the maximum for one character in JSON


@dataclass(frozen=True)
class ListenerState:
    """What a listener saves besides keys and values.

    Attributes:
        note: the caller's note.
        began: when the listener was started, which a chat template may print.
        sampler: state of the random number generator, in hexadecimal.
        ids: ids that have been encoded but not yet read.
        context, lead, held, begun: see `IncrementalEncoder`; `held` is its `pending`.
        backlog: text that has been fed but not yet encoded.
    """

    note: dict[str, str | int]
    began: datetime
    sampler: str
    ids: tuple[int, ...]
    context: str
    lead: str
    held: str
    begun: bool
    backlog: str

    def plain(self) -> dict[str, Any]:
        """Return the state as JSON-compatible values."""
        values = asdict(self)
        return {"kind": KIND, **values, "began": self.began.isoformat(), "ids": [*self.ids]}


def load_listener(path: Path, model: Model, capacity: int) -> tuple[State, ListenerState]:
    """Load a snapshot.

    Args:
        capacity: the size of the backlog, in characters.

    Raises:
        SnapshotError: the snapshot is damaged, belongs to another model, or is not a listener's.
    """
    longest = BYTES_BESIDE + LONGEST_NOTE + BYTES_PER_CHARACTER * capacity
    found = load_snapshot(path, longest=longest)
    if not model.is_fingerprint(found.model):
        raise SnapshotError(f"{path} belongs to another model, or the model was loaded differently")
    return found.state, parse_listener_state(found.about, model.config.vocab_size)


def parse_listener_state(plain: Mapping[str, Any], vocabulary: int) -> ListenerState:
    """Return the state that `ListenerState.plain` wrote.

    Raises:
        SnapshotError: the values are not a listener's state.
    """
    try:
        if plain["kind"] != KIND or plain.keys() != {"kind", *ListenerState.__annotations__}:
            raise ValueError("not a listener's")
        texts = {
            name: of_type(str, plain[name])
            for name in ("sampler", "context", "lead", "held", "backlog")
        }
        for text in texts.values():
            text.encode()
        ids = tuple(of_type(int, id) for id in plain["ids"])
        if not all(0 <= id < vocabulary for id in ids):
            raise ValueError("an id is outside the vocabulary")
        began = datetime.fromisoformat(of_type(str, plain["began"])).astimezone()
        note = check_note(of_type(dict, plain["note"]))
        return ListenerState(
            note=note, began=began, ids=ids, begun=of_type(bool, plain["begun"]), **texts
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SnapshotError("it is not a listener's snapshot, or it is damaged") from error


def check_note(note: Any) -> dict[str, str | int]:
    """Return a copy of a note.

    Raises:
        ValueRefused: the note holds anything but strings and integers, or is too long.
    """
    if not isinstance(note, Mapping):
        raise ValueRefused(
            f"a note must be a dict of strings and integers, not {type(note).__name__}"
        )
    for name, value in note.items():
        if type(name) is not str or type(value) not in (str, int):
            raise ValueRefused(
                f"a note may hold only strings and integers, not {name!r:.80}: {value!r:.80}"
            )
    try:
        size = len(json.dumps(dict(note)))
    except ValueError as error:  # an integer has too many digits
        raise ValueRefused("an integer in the note has too many digits") from error
    if size > LONGEST_NOTE:
        raise ValueRefused(
            f"the note is {size:,} bytes as JSON; the limit is {LONGEST_NOTE:,} bytes"
        )
    return dict(note)
