"""What a killed program and a failing disk leave of a conversation: all that was committed."""

import errno
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_stream.chat import manage
from mlx_stream.chat.export import export_json, export_markdown
from mlx_stream.chat.resume import open_session
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.schema import ANSWERED, ASKED
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.errors import SessionError, SnapshotError
from mlx_stream.generate import snapshot
from mlx_stream.load import Model, load
from tests.fakes.faults import fault
from tests.fakes.killed_chat import (
    OPTIONS,
    UNANSWERED,
    Kills,
    check_attended,
    kill_in_reply,
    left_over,
    tiny_folder,
    turns_of,
)

KILLS = 12
NOWHERE = -1
UNSEEN = ("close", "flock")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("kills") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, dtype="float32", keep_quantized=False)


@pytest.fixture
def kills(model: Model, folder: Path) -> Kills:
    return Kills(model, folder, random.Random(5))


def say(chat: ChatSession, question: str = "And?") -> None:
    for _ in chat.reply(question):
        pass


def begun(model: Model) -> SavedSession:
    """Return a conversation with a snapshot, and a turn that is not in it."""
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
    """See that a session verifies, and opens as it was; return what is said of its snapshot."""
    kills.said["x"] = turns_of(saved.store.turns())
    # A folder that could not be removed; it is when the session is next opened or written.
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
    """Write a snapshot of a new turn with a fault; return the calls there were."""
    say(saved.chat)
    with fault(point, act) as calls:
        try:
            saved.write_snapshot()
        except SnapshotError as error:
            assert "could not be written" in str(error) and "\n" not in str(error)
    return calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_any_step_of_a_snapshot(kills: Kills, model: Model, number: int) -> None:
    def act() -> None:
        raise OSError(number, os.strerror(number))

    saved, path = begun(model), session_paths("x").snapshot
    calls = failing(saved, NOWHERE, act)
    assert {"mkdir", "open", "fsync", "rename", "replace"} <= set(calls)
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


