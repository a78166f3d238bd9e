"""A snapshot of a listening stream, and what it remembers beside it; untrusted when it is read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_stream.chat.snapshot_metadata import of_type
from mlx_stream.errors import SnapshotError, ValueRefused
from mlx_stream.generate.snapshot import State, load_snapshot
from mlx_stream.load import Model

KIND = "listener"
LONGEST_NOTE = 65_536  # bytes, as JSON
BYTES_BESIDE = 2**20
BYTES_PER_CHARACTER = 12  # of a text in JSON, at most


@dataclass(frozen=True)
class ListenerState:
    """Where a listening stream stands, beside its keys and values.

    Attributes:
        note: the writer's own.
        began: when it began, which its template may name.
        sampler: the state of the random numbers, hexadecimal.
        ids: encoded and not read.
        context, lead, held, begun: see `IncrementalEncoder`.
        backlog: fed and not encoded.
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
        """Return it as values for JSON."""
        values = asdict(self)
        return {"kind": KIND, **values, "began": self.began.isoformat(), "ids": [*self.ids]}


def load_listener(path: Path, model: Model, capacity: int) -> tuple[State, ListenerState]:
    """Return a stream's state, and where it stands.

    Args:
        capacity: characters of the backlog.

    Raises:
        SnapshotError: it is damaged, another model's, or not a listening stream's.
    """
    longest = BYTES_BESIDE + LONGEST_NOTE + BYTES_PER_CHARACTER * capacity
    found = load_snapshot(path, longest=longest)
    if not model.is_fingerprint(found.model):
        raise SnapshotError(f"{path} belongs to another model, or one loaded another way")
    return found.state, parse_listener_state(found.about, model.config.vocab_size)


def parse_listener_state(plain: Mapping[str, Any], vocabulary: int) -> ListenerState:
    """Return what `plain` made.

    Raises:
        SnapshotError: it made something else.
    """
    try:
        if plain["kind"] != KIND or plain.keys() != {"kind", *ListenerState.__annotations__}:
            raise ValueError("it is not a listener's")
        texts = {
            name: of_type(str, plain[name])
            for name in ("sampler", "context", "lead", "held", "backlog")
        }
        for text in texts.values():
            text.encode()
        ids = tuple(of_type(int, id) for id in plain["ids"])
        if not all(0 <= id < vocabulary for id in ids):
            raise ValueError("an id is none of this model")
        began = datetime.fromisoformat(of_type(str, plain["began"])).astimezone()
        note = check_note(of_type(dict, plain["note"]))
        return ListenerState(
            note=note, began=began, ids=ids, begun=of_type(bool, plain["begun"]), **texts
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SnapshotError("it is not a listening stream's, or damaged") from error


def check_note(note: Any) -> dict[str, str | int]:
    """Return a copy of a note that can be kept.

    Raises:
        ValueRefused: it is not made of texts and whole numbers, or too long.
    """
    if not isinstance(note, Mapping):
        raise ValueRefused(
            f"a note is a dict of texts and whole numbers, not {type(note).__name__}"
        )
    for name, value in note.items():
        if type(name) is not str or type(value) not in (str, int):
            raise ValueRefused(
                f"a note holds texts and whole numbers by name, not {name!r:.80}: {value!r:.80}"
            )
    try:
        size = len(json.dumps(dict(note)))
    except ValueError as error:  # a number of too many digits
        raise ValueRefused("a note holds texts and whole numbers of fewer digits") from error
    if size > LONGEST_NOTE:
        raise ValueRefused(f"a note has at most {LONGEST_NOTE:,} bytes as JSON, not {size:,}")
    return dict(note)
