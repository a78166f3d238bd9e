"""What the assistant answers and when, without a process of its own; and what it refuses."""

import doctest
import errno
import importlib
import os
import resource
import signal
import socket
import tempfile
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_stream_assistant import cli
from mlx_stream_assistant import socket_server as doors
from mlx_stream_assistant.daemon import SETTLING, Assistant, Wake
from mlx_stream_assistant.journal import Chunk, Journal
from mlx_stream_assistant.notes import NotesFile, markdown
from mlx_stream_assistant.paths import AssistantError
from mlx_stream_assistant.requests import RequestHandler
from mlx_stream_assistant.settings import Settings
from mlx_stream_assistant.socket_server import SocketServer, request
from tests.fakes.engines import DEADLINE, GREEDY, engine_of, eventually

APP = Path(__file__).parents[2] / "apps" / "mlx_stream_assistant"
NOW = datetime(2026, 11, 27, 14, 5)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal" / "x.db")
    yield journal
    journal.close()


def arrival(text: str) -> Chunk:
    return Chunk("x.log", "file", "x.log", text.encode(), text)


# --- questions and notes ---


@pytest.fixture
def desk(letters, journal, tmp_path):
    """Have a desk that answers from a stream which was fed nothing."""
    with engine_of(letters) as engine:
        listener = engine.listen(window=300, sampling=GREEDY, max_tokens=5, backlog=10_000)
        listener.wait(DEADLINE)
        diary = NotesFile(tmp_path / "diary.md", journal)
        feeder: Any = SimpleNamespace(fed=0)
        yield RequestHandler(journal, diary, dict, lambda: None, listener, feeder)


def test_a_note_is_about_what_was_fed_and_the_next_about_the_rest(desk, journal):
    texts = ("One.\n", "Zwei äöü.\n", "Three.\n")
    for text in texts:
        journal.append(arrival(text))
    assert desk.note() is None
    desk.feeder.fed = 2
    count = len("".join(texts[:2]).encode())
    assert f"*{count:,} bytes read since the last note" in desk.note()
    assert desk.note() is None
    desk.feeder.fed = 3
    assert f"*{len(texts[2]):,} bytes read since the last note" in desk.note()


def test_what_waits_to_be_read_is_said_unless_nobody_waits_for_it(desk):
    desk.listener.feed("and the man of the house " * 300)
    first = next(desk.answer({"what": "ask", "question": "Who?", "now": True}))
    assert first["text"]
    first, *answer, last = desk.answer({"what": "ask", "question": "Who?"})
    assert first["waiting"] > 500 and last == {"done": True}
    assert all(line["text"] for line in answer)
    assert desk.listener.backlog == 0
    first, *_ = desk.answer({"what": "ask", "question": "Who?"})
    assert first["text"]


def test_a_question_that_is_a_text_is_refused(desk):
    with pytest.raises(AssistantError, match="at most 4,000 characters: have it read"):
        next(desk.answer({"what": "ask", "question": "x" * 4_001}))


def test_nothing_the_model_says_is_a_heading_or_hides_others():
    for prefix in ("", "  ", "> ", "> - ", "1. "):
        for line in ("# A", "## A", "```", "<!-- A", "<h2>"):
            assert f"\n{prefix}\\{line}\n" in markdown(f"A\n{prefix}{line}", NOW, "about")
    for line in ("---", "> ==="):
        escaped = line.replace("---", "\\---").replace("===", "\\===")
        assert f"\n{escaped}\n" in markdown(f"A\n{line}", NOW, "about")
    for line in ("- A #1 < 2", "A - B"):
        assert f"\n{line}\n" in markdown(f"A\n{line}", NOW, "about")


# --- when ---


def built(journal) -> Any:
    assistant = Assistant(Settings(stdin=True), lambda line: None)
    assistant._journal = journal
    return assistant


@pytest.mark.parametrize(
    ("minutes_ago", "seconds"),
    [(None, 3_600), (50, 600), (59.5, SETTLING), (600, SETTLING), (-60 * 24 * 365, 3_600)],
    ids=["never", "a while ago", "just about due", "due", "before the clock was set back"],
)
def test_when_the_first_note_of_a_run_is_due(journal, minutes_ago, seconds):
    if minutes_ago is not None:
        journal.begin_note({}, 0, time.time() - 60 * minutes_ago)
    assert built(journal)._until_the_next_note() == pytest.approx(seconds, abs=5)


