"""`mlx_stream chat` as a person uses it: a whole evening on a real pseudo-terminal, saved."""

import json
import re
import time

import pytest

from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from tests.fakes.shell import done, program, run
from tests.fakes.terminals import CTRL_C, ENTER, UP, Terminal

# From 3.12 Python warns of a fork where there are threads; pexpect's child runs a program at once.
pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[>=]|[\r\a]")


class Chat(Terminal):
    """The program on a terminal; its model writes letters for ever."""

    def __init__(self, *args, **env):
        super().__init__(*program("chat", *args)[1:], **env)

    def say(self, *keys):
        """Send a line, and return what is shown until the next prompt, escapes left out."""
        self.type(*keys, ENTER)
        return self.next()

    def next(self):
        """Return what is shown until the next prompt: the status bar is drawn with it."""
        shown = self.see(" attended · ")
        self.see(" MB")
        return ESCAPES.sub("", shown)


def replies(name):
    with Store.open(session_paths(name).database) as store:
        return [(e.question, e.reply, e.finish) for e in store.exchanges()]


def test_an_evening(letters, tmp_path):
    options = (letters, "--temp", 0, "--window", 200, "--system", "Be brief.")
    chat = Chat(*options, "--max-tokens", 24, "--session", "evening")
    assert "/help lists commands" in chat.next()
    assert re.search(r"\n[a-z]{24}\n", chat.say("Hello"))
    assert re.search(r"\n[a-z]{24}\n", chat.say("And then?"))
    first = replies("evening")
    assert [question for question, *_ in first] == ["Hello", "And then?"]
    assert "/undo" in (shown := chat.say("/help")) and "/quit" in shown
    assert re.search(r"\n[a-z]{24}\n", chat.say("/retry"))
    assert replies("evening") == first  # greedy
    assert "taken back: And then?" in chat.say("/undo")
    assert replies("evening") == first[:1]
    # The question comes back to be edited; what is typed is added to it.
    assert "/edit Hello" in chat.say("/edit")
    assert re.search(r"\n[a-z]{24}\n", chat.say(", you"))
    assert [question for question, *_ in replies("evening")] == ["Hello, you"]
    for number in range(12):
        chat.say(f"Question {number}")
    assert "evicted" in chat.say("/stats") and len(replies("evening")) == 13
    assert "no command: /help" in chat.say("/nothing")
    assert "the window is 200 tokens" in chat.say("/window")
    assert "the window is 150 tokens" in chat.say("/window 150")
    assert "Be brief." in chat.say("/system")
    assert "is changed" in chat.say("/system Be long.")
    assert re.search(r"\n[a-z]{24}\n", chat.say("Still there?"))
    assert "saved as evening" in chat.say("/save")
    assert session_paths("evening").snapshot.exists()
    assert "evening" in chat.say("/sessions")
    assert "14 exchanges written" in chat.say(f"/export {tmp_path / 'evening.json'}")
    assert "is attended now" in chat.say("/clear")
    assert re.search(r"\n[a-z]{24}\n", chat.say(*[UP] * 5, "?"))  # what was typed five lines ago
    chat.type("/quit", ENTER)
    chat.end()
    exported = json.loads((tmp_path / "evening.json").read_text())
    assert [turn["question"] for turn in exported["turns"]][-1] == "Still there?"
    assert replies("evening")[-1][0] == "Still there??"
    assert "15 exchanges; snapshot after exchange 15" in done("sessions", "verify", "evening").out


def test_control_c_ends_a_reply_which_is_saved_and_the_next_evening_goes_on(letters):
    options = (letters, "--temp", 0, "--max-tokens", 100_000)
    chat = Chat(*options, "--session", "cut")
    chat.next()
    for question in ("Hello", "And then?"):
        chat.type(question, ENTER)
        chat.program.expect(r"[a-z]{40}")
        chat.type(CTRL_C)
        assert "mlx_stream: stopped" in chat.next()
    chat.type("not this", CTRL_C)
    assert "(Ctrl-D leaves)" in chat.next()
    chat.leave()
    said = replies("cut")
    assert [finish for *_, finish in said] == ["interrupted", "interrupted"]
    assert all(re.fullmatch("[a-z]{40,}", reply) for _, reply, _ in said)

    again = Chat("--continue", "--max-tokens", 24, "--temp", 0)  # the model, too, is remembered
    shown = again.next()
    assert "goes on with cut: 2 exchanges attended" in shown and "again" not in shown
    assert re.search(r"\n[a-z]{24}\n", again.say("/retry"))
    again.leave()
    assert replies("cut")[0] == said[0] and replies("cut")[1][2] == "length"


def test_a_second_terminal_is_told_who_holds_the_session(letters):
    chat = Chat(letters, "--session", "held")
    chat.next()
    second = Terminal(*program("chat", letters, "--session", "held")[1:])
    assert f"is open in process {chat.program.pid}" in second.see("another name")
    second.program.wait()
    assert second.program.exitstatus == 1
    chat.leave()
    assert replies("held") == []


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_what_is_typed_while_the_model_loads_is_asked(letters, term):
    """A question at any moment from loading over the first prompt into the replies."""
    chat = Chat(letters, "--temp", 0, "--max-tokens", 2, "--session", "early", TERM=term)
    chat.see("loading")
    chat.program.delaybeforesend = None
    questions = [f"Question {number}" for number in range(60)]
    for question in questions:
        chat.type(question, ENTER)
        time.sleep(0.02)
    chat.type("/quit", ENTER)
    chat.end()
    assert [question for question, *_ in replies("early")] == questions
    shown = ESCAPES.sub("", chat.shown)
    assert all(f"> {question}" in shown for question in questions)


def test_verifying_what_is_not_there_is_one_line():
    result = run("sessions", "verify", "nothing")
    assert result.code == 1 and result.err.count("\n") == 1 and "there is none" in result.err
