"""What a killed program and a failing disk leave of a conversation: all that was committed."""

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_stream.chat import manage
from mlx_stream.chat.resume import open_session
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.schema import ANSWERED, ASKED
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.errors import SessionError, SnapshotError
from mlx_stream.generate.model import Model
from tests.fakes.conversations import leave_unanswered
from tests.fakes.faults import fault
from tests.fakes.killed_chat import (
    OPTIONS,
    UNANSWERED,
    Kills,
    check_attended,
    left_over,
    turns_of,
)

KILLS = 18
NOWHERE = -1


@pytest.fixture
def kills(model: Model, folder: Path) -> Kills:
    return Kills(model, folder, random.Random(5))


def say(chat: ChatSession, question: str = "And?") -> None:
    for _ in chat.reply(question):
        pass


def begun(model: Model) -> SavedSession:
    """Return a conversation with a snapshot, and a turn that is not in the snapshot."""
    saved = open_session("x", model, OPTIONS)
    say(saved.chat, "Hello.")
    saved.write_snapshot()
    say(saved.chat)
    return saved


def test_a_killed_chat_loses_no_turn_it_committed(kills: Kills) -> None:
    for number in range(KILLS):
        kills.kill(number)
    kills.end()
    assert kills.committed > KILLS and len(kills.fell) >= 3
    assert kills.unanswered


# --- faults ---


def opens(kills: Kills, saved: SavedSession) -> str:
    """Check that a session verifies and opens as it was; return the line about its snapshot."""
    kills.said["x"] = turns_of(saved.store.turns())
    # A folder that could not be removed may remain; the next open or write of the session
    # removes it.
    assert len(left_over(kills.home, "x")) <= 1
    whole = manage.verify_session("x")
    with kills.copied() as copy:
        notices: list[str] = []
        again = open_session("x", kills.model, OPTIONS, notices.append)
        assert left_over(copy, "x") == []
        assert not any("not a saved stream" in notice for notice in notices)
        check_attended(again.chat, kills.said["x"])
        say(again.chat)
        again.close()
        manage.verify_session("x")
    return whole


def failing(saved: SavedSession, point: int, act: Callable[[], Any]) -> list[str]:
    """Write a snapshot of a new turn while injecting a fault; return the calls that were made."""
    say(saved.chat)
    with fault(point, act) as calls:
        try:
            saved.write_snapshot()
        except SnapshotError as error:
            assert "could not be written" in str(error) and "\n" not in str(error)
    return calls


def test_a_fault_at_any_step_of_a_snapshot(kills: Kills, model: Model) -> None:
    def act() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saved, path = begun(model), session_paths("x").snapshot
    calls = failing(saved, NOWHERE, act)
    assert {"mkdir", "open", "fsync", "replace"} <= set(calls)
    assert calls[calls.index("replace") :].count("fsync") == 1, "the folder is flushed"
    kept = replaced = 0
    for point in range(len(calls)):
        before = path.read_bytes()
        failing(saved, point, act)
        kept += path.read_bytes() == before
        replaced += path.read_bytes() != before
        stale = path.read_bytes() == before
        assert int(opens(kills, saved).split()[-1]) == len(kills.said["x"]) - stale
        saved.write_snapshot()
    assert kept >= 8 and replaced >= 2
    saved.close()


def test_a_full_database(kills: Kills, model: Model) -> None:
    saved = begun(model)
    chat, store = saved.chat, saved.store

    def pages(count: int) -> None:
        store.connection.execute(f"PRAGMA max_page_count = {count}").close()

    pages(store.connection.execute("PRAGMA page_count").fetchone()[0])
    with pytest.raises(SessionError, match="full"):
        while True:
            say(chat, "Is there room? " * 6)
    kept = store.turns()
    for attempt in (
        lambda: list(chat.retry()),
        lambda: chat.restart("Be brief. " * 9, chat.stats.window),
        chat.undo,
    ):
        with pytest.raises(SessionError, match="full"):
            attempt()
        assert store.turns() == kept
        opens(kills, saved)
    pages(2**30)
    say(chat, "Now?")
    # What was asked and undone in the meantime is stored as if there had been room.
    answered = [turn for turn in kept if turn.state == ANSWERED]
    assert [turn.exchange.question for turn in store.turns()] == [
        *(turn.exchange.question for turn in answered),
        "Now?",
    ]
    assert store.state.header.system == "Be brief. " * 9
    saved.close()
    assert manage.verify_session("x").endswith(f"exchange {len(answered) + 1}")


