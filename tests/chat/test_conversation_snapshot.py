"""A conversation in one file: it comes back whole, and nothing in the file is trusted."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_stream
from mlx_stream.chat.conversation_snapshot import (
    read_note,
    restore_conversation,
    save_conversation,
)
from mlx_stream.chat.messages import Message
from mlx_stream.errors import SnapshotError
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.engines import GREEDY

NOTE = {"name": "x", "number": 1}


@pytest.fixture(scope="module")
def model(letters: Path) -> Model:
    return mlx_stream.load(letters, dtype="float32", keep_quantized=False)


def new(
    model: Model, system: str = "Be brief.", window: int = 120, sampling: Sampling = GREEDY
) -> mlx_stream.ChatSession:
    return mlx_stream.ChatSession(model, system, window, sampling=sampling, max_tokens=8)


def saved(path: Path, chat: mlx_stream.ChatSession) -> Path:
    for _ in save_conversation(path, chat, NOTE):
        pass
    return path


def test_a_conversation_comes_back_with_all_its_messages(model: Model, tmp_path: Path) -> None:
    chat, other = (new(model, sampling=Sampling(seed=seed)) for seed in (1, 2))
    said(chat.reply("Hi \u00e4\u20ac\U0001f600"))
    said(chat.reply([Message("system", "Now"), Message("user", "And?")]))
    said(chat.reply([Message("user", "So?"), Message("assistant", "Well,")]))
    said(chat.reply("More?", stop=["e"]))
    pieces = chat.reply("Cut?", max_tokens=99)
    next(pieces)
    pieces.close()
    path = saved(tmp_path / "s", chat)
    assert read_note(path) == NOTE
    restore_conversation(path, other, NOTE)
    assert (other.exchanges, other.number) == (chat.exchanges, chat.number)
    assert other.tokens.ids.attended() == chat.tokens.ids.attended()
    for question in ("Next?", "Last?"):
        assert said(other.reply(question)) == said(chat.reply(question))
    assert said(other.retry()) == said(chat.retry()) and other.undo() == chat.undo()
    assert_well_formed(other)


def test_what_does_not_fit_is_refused(model: Model, tmp_path: Path) -> None:
    chat = new(model)
    said(chat.reply("Hi"))
    path = saved(tmp_path / "s", chat)
    for other, note in (
        (new(model), {**NOTE, "number": 2}),
        (new(model, window=121), NOTE),
        (new(model, "Be long."), NOTE),
    ):
        with pytest.raises(SnapshotError):
            restore_conversation(path, other, note)
    plain = snapshot.load_snapshot(path).about
    snapshot.save_snapshot(path, chat.tokens, chat.model.fingerprint(), {**plain, "kind": "x"})
    with pytest.raises(SnapshotError, match="not a saved conversation"):
        read_note(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a JSON value."""
    yield path
    items: Any = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        yield from places(each, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    found = copy.deepcopy(value)
    if not path:
        return new
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return found


@pytest.mark.parametrize("forged", [None, -1, 2**70, 1.5, "AAAA", [], {}])
def test_no_forged_value_is_used(model: Model, tmp_path: Path, forged: Any) -> None:
    """Even with a correct checksum, the file is refused, or its conversation is well formed."""
    chat = new(model)
    said(chat.reply("Hi"))
    said(chat.reply([Message("system", "Now"), Message("user", "And?")]))
    path = saved(tmp_path / "s", chat)
    about, mark = snapshot.load_snapshot(path).about, chat.model.fingerprint()
    refused = 0
    for place in [*places(about)][1:]:
        wrong = replaced(about, place, forged)
        if wrong == about or place[0] == "note":
            continue
        snapshot.save_snapshot(path, chat.tokens, mark, wrong)
        other = new(model)
        try:
            restore_conversation(path, other, NOTE)
        except SnapshotError:
            refused += 1
        else:
            assert len(other.exchanges) == 2 and said(other.reply("Next?"))
    assert refused > 15
