"""The assistant's answers, notes and settings, tested without a separate process."""

import doctest
import importlib
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_stream.errors import QueueFull
from mlx_stream_assistant import requests
from mlx_stream_assistant.cli import backlog
from mlx_stream_assistant.daemon import Assistant, waking_signals
from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.feeder import Feeder
from mlx_stream_assistant.journal import Chunk, Journal
from mlx_stream_assistant.notes import SETTLING, NoteSchedule, NotesFile, markdown
from mlx_stream_assistant.requests import RequestHandler
from mlx_stream_assistant.settings import Settings
from tests.fakes.engines import DEADLINE, GREEDY, engine_of

APP = Path(__file__).parents[2] / "apps" / "mlx_stream_assistant"
NOW = datetime(2026, 11, 27, 14, 5)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal" / "x.db")
    yield journal
    journal.close()


class Feeding:
    """A feeder of text that is not in a journal."""

    def __init__(self, listener: Any):
        self._listener, self.fed, self.characters, self.failure = listener, 0, 0, None
        self.waiting = self.saved = 0

    def feed(self, text: str) -> None:
        self._listener.feed(text)
        self.characters += len(text)

    read, speed = Feeder.read, Feeder.speed


def arrival(text: str) -> Chunk:
    return Chunk("x.log", "file", "x.log", text.encode(), text)


# --- questions and notes ---


@pytest.fixture
def handler(letters, journal, tmp_path):
    """Return a handler that answers from a stream that has been fed nothing."""
    with engine_of(letters) as engine:
        listener = engine.listen(window=300, sampling=GREEDY, max_tokens=5, backlog=10_000)
        listener.wait(DEADLINE)
        diary = NotesFile(tmp_path / "diary.md", journal)
        feeder: Any = SimpleNamespace(fed=0, read=0, speed=0.0, failure=None)
        yield RequestHandler(journal, diary, dict, lambda: None, listener, feeder)


def test_a_note_is_about_what_was_fed_and_the_next_about_the_rest(handler, journal):
    texts = ("One.\n", "Zwei äöü.\n", "Three.\n")
    for text in texts:
        journal.append(arrival(text))
    assert handler.note() is None
    handler.feeder.fed = 2
    count = len("".join(texts[:2]).encode())
    assert f"*{count:,} bytes read since the last note" in handler.note()
    assert handler.note() is None
    handler.feeder.fed = 3
    assert f"*{len(texts[2]):,} bytes read since the last note" in handler.note()


def test_the_asker_is_told_of_unread_text_unless_with_now(handler, monkeypatch):
    monkeypatch.setattr(requests, "BETWEEN_REPORTS", 0.01)
    handler.feeder = Feeding(handler.listener)
    handler.feeder.feed("and the man of the house " * 300)
    first = next(handler.answer({"what": "ask", "question": "Who?", "now": True}))
    assert first["text"]
    first, *more, last = handler.answer({"what": "ask", "question": "Who?"})
    reports = [first, *(line for line in more if "waiting" in line)]
    lefts = [line["waiting"] for line in reports]
    assert len(lefts) > 1 and lefts == sorted(lefts, reverse=True) and lefts[-1] > 500
    assert reports[-1]["seconds"] >= 0  # estimated from the speed so far
    assert more[len(reports) - 1 :] and all(line["text"] for line in more[len(reports) - 1 :])
    assert last["done"] and handler.listener.backlog == 0
    first, *_ = handler.answer({"what": "ask", "question": "Who?"})
    assert first["text"]
    with pytest.raises(AssistantError, match="at most 4,000 characters: use"):
        next(handler.answer({"what": "ask", "question": "x" * 4_001}))


