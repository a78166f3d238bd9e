"""Slash commands: which lines are commands, what each does to a conversation, and its answer."""

import json
import re
from pathlib import Path

import pytest

import mlx_stream
from mlx_stream.chat.exchange import question_of
from mlx_stream.chat.manage import open_transcript
from mlx_stream.chat.messages import Message
from mlx_stream.chat.recorder import Change
from mlx_stream.chat.resume import SessionOptions, new_chat, open_session
from mlx_stream.chat.saving import saved_as
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import session_names, session_paths
from mlx_stream.cli.commands import COMMANDS, Call, completions, parse, run, status
from mlx_stream.errors import SessionError
from mlx_stream.generate.model import Model
from mlx_stream.generate.stats import Stats
from mlx_stream.load import load
from mlx_stream.program.lock import Lock
from mlx_stream.program.notices import discard
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.shell import SMALL
from tests.fakes.tiny import tiny_config, write_letters

QUESTIONS = ("Who\nwrote it?", "Who\nread it?")
OPTIONS = SessionOptions("Be brief.", 200, sampling=Sampling(0), max_tokens=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """Return a model that writes letters forever and has a context of 4,096 tokens."""
    config = tiny_config(**SMALL, max_position_embeddings=4_096)
    return load(write_letters(tmp_path_factory.mktemp("commands"), config), dtype="float32")


@pytest.fixture
def chat(model: Model) -> ChatSession:
    """Return an unsaved conversation of two exchanges."""
    return asked(new_chat(model, OPTIONS, discard))


@pytest.fixture
def saved(model: Model):
    """Yield a conversation of two exchanges, saved as `letters`."""
    one = open_session("letters", model, OPTIONS)
    asked(one.chat)
    yield one
    one.close()


def asked(chat: ChatSession) -> ChatSession:
    for question in QUESTIONS:
        assert len(said(chat.reply(question))) == 7
    return chat


def say(line: str, chat: ChatSession, progress=None):
    call = parse(line)
    assert isinstance(call, Call)
    return run(call, chat, progress)


def everything(chat: ChatSession) -> tuple[object, ...]:
    """Return everything in a conversation that a command may change."""
    files = saved_as(chat)
    return (
        chat.exchanges,
        chat.conversation_state(),
        chat.tokens.ids.attended(),
        (chat.system, chat.stats.window, chat.unanswered),
        files and (files.name, files.store.turns()),
        session_names(),
    )


def questions(chat: ChatSession) -> list[str]:
    return [exchange.question for exchange in chat.exchanges]


def written(name: str) -> list[str]:
    """Return the questions in a session's transcript."""
    with open_transcript(name) as store:
        return [turn.exchange.question for turn in store.turns()]


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("Hello", "Hello"),
        ("  /help", "  /help"),
        ("first\n/help", "first\n/help"),
        ("//etc/hosts says", "/etc/hosts says"),
        ("//", "/"),
        ("/help", Call("/help")),
        ("/help  ", Call("/help")),
        ("/system Be  brief.\nAnd kind. ", Call("/system", "Be  brief.\nAnd kind.")),
        ("/system\nBe brief.", Call("/system", "Be brief.")),
        ("/window 512", Call("/window", "512")),
        ("/", Call("/")),
        ("/ help", Call("/", "help")),
        ("/usr/bin is what?", Call("/usr/bin", "is what?")),
    ],
)
def test_a_line_is_a_command_or_a_question(line, parsed):
    assert parse(line) == parsed


@pytest.mark.parametrize("line", ["/", "/ help", "/exit", "/usr/bin is what?", "/HELP", "/re"])
def test_an_unknown_command_is_answered_by_one_line_and_changes_nothing(line, chat):
    before = everything(chat)
    outcome = say(line, chat)
    assert f"Unknown command {line.split()[0]!r}" in outcome.text
    assert "/help" in outcome.text and "\n" not in outcome.text
    assert (outcome.pieces, outcome.prefill, outcome.quit) == (None, "", False)
    assert everything(chat) == before


def answered(outcome, text: str) -> None:
    """Check that a command was answered with this text and nothing else."""
    assert (outcome.text, outcome.pieces, outcome.prefill, outcome.quit) == (text, None, "", False)


def test_retry_answers_the_last_question_once_more(saved):
    told, before = [], saved.chat.exchanges
    outcome = say("/retry", saved.chat, progress=lambda *read: told.append(read))
    assert outcome.text == "" and outcome.pieces and saved.chat.exchanges == before
    assert said(outcome.pieces) == before[-1].reply  # decoding is greedy
    assert told == [(1, 1)] and saved.chat.exchanges == before
    assert written("letters") == [*QUESTIONS]