def test_a_snapshot_that_does_not_fit_on_the_disk(kills: Kills, model: Model) -> None:
    saved, path = begun(model), session_paths("x").snapshot
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (0, 5, 300, 4096, len(before) // 2, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(SnapshotError, match="could not be written"):
                saved.write_snapshot()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert opens(kills, saved).endswith("exchange 1")
    saved.close()
    assert manage.verify_session("x").endswith("exchange 2")


# Dies at one call of writing a snapshot; with none, tells which there are.
DYING = """
import json, os, sys
from pathlib import Path
import mlx_stream
from tests.fakes.faults import fault
from tests.fakes.killed_chat import OPTIONS
from mlx_stream.load import load
from mlx_stream.chat.resume import open_session
saved = open_session("x", load(Path(sys.argv[1]), dtype="float32"), OPTIONS)
for _ in saved.chat.reply("And?"):
    pass
with fault(int(sys.argv[2]), lambda: os._exit(9)) as calls:
    saved.write_snapshot()
print(json.dumps(calls), flush=True)
os._exit(0)
"""


def test_death_at_any_step_of_a_snapshot(kills: Kills, model: Model, folder: Path) -> None:
    def die(point: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", DYING, str(folder), str(point)]
        return subprocess.run(command, capture_output=True, text=True)

    begun(model).close()
    alive, path, kept = die(NOWHERE), session_paths("x").snapshot, 0
    assert alive.returncode == 0, alive.stderr
    # Those that change nothing on disk leave the same as the one after them.
    points = [at for at, name in enumerate(json.loads(alive.stdout)) if name not in UNSEEN]
    for number, point in enumerate(points, 4):
        before = snapshot.load_snapshot(path).about["turns"]
        dead = die(point)
        assert dead.returncode == 9, dead.stderr
        found = snapshot.load_snapshot(path).about["turns"]
        assert found in (before, number), "what was there, or what was being written"
        kept += found == before
        assert len(left_over(kills.home, "x")) <= 1
        manage.verify_session("x")
        with kills.copied() as copy:
            saved = open_session("x", model, OPTIONS)
            assert saved.store.state.count == number
            assert left_over(copy, "x") == []
            saved.close()
    assert 5 < kept < len(points)


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
    # What was said and taken back meanwhile is as it would be, had there been room.
    answered = [turn for turn in kept if turn.state == ANSWERED]
    assert [turn.exchange.question for turn in store.turns()] == [
        *(turn.exchange.question for turn in answered),
        "Now?",
    ]
    assert store.state.header.system == "Be brief. " * 9
    saved.close()
    assert manage.verify_session("x").endswith(f"exchange {len(answered) + 1}")


# --- killed in a reply ---

ONE, TWO, THREE = "One? Say it.", "And two?\nWhy?", "Three."


def killed_in(folder: Path, *questions: str) -> None:
    kill_in_reply(folder, "x", *questions)


def reopened(model: Model, unanswered: str = "") -> SavedSession:
    """Open a session that is whole; see that it says of a question that it was not answered."""
    notices: list[str] = []
    manage.verify_session("x")
    saved = open_session("x", model, OPTIONS, notices.append)
    assert saved.chat.unanswered == unanswered
    assert (UNANSWERED in notices) == bool(unanswered)
    check_attended(saved.chat, turns_of(saved.store.turns()))
    return saved


def states(saved: SavedSession) -> list[tuple[int, str, str]]:
    return [(turn.number, turn.state, turn.exchange.question) for turn in saved.store.turns()]


@pytest.fixture(params=[(TWO,), (ONE, TWO)], ids=["first", "second"])
def killed_at(request: pytest.FixtureRequest, folder: Path) -> list[tuple[int, str, str]]:
    """Kill a chat in its reply to the first or the second question; return the turns there are."""
    killed_in(folder, *request.param)
    answered = [(1, ANSWERED, ONE)] if len(request.param) == 2 else []
    return [*answered, (len(answered) + 1, ASKED, TWO)]


def test_a_killed_reply_leaves_its_question(model: Model, killed_at: list) -> None:
    for _ in range(3):  # and says so each time, until something is done
        saved = reopened(model, TWO)
        assert states(saved) == killed_at and saved.chat.number == len(killed_at)
        saved.close()
    assert manage.summarize_session("x").exchanges == len(killed_at)


def test_retry_answers_it_under_its_number(model: Model, killed_at: list) -> None:
    saved, number = reopened(model, TWO), len(killed_at)
    reply = "".join(piece.text for piece in saved.chat.retry())
    assert states(saved) == [*killed_at[:-1], (number, ANSWERED, TWO)]
    assert saved.store.turns()[-1].exchange == saved.chat.exchanges[-1]
    assert saved.chat.exchanges[-1].reply == reply and not saved.chat.unanswered
    list(saved.chat.retry())  # and once more, as any other
    assert [state for _, state, _ in states(saved)] == [ANSWERED] * number
    saved.close()
    again = reopened(model)
    assert again.chat.exchanges == saved.chat.exchanges and again.chat.number == number
    again.close()


def test_a_new_question_leaves_it_asked(model: Model, killed_at: list) -> None:
    saved, number = reopened(model, TWO), len(killed_at)
    say(saved.chat, THREE)
    wanted = [*killed_at, (number + 1, ANSWERED, THREE)]
    assert states(saved) == wanted and saved.chat.number == number + 1
    assert [e.question for e in saved.chat.exchanges] == [q for _, s, q in wanted if s == ANSWERED]
    saved.close()
    again = reopened(model)
    assert states(again) == wanted
    say(again.chat)
    assert states(again) == [*wanted, (number + 2, ANSWERED, "And?")]
    again.close()
    # Without the snapshot, too, what is attended is what was answered.
    session_paths("x").snapshot.unlink()
    again = reopened(model)
    assert again.chat.number == number + 2
    again.close()


def test_a_new_question_can_be_taken_back_too(model: Model, killed_at: list) -> None:
    saved, number = reopened(model, TWO), len(killed_at)
    say(saved.chat, THREE)
    saved.chat.undo()
    assert states(saved) == killed_at and saved.chat.number == number
    if number == 1:
        say(saved.chat, THREE)
        assert states(saved) == [*killed_at, (2, ANSWERED, THREE)]
    else:  # the turn before is taken back with what was asked after it
        assert saved.chat.undo().question == ONE
        assert states(saved) == [] and saved.chat.number == 0
        say(saved.chat, THREE)
        assert states(saved) == [(1, ANSWERED, THREE)]
    saved.close()
    reopened(model).close()


def test_undo_takes_it_back(model: Model, killed_at: list) -> None:
    saved = reopened(model, TWO)
    assert saved.chat.undo().question == TWO
    assert states(saved) == killed_at[:-1] and not saved.chat.unanswered
    saved.close()
    assert TWO.encode() not in session_paths("x").database.read_bytes()
    again = reopened(model)
    assert states(again) == killed_at[:-1]
    say(again.chat, THREE)
    assert states(again) == [*killed_at[:-1], (len(killed_at), ANSWERED, THREE)]
    again.close()


def test_edit_replaces_it(model: Model, killed_at: list) -> None:
    saved, number = reopened(model, TWO), len(killed_at)
    list(saved.chat.edit(THREE))
    assert states(saved) == [*killed_at[:-1], (number, ANSWERED, THREE)]
    saved.close()
    assert TWO.encode() not in session_paths("x").database.read_bytes()
    again = reopened(model)
    assert again.chat.exchanges[-1].question == THREE
    again.close()


def test_clear_lets_it_stay_in_the_transcript(model: Model, killed_at: list) -> None:
    saved, number = reopened(model, TWO), len(killed_at)
    saved.chat.clear()
    assert states(saved) == killed_at and not saved.chat.unanswered
    saved.close()
    again = reopened(model)
    assert states(again) == killed_at and again.chat.exchanges == []
    say(again.chat, THREE)
    assert states(again) == [*killed_at, (number + 1, ANSWERED, THREE)]
    again.close()
    again = reopened(model)
    assert [e.question for e in again.chat.exchanges] == [THREE]
    again.close()


def test_another_prompt_or_window_leaves_it_to_be_answered(model: Model, killed_at: list) -> None:
    saved = reopened(model, TWO)
    saved.chat.restart("Be kind.", 130)
    assert saved.chat.unanswered == TWO and states(saved) == killed_at
    saved._let_go()  # killed once more
    again = open_session("x", model, replace(OPTIONS, system=None, window=None))
    assert again.chat.unanswered == TWO and again.chat.system == "Be kind."
    list(again.chat.retry())
    assert states(again) == [*killed_at[:-1], (len(killed_at), ANSWERED, TWO)]
    again.close()


def test_what_was_only_asked_is_shown_and_exported(model: Model, folder: Path) -> None:
    killed_in(folder, ONE, TWO)
    with manage.open_transcript("x") as store:
        header, turns = store.state.header, store.turns()
    text, first = export_markdown(header, turns), turns[0].exchange
    assert text.endswith(
        f"\n\n{first.reply}\n\n## 2. You\n\n{TWO}\n\n## 2. Model (did not answer)\n"
    )
    assert export_json(header, turns)["turns"] == [
        {"question": ONE, "reply": first.reply, "finish": first.finish},
        {"question": TWO, "reply": None, "finish": None},
    ]


# --- what is left ---


def test_what_the_dead_left_goes_with_the_session(model: Model, kills: Kills) -> None:
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
    with pytest.raises(SessionError, match="there is none"):
        manage.remove_session("x")
