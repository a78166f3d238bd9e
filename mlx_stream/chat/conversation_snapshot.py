"""A whole conversation in one snapshot: its stream, and its attended turns as text and ids.

Unlike a saved session, it has no transcript, so evicted turns are not in it. Untrusted when read.
"""

from base64 import b64decode, b64encode
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from mlx_stream.chat.exchange import ConversationState, Exchange
from mlx_stream.chat.schema import ANSWERED, Row, StoredTurn, Value, now, turn_of
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.snapshot_metadata import of_type, parse_state, plain_state
from mlx_stream.errors import SnapshotError, ValueRefused, one_line
from mlx_stream.generate.snapshot import LONGEST_HEADER, load_snapshot, read_about, save_steps

KIND = "conversation"


def save_conversation(
    path: Path, chat: ChatSession, note: Mapping[str, Any]
) -> Generator[None, None, None]:
    """Write a conversation to `path`, replacing any file there; a generator (see `save_steps`).

    Args:
        note: saved with it, as plain JSON values.

    Raises:
        SnapshotError: it could not be written; the previous file is unchanged.
    """
    state, exchanges = chat.conversation_state(), chat.exchanges
    turns = [
        StoredTurn(number, ANSWERED, exchange, now()).rows()
        for (number, _), exchange in zip(state.places, exchanges, strict=True)
    ]
    plain = [[plain_row(turn), *map(plain_row, messages)] for turn, messages in turns]
    about = {"kind": KIND, **plain_state(state), "exchanges": plain, "note": dict(note)}
    del state, exchanges, turns, plain
    yield from save_steps(path, chat.tokens, chat.model.fingerprint(), about)


def restore_conversation(path: Path, chat: ChatSession, note: Mapping[str, Any]) -> None:
    """Continue a saved conversation in a new session with the same model and options.

    Args:
        note: the note that the file must have.

    Raises:
        SnapshotError: the file is damaged, or belongs to another model or conversation. The session
            must not be used after this error.
    """
    found = load_snapshot(path, chat.cache.nbytes + LONGEST_HEADER)
    if not chat.model.is_fingerprint(found.model):
        raise SnapshotError(f"{path}: it belongs to another model")
    if note_of(found.about, path) != note:
        raise SnapshotError(f"{path}: it was replaced")
    state, exchanges = parse_conversation(found.about, path)
    try:
        chat.tokens.restore(found.state)
        chat.resume(state, exchanges)
    except ValueRefused as error:
        raise SnapshotError(f"{path}: {one_line(error)}") from error


def read_note(path: Path) -> Mapping[str, Any]:
    """Return the note of a saved conversation. Only `restore_conversation` verifies it.

    Raises:
        SnapshotError: the file is not a saved conversation.
    """
    return note_of(read_about(path), path)


def note_of(about: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    note = about.get("note")
    if about.get("kind") != KIND or not isinstance(note, dict):
        raise SnapshotError(f"{path}: not a saved conversation")
    return note


def parse_conversation(
    about: Mapping[str, Any], path: Path
) -> tuple[ConversationState, dict[int, Exchange]]:
    """Return the state and the attended exchanges that `save_conversation` wrote."""
    try:
        state, exchanges = parse_state(about), dict[int, Exchange]()
        for turn, *messages in about["exchanges"]:
            found = turn_of(row_of(turn), [row_of(message) for message in messages])
            if found.state != ANSWERED:
                raise ValueError("a turn has no reply")
            exchanges[found.number] = found.exchange
        if [*exchanges] != [number for number, _ in state.places]:
            raise ValueError("it lacks some of the attended turns")
        return state, exchanges
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SnapshotError(f"{path}: not a saved conversation: {one_line(error)}") from error


def plain_row(row: Row) -> list[Any]:
    """Return a row as plain JSON values: bytes become a list of one string."""
    return [[b64encode(v).decode()] if isinstance(v, bytes) else v for v in row]


def row_of(plain: Any) -> Row:
    return tuple(value_of(value) for value in of_type(list, plain))


def value_of(value: Any) -> Value:
    if isinstance(value, list):
        (text,) = value
        return b64decode(of_type(str, text), validate=True)
    return value