@pytest.mark.parametrize(("clock", "date"), [(0, -60), (-60, 0)], ids=["slept", "set back"])
def test_a_note_is_due_by_either_clock(journal, monkeypatch, clock, date):
    """A Mac that sleeps stops one of them, and the other may be set back."""
    assistant = built(journal)
    assistant._note_in(30)
    assert not assistant._note_is_due()
    due, when = assistant._next_note
    assistant._next_note = due + clock, when + date
    assert assistant._note_is_due()


def test_a_source_that_cannot_be_kept_does_not_keep_others_out(journal):
    def source(text):
        taken = SimpleNamespace(source="x", kind="file", title="x", data=b"x", text=text)
        return SimpleNamespace(poll=lambda: Chunk(**vars(taken)), ack=lambda arrival: None)

    said = []
    assistant = built(journal)
    assistant._tell, assistant.desk = said.append, SimpleNamespace(feeder=None)
    # What cannot be encoded cannot be written.
    assistant._sources = [source("\udce9"), source("good"), source("\udce9")]
    assert assistant._read()
    assert [chunk.text for chunk in journal.chunks(0)] == ["good"]
    assert len(said) == 1 and "tried again" in said[0]


def test_a_place_is_kept_also_when_nothing_was_read(journal):
    journal.append(Chunk("x.log", "file", "x.log", b"", "", {"offset": 7}))
    assert journal.source("x.log").place == {"offset": 7}
    assert journal.last == 0 and journal.bytes == 0


def test_a_signal_that_was_to_be_ignored_is(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stopped = []
        with Wake(lambda: stopped.append(1)):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopped
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- the socket ---


@pytest.fixture
def door():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        door = SocketServer(
            Path(folder) / "s.sock", lambda asked: (line for line in [{"done": True}])
        )
        yield door
        door.close()


def test_what_is_too_long_is_refused_before_it_is_sent():
    with pytest.raises(AssistantError, match="too long"):
        list(request(Path("/nowhere.sock"), "main", what="ask", question="ж" * 20_000))


def test_without_descriptors_it_waits(door):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(door.path))
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                os.dup(0)
            begun = time.monotonic()
            door.admit()
            assert time.monotonic() - begun >= doors.BRIEFLY
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        doors.send(caller, {"what": "status"})
        door.admit()
        assert caller.makefile("rb").readline() == b'{"done": true}\n'
        eventually(lambda: door._at_once._value == doors.MOST_AT_ONCE)


# --- what it is told to read ---


def test_a_path_is_read_once_however_it_is_spelled(tmp_path):
    log, folder = tmp_path / "x.log", tmp_path / "notes"
    spelled = [log, tmp_path / "notes" / ".." / "x.log"]
    settings = cli.settings_of(spelled, [folder, folder / "."], None, model="starter")
    assert settings.follow == (log,) and settings.folders == (folder,)
    for model in ("x" * 5_000, "\0"):  # no paths
        assert cli.settings_of([log], None, None, model=model).model == model
    with pytest.raises(AssistantError, match="read as a part of"):
        cli.settings_of(None, [folder, folder / "a"], None, model="starter").check()


@pytest.mark.parametrize("what", ["follow", "folders", "notes", "system"])
def test_what_is_no_text_is_refused(tmp_path, what):
    bad = os.fsdecode(b"caf\xe9.log")
    given: dict[str, Any] = {"follow": (tmp_path / "x.log",), what: bad}
    if what != "system":
        given[what] = tmp_path / bad if what == "notes" else (tmp_path / bad,)
    with pytest.raises(AssistantError, match=r"caf\\udce9.log.*is not valid UTF-8"):
        Settings(**given).check()


def test_a_loop_of_links_is_only_a_path(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    Settings(follow=(loop,), notes=tmp_path / "diary.md").check()
    Settings(follow=(tmp_path / "x",), notes=loop).check()


# --- what is written about it ---


def test_the_examples_in_its_docstrings_are_true():
    names = [path.stem for path in APP.glob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
    found = [
        doctest.testmod(importlib.import_module(f"mlx_stream_assistant.{name}")) for name in names
    ]
    assert len(found) > 4 and all(result.attempted and not result.failed for result in found)