@pytest.mark.parametrize("question", ["Who read it?\nWhen?", "/etc?"])
def test_edit_asks_another_question_in_place_of_the_last(saved, question):
    before = everything(saved.chat)
    prefill = say("/edit", saved.chat).prefill
    assert prefill == "/edit Who\nread it?" and parse(prefill) == Call("/edit", "Who\nread it?")
    assert everything(saved.chat) == before
    told = []
    outcome = say(f"/edit {question}", saved.chat, progress=lambda *read: told.append(read))
    assert outcome.text == "" and outcome.pieces
    assert len(said(outcome.pieces)) == 7
    assert told and told[-1][0] == told[-1][1]
    assert questions(saved.chat) == [QUESTIONS[0], question] == written("letters")
    assert_well_formed(saved.chat)


def test_undo_and_clear(saved, tmp_path):
    chat = saved.chat
    answered(say("/undo", chat), "removed: Who read it?")
    assert questions(chat) == [QUESTIONS[0]] == written("letters")
    answered(say("/clear", chat), "only the system prompt is attended to now")
    assert chat.exchanges == [] and written("letters") == [QUESTIONS[0]]
    assert tuple(chat.tokens.ids.attended()) == chat.prompts.pinned
    said(chat.reply("Why?"))
    # Exchanges that are no longer attended are exported too.
    assert say(f"/export {tmp_path / 'all.json'}", chat).text.startswith("2 exchanges")
    turns = json.loads((tmp_path / "all.json").read_text())["turns"]
    assert [turn["question"] for turn in turns] == [QUESTIONS[0], "Why?"]
    assert say("/quit", chat).quit


@pytest.mark.parametrize(
    ("line", "prompt", "text"),
    [
        ("/system Be kind.", "Be kind.", "the system prompt has changed"),
        ("/system ''", None, "there is no system prompt now"),
        ('/system ""', None, "there is no system prompt now"),
        ("/window 512", "Be brief.", "the window is 512 tokens, in addition to 4 that always stay"),
        (
            "/window 2,048",
            "Be brief.",
            "the window is 2,048 tokens, in addition to 4 that always stay",
        ),
    ],
)
def test_another_system_prompt_or_window_keeps_the_conversation(saved, line, prompt, text):
    answered(say("/system", saved.chat), "Be brief.")
    sinks = saved.chat.stats.sinks
    always = f"in addition to {sinks} that always stay"
    answered(say("/window", saved.chat), f"the window is 200 tokens, {always}")
    answered(say(line, saved.chat), text.replace("in addition to 4 that always stay", always))
    header = saved.store.state.header
    assert saved.chat.system == prompt == header.system
    size = int(line.split()[1].replace(",", "")) if "window" in line else 200
    assert saved.chat.stats.window == size == header.window == saved.chat.cache.geometry.window
    assert questions(saved.chat) == [*QUESTIONS]
    assert_well_formed(saved.chat)


def test_save_gives_a_conversation_a_name_and_later_writes_its_state(chat):
    assert "give it one with /save NAME" in say("/save", chat).text and session_names() == []
    named = "saved as my-letters; to continue it: mlx_stream chat --session my-letters"
    answered(say("/save my-letters", chat), named)
    assert session_names() == ["my-letters"] and written("my-letters") == [*QUESTIONS]
    snapshot = session_paths("my-letters").snapshot
    first = snapshot.read_bytes()
    said(chat.reply("Why?"))
    assert written("my-letters") == [*QUESTIONS, "Why?"] and snapshot.read_bytes() == first
    for line in ("/save", "/save my-letters"):
        answered(say(line, chat), named)
        assert snapshot.read_bytes() != first
    assert re.fullmatch(r"my-letters  [-\d]{10} [:\d]{5}  3 exchanges", say("/sessions", chat).text)
    refused = say("/save other", chat).text
    assert "saved as 'my-letters'" in refused and session_names() == ["my-letters"]
    files = saved_as(chat)
    assert files
    files.close()


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("/export talk.md", "here/talk.md"),
        ("/export 'my talk.json'", "here/my talk.json"),
        ('/export "my talk.json"', "here/my talk.json"),
        ("/export ~/talk.md", "talk.md"),
    ],
)
def test_export_writes_the_conversation(chat, tmp_path, monkeypatch, line, file):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    before, path = everything(chat), tmp_path / file
    outcome = say(line, chat)
    assert outcome.text.startswith("2 exchanges written to ")
    assert outcome.text.endswith(str(path) if "~" in line else path.name)
    text = path.read_text("utf-8")
    if path.suffix == ".json":
        assert [turn["question"] for turn in json.loads(text)["turns"]] == [*QUESTIONS]
    assert all(exchange.reply in text for exchange in chat.exchanges)
    assert everything(chat) == before
    again = say(line, chat).text
    assert "use another" in again and path.read_text("utf-8") == text


def test_an_empty_conversation_has_nothing_to_edit_or_retry(model):
    chat = new_chat(model, SessionOptions(), discard)
    answered(say("/system", chat), "there is no system prompt")
    for line, what in (("edit", "edit"), ("edit a", "edit"), ("retry", "answer again")):
        said = f"there is nothing to {what}: no question has been asked yet"
        answered(say(f"/{line}", chat), said)