def test_an_asker_does_not_wait_for_text_that_keeps_arriving(handler, monkeypatch):
    monkeypatch.setattr(requests, "BETWEEN_REPORTS", 0.01)
    feeder = handler.feeder = Feeding(handler.listener)
    feeder.feed("and the man of the house " * 40)
    lines = handler.answer({"what": "ask", "question": "Who?"})
    for line in lines:
        if "text" in line:
            break
        with suppress(QueueFull):
            while True:
                feeder.feed("and then " * 100)
    assert handler.listener.backlog > 0
    lines.close()


def test_an_answer_tells_since_when_the_window_reaches(handler, journal, monkeypatch):
    feeder = handler.feeder = Feeding(handler.listener)
    times = []
    for number in range(40):
        text = f"{number} and the man of the house said that he would\n"
        journal.append(arrival(text))
        minute = f"2026-11-27T14:{number:02}:00+00:00"
        journal._rows("UPDATE chunks SET time = ? WHERE number = ?", minute, number + 1)
        times.append(minute)
        (chunk,) = journal.chunks(number)
        feeder.feed(chunk.fed)
        feeder.fed = number + 1
        if number == 0:
            handler.listener.flush(DEADLINE)
            *_, last = handler.answer({"what": "ask", "question": "Who?"})
            assert "since" not in last  # nothing has left the window
    handler.listener.flush(DEADLINE)
    *_, last = handler.answer({"what": "ask", "question": "Who?"})
    status = next(handler.answer({"what": "status"}))
    assert last["since"] == status["since"] and status["tokens_per_second"] > 0
    # A line has about 25 tokens, and the window holds 300.
    attended = handler.listener.stats.attended - handler.listener.stats.pinned
    lines = attended / (handler.listener.stats.prompt_tokens / 40)
    assert abs(times.index(last["since"]) - (40 - lines)) <= 2


def test_nothing_the_model_says_is_a_heading_or_hides_others():
    for prefix in ("", "  ", "> ", "> - ", "1. "):
        for line in ("# A", "## A", "```", "<!-- A", "<h2>"):
            assert f"\n{prefix}\\{line}\n" in markdown(f"A\n{prefix}{line}", NOW, "about")
    for line in ("---", "> ==="):
        escaped = line.replace("---", "\\---").replace("===", "\\===")
        assert f"\n{escaped}\n" in markdown(f"A\n{line}", NOW, "about")
    for line in ("- A #1 < 2", "A - B"):
        assert f"\n{line}\n" in markdown(f"A\n{line}", NOW, "about")


# --- when a note is due ---


@pytest.mark.parametrize(
    ("minutes_ago", "seconds"),
    [(None, 3_600), (50, 600), (59.5, SETTLING), (600, SETTLING), (-60 * 24 * 365, 3_600)],
    ids=["never", "a while ago", "just about due", "due", "before the clock was set back"],
)
def test_when_the_first_note_of_a_run_is_due(monkeypatch, minutes_ago, seconds):
    schedule = NoteSchedule(3_600, 0 if minutes_ago is None else time.time() - 60 * minutes_ago)
    begun = time.time()
    monkeypatch.setattr(time, "time", lambda: begun + seconds - 5)
    assert not schedule.is_due()
    monkeypatch.setattr(time, "time", lambda: begun + seconds + 5)
    assert schedule.is_due()


@pytest.mark.parametrize("clock", ["monotonic", "time"])
def test_a_note_is_due_by_either_clock(monkeypatch, clock):
    """One clock stops while a Mac sleeps, and the other may be set back."""
    schedule, now = NoteSchedule(3_600, 0), getattr(time, clock)()
    assert not schedule.is_due()
    monkeypatch.setattr(time, clock, lambda: now + 3_601)
    assert schedule.is_due()
    schedule.restart()
    assert not schedule.is_due()


