"""What a killed program and a failing disk leave of a conversation: all that was committed."""

import errno
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_stream.chat import manage
from mlx_stream.chat.conversation import Conversation
from mlx_stream.chat.resume import open_session
from mlx_stream.chat.session_files import session_paths
from mlx_stream.errors import SessionError, SnapshotError
from mlx_stream.generate import snapshot
from mlx_stream.load import Model, load
from tests.fakes.faults import fault
from tests.fakes.killed_chat import OPTIONS, Kills, check_attended, left_over, tiny_folder

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


def say(conversation: Conversation, question: str = "And?") -> None:
    for _ in conversation.reply(question):
        pass


def begun(model: Model) -> Conversation:
    """Return a conversation with a snapshot, and a turn that is not in it."""
    conversation = open_session("x", model, OPTIONS)
    say(conversation, "Hello.")
    conversation.write_snapshot()
    say(conversation)
    return conversation


def test_a_killed_chat_loses_no_turn_it_committed(kills: Kills) -> None:
    for number in range(KILLS):
        kills.kill(number)
    kills.end()
    assert kills.committed > KILLS and len(kills.fell) >= 3


# --- faults ---


def opens(kills: Kills, conversation: Conversation) -> str:
    """See that a session verifies, and opens as it was; return what is said of its snapshot."""
    assert conversation.saved
    kills.said["x"] = conversation.saved.store.exchanges()
    # A folder that could not be removed; it is when the session is next opened or written.
    assert len(left_over(kills.home, "x")) <= 1
    whole = manage.verify_session("x")
    with kills.copied() as copy:
        notices: list[str] = []
        again = open_session("x", kills.model, OPTIONS, notices.append)
        assert left_over(copy, "x") == []
        assert not any("not a saved stream" in notice for notice in notices)
        check_attended(again, kills.said["x"])
        say(again)
        again.close()
        manage.verify_session("x")
    return whole


def failing(conversation: Conversation, point: int, act: Callable[[], Any]) -> list[str]:
    """Write a snapshot of a new turn with a fault; return the calls there were."""
    say(conversation)
    with fault(point, act) as calls:
        try:
            conversation.write_snapshot()
        except SnapshotError as error:
            assert "could not be written" in str(error) and "\n" not in str(error)
    return calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_any_step_of_a_snapshot(kills: Kills, model: Model, number: int) -> None:
    def act() -> None:
        raise OSError(number, os.strerror(number))

    conversation, path = begun(model), session_paths("x").snapshot
    calls = failing(conversation, NOWHERE, act)
    assert {"mkdir", "open", "fsync", "rename", "replace"} <= set(calls)
    assert calls[calls.index("replace") :].count("fsync") == 1, "the folder is flushed"
    kept = replaced = 0
    for point in range(len(calls)):
        before = path.read_bytes()
        failing(conversation, point, act)
        kept += path.read_bytes() == before
        replaced += path.read_bytes() != before
        stale = path.read_bytes() == before
        assert int(opens(kills, conversation).split()[-1]) == len(kills.said["x"]) - stale
        conversation.write_snapshot()
    assert kept >= 8 and replaced >= 2
    conversation.close()


def test_a_snapshot_that_does_not_fit_on_the_disk(kills: Kills, model: Model) -> None:
    conversation, path = begun(model), session_paths("x").snapshot
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (0, 5, 300, 4096, len(before) // 2, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(SnapshotError, match="could not be written"):
                conversation.write_snapshot()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert opens(kills, conversation).endswith("exchange 1")
    conversation.close()
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
conversation = open_session("x", load(Path(sys.argv[1]), dtype="float32"), OPTIONS)
for _ in conversation.reply("And?"):
    pass
with fault(int(sys.argv[2]), lambda: os._exit(9)) as calls:
    conversation.write_snapshot()
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
        before = snapshot.load_snapshot(path).about["count"]
        dead = die(point)
        assert dead.returncode == 9, dead.stderr
        found = snapshot.load_snapshot(path).about["count"]
        assert found in (before, number), "what was there, or what was being written"
        kept += found == before
        assert len(left_over(kills.home, "x")) <= 1
        manage.verify_session("x")
        with kills.copied() as copy:
            conversation = open_session("x", model, OPTIONS)
            assert conversation.saved and conversation.saved.store.count == number
            assert left_over(copy, "x") == []
            conversation.close()
    assert 5 < kept < len(points)


def test_a_full_database(kills: Kills, model: Model) -> None:
    conversation = begun(model)
    assert conversation.saved
    store = conversation.saved.store

    def pages(count: int) -> None:
        store.connection.execute(f"PRAGMA max_page_count = {count}").close()

    pages(store.connection.execute("PRAGMA page_count").fetchone()[0])
    with pytest.raises(SessionError, match="full"):
        while True:
            say(conversation, "Is there room? " * 6)
    kept = store.exchanges()
    for attempt in (
        lambda: list(conversation.retry()),
        lambda: conversation.set_system("Be brief. " * 9),
        conversation.undo,
    ):
        with pytest.raises(SessionError, match="full"):
            attempt()
        assert store.exchanges() == kept
        opens(kills, conversation)
    pages(2**30)
    say(conversation, "Now?")
    # What was said and taken back meanwhile is as it would be, had there been room.
    assert [e.question for e in store.exchanges()] == [*(e.question for e in kept), "Now?"]
    assert store.header.system == "Be brief. " * 9
    conversation.close()
    assert manage.verify_session("x").endswith(f"exchange {len(kept) + 1}")


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