def test_a_question_that_was_not_answered_before_can_be_retried_edited_and_taken_back(chat):
    def broken_off() -> None:
        chat.number, chat.pending = 3, question_of((Message("user", "Why?"),))

    broken_off()
    answered(say("/undo", chat), "removed: Why?")
    broken_off()
    assert say("/edit", chat).prefill == "/edit Why?"
    pieces = say("/retry", chat).pieces
    assert pieces and len(said(pieces)) == 7
    assert questions(chat) == [*QUESTIONS, "Why?"] and chat.number == 3
    say("/undo", chat)
    broken_off()
    pieces = say("/edit And when?", chat).pieces
    assert pieces and len(said(pieces)) == 7
    assert questions(chat) == [*QUESTIONS, "And when?"] and chat.number == 3
    assert_well_formed(chat)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/undo 3", "/undo takes no argument: leave out '3'"),
        ("/window wide", "/window takes a whole number of tokens, not 'wide'"),
        ("/window " + "9" * 5000, "/window takes a whole number of tokens, not '9999"),
        ("/window 0", "`window` must be at least 1"),
        ("/window 8,000", "window 8,000 = "),
        ("/system " + "word " * 2_000, "the system prompt of 6,009 tokens"),
        ("/save a/b", "a/b"),
        ("/save taken", "session 'taken' "),
        ("/export", "/export needs an argument: /export FILE"),
        ("/export ~nobody-of-this-name/a.md", "/export ~nobody-of-this-name/a.md: "),
        ("/export talk\nof.txt", "talk of.txt: the name must end in .md or .json"),
        ("/export no-such-folder/talk.md", "no-such-folder/talk.md: cannot be written: "),
    ],
)
def test_a_refused_command_is_one_line_and_changes_nothing(line, text, chat):
    with Lock.acquire(session_paths("taken").lock):
        before = everything(chat)
        outcome = say(line, chat)
        assert text in outcome.text
        assert len(outcome.text) < 250 and "\n" not in outcome.text
        answered(outcome, outcome.text)
        assert everything(chat) == before
    assert chat.recorder is None


class FullDisk:
    """A recorder that cannot write."""

    def record(self, change: Change) -> None:
        pass

    def flush(self) -> None:
        raise SessionError("the disk\nis full")


@pytest.mark.parametrize("line", ["/undo", "/clear", "/system a", "/window 100"])
def test_a_full_disk_is_one_line(line, chat):
    chat.recorder = FullDisk()
    answered(say(line, chat), "the disk is full")
    pieces = say("/retry", chat).pieces  # an error in the reply is raised where it is read
    assert pieces or line == "/clear"
    if pieces:
        with pytest.raises(SessionError, match="full"):
            said(pieces)


def test_a_snapshot_that_cannot_be_written_is_one_line(saved):
    path = session_paths("letters").snapshot
    path.mkdir(parents=True)
    text = say("/save", saved.chat).text
    assert "the conversation is saved, but the stream's state is not" in text and "\n" not in text
    path.rmdir()
    assert say("/save", saved.chat).text.startswith("saved as letters")


def test_answers_are_escaped(chat):
    clears, escaped = "a\x1b[2J", "a\\x1b[2J"
    said(chat.reply(clears))
    assert say("/undo", chat).text == f"removed: {escaped}"
    say(f"/system {clears}", chat)
    assert say("/system", chat).text == escaped
    assert escaped in say(f"/export {clears}", chat).text
    assert "\x1b" not in say("/\x1b[2J", chat).text


def test_help_stats_and_sessions_change_nothing(chat):
    before = everything(chat)
    answered(say("/stats", chat), str(chat.stats))
    assert say("/sessions", chat).text.startswith("there are no saved sessions")
    lines = say("/help", chat).text.splitlines()
    assert [line.split()[0] for line in lines] == [*COMMANDS, "//TEXT", "@FILE"]
    assert all(help in line for help, line in zip(completions().values(), lines, strict=False))
    assert list(completions()) == list(COMMANDS)
    assert max(map(len, lines)) < 80 and everything(chat) == before


def test_the_readme_lists_every_command():
    text = (Path(mlx_stream.__file__).parent / "chat/README.md").read_text("utf-8")
    listed = re.search(r"`/help` lists\s`([^`]+)`", text)
    assert listed and sorted(listed[1].split()) == sorted({*COMMANDS} - {"/help"})


def test_the_status_bar_tells_attention_speed_and_memory():
    counts = {"attended": 1012, "evicted": 3400, "sinks": 4, "window": 2048}
    speed = {"cache_bytes": 94_600_000, "decoded_tokens": 123, "reply_seconds": 10.0}
    text = "1,012/2,052 attended · 3,400 evicted · 12.3 tok/s · cache 94.6 MB"
    assert status(Stats(**counts, **speed)) == text
    assert status(Stats(**counts, **speed), "letters") == f"{text} · letters"