# --- killed during a reply ---

ONE, TWO, THREE = "One? Say it.", "And two?\nWhy?", "Three."


def states(saved: SavedSession) -> list[tuple[int, str, str]]:
    return [(turn.number, turn.state, turn.exchange.question) for turn in saved.store.turns()]


@dataclass
class Way:
    """What to do about an unanswered question, and the turns and questions afterwards."""

    act: Callable[[ChatSession], Any]
    then: list[tuple[str, str]]
    attended: list[str]


KEPT, ANEW = (ASKED, TWO), (ANSWERED, THREE)
WAYS = {
    "nothing": Way(lambda chat: None, [KEPT], []),
    "retry": Way(lambda chat: list(chat.retry()), [(ANSWERED, TWO)], [TWO]),
    "retry twice": Way(lambda chat: [*chat.retry(), *chat.retry()], [(ANSWERED, TWO)], [TWO]),
    "another question": Way(lambda chat: say(chat, THREE), [KEPT, ANEW], [THREE]),
    "one that is taken back": Way(lambda chat: (say(chat, THREE), chat.undo()), [KEPT], []),
    "undo": Way(lambda chat: chat.undo(), [], []),
    "edit": Way(lambda chat: list(chat.edit(THREE)), [ANEW], [THREE]),
    "clear": Way(lambda chat: chat.clear(), [KEPT], []),
    "another prompt": Way(lambda chat: chat.restart("Be kind.", 130), [KEPT], []),
}


@pytest.mark.parametrize("before", [(), (ONE,)], ids=["first", "second"])
@pytest.mark.parametrize("name", WAYS)
def test_a_killed_reply_leaves_its_question_until_something_is_done_about_it(
    model: Model, name: str, before: tuple[str, ...]
) -> None:
    saved, way, notices = open_session("x", model, OPTIONS), WAYS[name], []
    for question in before:
        say(saved.chat, question)
    leave_unanswered(saved, TWO)
    manage.verify_session("x")
    saved = open_session("x", model, OPTIONS, notices.append)
    assert saved.chat.unanswered == TWO and UNANSWERED in notices
    check_attended(saved.chat, turns_of(saved.store.turns()))
    turns = [*((ANSWERED, question) for question in before), *way.then]
    way.act(saved.chat)
    held = [*([] if name == "clear" else before), *way.attended]
    unanswered = TWO if name in ("nothing", "another prompt") else ""
    assert saved.chat.unanswered == unanswered and saved.chat.number == len(turns)
    for _ in range(2):  # it is the same the next time
        assert states(saved) == [(n, *turn) for n, turn in enumerate(turns, 1)]
        assert [e.question for e in saved.chat.exchanges] == held
        saved.close()
        gone = TWO.encode() not in session_paths("x").database.read_bytes()
        assert gone == (TWO not in [question for _, question in turns])
        saved = open_session("x", model, replace(OPTIONS, system=None, window=None))
    if unanswered:
        assert saved.chat.unanswered == TWO
        list(saved.chat.retry())
        turns[-1] = (ANSWERED, TWO)
    else:
        say(saved.chat)
        turns.append((ANSWERED, "And?"))
    assert states(saved) == [(n, *turn) for n, turn in enumerate(turns, 1)]
    check_attended(saved.chat, turns_of(saved.store.turns()))
    saved.close()


# --- what is left ---


def test_files_left_by_killed_programs_go_with_the_session(model: Model, kills: Kills) -> None:
    begun(model).close()
    left = kills.home / "snapshots" / ".x.safetensors.123.0badcafe.partial"
    left.mkdir()
    (left / "stream.safetensors").write_text("what was said")
    unfinished = kills.home / "sessions" / ".x.db.new"
    unfinished.write_text("a system prompt")
    manage.remove_session("x")
    assert [path for path in kills.home.rglob("*") if path.is_file()] == []
    assert not left.exists()
    unfinished.write_text("a system prompt")
    manage.remove_session("x")
    assert not unfinished.exists()
    with pytest.raises(SessionError, match="does not exist"):
        manage.remove_session("x")