def test_a_source_that_cannot_be_kept_does_not_keep_others_out(journal):
    def source(text):
        taken = SimpleNamespace(source="x", kind="file", title="x", data=b"x", text=text)
        return SimpleNamespace(poll=lambda: Chunk(**vars(taken)), ack=lambda chunk: None)

    said = []
    assistant: Any = Assistant(Settings(stdin=True), said.append)
    assistant._journal, assistant.handler = journal, SimpleNamespace(feeder=None)
    # Text that cannot be encoded cannot be written.
    assistant._sources = [source("\udce9"), source("good"), source("\udce9")]
    assert assistant._read()
    assert [chunk.text for chunk in journal.chunks(0)] == ["good"]
    assert len(said) == 1 and "trying again" in said[0]


def test_status_tells_what_is_left_and_whether_it_becomes_more(monkeypatch):
    assistant: Any = Assistant(Settings(stdin=True), print)
    sizes, now = iter([15_000, 5_000, 20_000, 30_000, 25_000, 40_000, 40_000]), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    found = []
    for size in sizes:
        assistant._sources = [SimpleNamespace(state={"size": size + 9, "offset": 9})]
        assistant._compare_unread()
        assistant._compare_unread()  # within the same minute
        found.append(assistant._falls_behind)
        now += 61
    assert found == [False, False, True, True, False, True, False]
    status = {"backlog": 600, "bytes_unread": 5_400, "falls_behind": False}
    status |= {"characters_per_second": 10.0, "tokens_per_second": 2.4}
    assert backlog(status) == "6,000 characters to read, 10 minutes at 2 tokens a second"
    assert "falling behind" in backlog({**status, "falls_behind": True})
    status |= {"backlog": 0, "bytes_unread": 0}
    assert backlog(status) == "0 characters to read; it reads at 2 tokens a second"
    assert backlog({**status, "characters_per_second": 0.0}) == "0 characters to read"


def test_a_note_that_is_followed_later_is_a_file(journal, tmp_path):
    path = tmp_path / "a.md"
    journal.append(Chunk(str(path), "note", "a.md", b"once\n", "once\n", {"seen": [1, 2, 3]}))
    assistant: Any = Assistant(Settings(follow=[path], folder=[tmp_path]), print)
    assistant._journal = journal
    assistant._open_sources()
    followed, folder = assistant._sources
    assert followed.state["offset"] == 0 and folder.state["notes"] == 1


def test_a_signal_that_was_to_be_ignored_is(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stopped = []
        with waking_signals(lambda: stopped.append(1)):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopped
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- settings ---


def test_a_path_is_read_once_however_it_is_spelled(tmp_path):
    log, folder = tmp_path / "x.log", tmp_path / "notes"
    spelled = [log, tmp_path / "notes" / ".." / "x.log"]
    settings = Settings(follow=spelled, folder=[folder, folder / "."]).with_absolute_paths()
    assert settings.follow == [log] and settings.folder == [folder]
    for model in ("x" * 5_000, "\0"):  # these cannot be paths
        assert Settings(model=model).with_absolute_paths().model == model
    with pytest.raises(AssistantError, match="is inside"):
        Settings(folder=[folder, folder / "a"]).check()


@pytest.mark.parametrize("what", ["follow", "folder", "notes", "system"])
def test_words_that_are_not_utf_8_are_refused_and_links_are_only_paths(tmp_path, what):
    bad = tmp_path / os.fsdecode(b"caf\xe9.log")
    value: Any = {"notes": bad, "system": str(bad)}.get(what, [bad])
    with pytest.raises(AssistantError, match=r"caf\\udce9.log.*is not valid UTF-8"):
        replace(Settings(follow=[tmp_path]), **{what: value}).check()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    Settings(follow=[tmp_path / "x"], notes=loop).check()


# --- docstrings ---


def test_the_examples_in_its_docstrings_are_true():
    names = [path.stem for path in APP.glob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
    modules = [importlib.import_module(f"mlx_stream_assistant.{name}") for name in names]
    found = [doctest.testmod(module) for module in modules]
    assert len(found) > 3 and all(result.attempted and not result.failed for result in found)
