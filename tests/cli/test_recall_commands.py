"""Commands about what has left the window: what they answer, and what is left in files."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_stream.chat.resume import SessionOptions, new_chat, open_session
from mlx_stream.chat.saving import saved_as
from mlx_stream.chat.schema import ASKED
from mlx_stream.cli import app
from mlx_stream.cli.commands import Call, parse, run, status
from mlx_stream.cli.history import LineHistory, remove_lines
from mlx_stream.generate.model import Model
from mlx_stream.load import load
from mlx_stream.program.notices import discard
from mlx_stream.recall.quote import BEGIN
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import said
from tests.fakes.shell import SMALL, program
from tests.fakes.tiny import tiny_config, write_letters

SECRET = "My zebra is called Quagga."
OPTIONS = SessionOptions("Be brief.", 400, sampling=Sampling(0), max_tokens=7, recall_tokens=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    config = tiny_config(**SMALL, max_position_embeddings=4_096)
    return load(write_letters(tmp_path_factory.mktemp("recall"), config), dtype="float32")


@pytest.fixture
def saved(model: Model):
    """Yield a saved conversation whose first exchange has left the window."""
    one = open_session("letters", model, OPTIONS)
    for question in (SECRET, *(f"Let us talk of number {n} now." for n in range(6))):
        said(one.chat.reply(question))
    yield one
    one.close()


def say(line: str, chat) -> str:
    call = parse(line)
    assert isinstance(call, Call)
    return run(call, chat).text


def typed(*lines: str) -> Path:
    path = Path(os.environ["MLX_STREAM_HOME"], "history")
    history = LineHistory(path, print)
    for line in lines:
        history.store_string(line)
    return path


def lines_of(path: Path) -> list[str]:
    return [*LineHistory(path, print).load_history_strings()][::-1]


def test_recall_shows_what_was_quoted_and_finds_the_rest(saved):
    chat = saved.chat
    said(chat.reply("Hi!"))
    assert say("/recall", chat) == "nothing was quoted before the last question"
    said(chat.reply("What is my zebra called?"))
    shown = say("/recall", chat)
    assert shown.startswith("1 · ") and "of the question: zebra" in shown and SECRET in shown
    assert "1 recalled" in status(chat.stats)
    before = chat.tokens.ids.attended()
    assert SECRET in say("/recall zebras", chat)
    assert "no exchange" in say("/recall walrus", chat)
    assert chat.tokens.ids.attended() == before


def test_what_was_quoted_is_shown_without_terminal_controls(saved):
    chat, controls = saved.chat, "\x1b\x9b\u202e\0"
    said(chat.reply("My walrus is \x1b[31mred\x9b31m \u202egnorw\u202c\0."))
    for number in range(6):
        said(chat.reply(f"Let us talk of number {number} now."))
    said(chat.reply("What is my walrus?"))
    for line in ("/recall", "/recall walrus"):
        shown = say(line, chat)
        assert "My walrus is " in shown and not any(one in shown for one in controls)


def test_forget_removes_an_exchange_and_the_line_that_asked_it(saved):
    path = typed(SECRET, f"/edit {SECRET}", "Hello", "two\nlines")
    assert say("/forget 1", saved.chat) == "exchange 1 is deleted"
    assert lines_of(path) == ["Hello", "two\nlines"] and path.stat().st_mode & 0o077 == 0
    home = Path(os.environ["MLX_STREAM_HOME"])
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) > 3 and not any(b"uagga" in path.read_bytes() for path in files)
    said(saved.chat.reply("What is my zebra called?"))
    assert saved.chat.recalled == ()
    for line, text in (
        ("/forget 7", "/undo"),
        ("/forget 99", "does not exist"),
        ("/forget x", "takes a number"),
        ("/forget", "needs an argument"),
    ):
        assert text in say(line, saved.chat)


def test_clear_and_rm_remove_what_was_typed(saved):
    path = typed(SECRET, "Let us talk of number 5 now.", "Hello")
    say("/clear", saved.chat)
    assert lines_of(path) == ["Hello"]
    said(saved.chat.reply("Farewell"))
    typed("Farewell")
    saved.close()
    assert CliRunner().invoke(app, ["sessions", "rm", "letters"]).exit_code == 0
    assert lines_of(path) == ["Hello"]
    assert not [*Path(os.environ["MLX_STREAM_HOME"]).rglob("letters*")]


def test_pin_adds_to_the_system_prompt(saved):
    assert "pinned" in say("/pin Answer in French.", saved.chat)
    assert saved.chat.system == "Be brief.\nAnswer in French."
    assert saved.chat.stats.pinned == len(saved.chat.prompts.pinned)


def test_an_unsaved_chat_cannot_recall(model):
    chat = new_chat(model, SessionOptions(window=200), discard)
    for line in ("/recall", "/recall zebra", "/forget 1"):
        assert "/save NAME" in say(line, chat)
    assert status(chat.stats).count("recalled") == 0


def close(chat) -> None:
    saved = saved_as(chat)
    assert saved
    saved.close()


def test_save_starts_recall(model):
    """What leaves afterwards is quoted, and room for it is kept as if recall had always been on."""
    options = SessionOptions("Be brief.", 1_600, max_tokens=7, recall_tokens=None)
    chat = new_chat(model, options, discard)
    said(chat.reply(SECRET))
    say("/save late", chat)
    for number in range(40):
        said(chat.reply(f"Let us talk of number {number} now."))
        assert chat.cache.room >= 200
    said(chat.reply("What is my zebra called?"))
    assert SECRET in say("/recall", chat)
    ids = chat.tokens.ids.attended()
    close(chat)
    again = open_session("late", model, SessionOptions(recall_tokens=None))
    assert again.chat.tokens.ids.attended() == ids
    again.close()


def test_save_starts_no_recall_that_was_turned_off(model):
    chat = new_chat(model, SessionOptions(window=600, max_tokens=7, recall_tokens=0), discard)
    say("/save never", chat)
    assert say("/recall", chat) == "recall is off: --recall B turns it on"
    close(chat)


def everything_attended(chat) -> tuple:
    return chat.exchanges, chat.tokens.ids.attended(), chat.conversation_state()


def test_a_kill_during_a_reply_with_a_quotation_leaves_none_of_it(
    model, saved, tmp_path, monkeypatch
):
    """The attended text is a suffix of what it was, and the question is answered as in a twin."""
    question, home = "What is my zebra called?", Path(os.environ["MLX_STREAM_HOME"])
    before = everything_attended(saved.chat)
    saved.close()
    shutil.copytree(home, tmp_path / "twin")
    options = ("--session", "letters", "--recall", 200, "--temp", 0, "--max-tokens", 100_000)
    with subprocess.Popen(
        program("chat", model.name, *options), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as killed:
        assert killed.stdin and killed.stdout
        killed.stdin.write(f"{question}\n".encode())
        killed.stdin.flush()
        assert len(killed.stdout.read(40)) == 40  # in the middle of the reply
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) > 3 and not any(BEGIN.encode() in path.read_bytes() for path in files)
    again = open_session("letters", model, OPTIONS)
    turn = again.store.turns()[-1]
    assert (turn.state, turn.exchange.question, turn.exchange.reply) == (ASKED, question, "")
    now = everything_attended(again.chat)
    pinned, kept = len(again.chat.prompts.pinned), len(now[1])
    assert again.chat.unanswered == question and now[0] == before[0][-len(now[0]) :] != []
    assert now[1] == before[1][:pinned] + before[1][pinned - kept :]
    reply = said(again.chat.retry())
    assert SECRET in [passage.question for passage in again.chat.recalled]
    after = everything_attended(again.chat)
    assert BEGIN not in model.tokenizer.decode(after[1])
    again.close()
    monkeypatch.setenv("MLX_STREAM_HOME", str(tmp_path / "twin"))
    twin = open_session("letters", model, OPTIONS)
    pieces = twin.chat.reply(question, 100_000)  # makes as much room as the killed one did
    next(pieces)
    pieces.close()
    assert said(twin.chat.retry()) == reply
    assert everything_attended(twin.chat) == after
    twin.close()


def test_search_finds_exchanges_of_every_conversation(saved):
    saved.close()
    shown = CliRunner().invoke(app, ["sessions", "search", "zebras", "--json"])
    (found,) = json.loads(shown.stdout)["exchanges"]
    assert (found["name"], found["number"], found["question"]) == ("letters", 1, SECRET)
    shown = CliRunner().invoke(app, ["sessions", "search", "zebras"])
    assert shown.stdout.startswith("letters 1 [") and SECRET in shown.stdout
    assert json.loads(
        CliRunner().invoke(app, ["sessions", "search", "walrus", "--json"]).stdout
    ) == {"exchanges": []}


def test_lines_of_an_earlier_version_are_removed_too(tmp_path):
    path = tmp_path / "history"
    path.write_text('"first"\n"secret"\n\n# 2026-05-09 17:03:00\n+later\n')
    remove_lines(path, ["secret", "later"])
    assert lines_of(path) == ["first"]
    remove_lines(tmp_path / "missing", ["secret"])
