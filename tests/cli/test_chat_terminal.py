"""`mlx_stream chat` as a person uses it: a long saved chat on a real pseudo-terminal."""

import re
import signal
import sys
import time

import pexpect
import pytest

from mlx_stream.chat.schema import ASKED
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from mlx_stream.cli.chat import Screen
from mlx_stream.cli.terminal import repeats_itself
from mlx_stream.text.pieces import Piece
from tests.chat.test_settle import SCRIPT, THINKS
from tests.fakes.shell import DEADLINE, done, program, run
from tests.fakes.terminals import CTRL_C, ENTER, PASTE, UP, Terminal
from tests.fakes.thinkers import write_thinker
from tests.fakes.tiny import tiny_config, write_letters

# Python 3.12 and later warn about a fork in a process with threads. It is harmless here, because
# pexpect's child runs a program immediately.
pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[>=]|[\r\a]")


class Chat(Terminal):
    """The program on a terminal; its model writes letters forever."""

    def __init__(self, *args, columns=100, **env):
        super().__init__(*program("chat", *args)[1:], columns=columns, **env)
        self.wide = columns > 60

    def say(self, *keys):
        """Send a line, and return what is shown until the next prompt, without escapes."""
        self.type(*keys, ENTER)
        return self.next()

    def next(self):
        """Return what is shown until the next prompt, which is drawn along with the status bar."""
        shown = self.see(" attended · ")
        self.see(" MB" if self.wide else " evicted")
        return ESCAPES.sub("", shown)


def replies(name):
    """Return each turn's question, its reply, and how that ended, or "asked" if it never did."""
    with Store.open(session_paths(name).database) as store:
        turns = [(turn.exchange, turn.state) for turn in store.turns()]
    return [(e.question, e.reply, state if state == ASKED else e.finish) for e, state in turns]


def test_an_evening(letters):
    options = (letters, "--temp", 0, "--window", 200, "--system", "Be brief.")
    chat = Chat(*options, "--max-tokens", 24, "--session", "evening")
    assert "/help lists commands" in chat.next()
    assert re.search(r"\n[a-z]{24}\n", chat.say("Hello"))
    assert re.search(r"\n[a-z]{24}\n", chat.say("And then?"))
    first = replies("evening")
    assert [question for question, *_ in first] == ["Hello", "And then?"]
    second = Terminal(*program("chat", letters, "--session", "evening")[1:])
    assert f"is open in process {chat.program.pid}" in second.see("another name")
    second.program.wait()
    assert second.program.exitstatus == 1
    assert "/undo" in (shown := chat.say("/help")) and "/quit" in shown
    assert re.search(r"\n[a-z]{24}\n", chat.say("/retry"))
    assert replies("evening") == first  # decoding is greedy
    assert "removed: And then?" in chat.say("/undo")
    assert replies("evening") == first[:1]
    # The question comes back to be edited; what is typed is added to it.
    assert "/edit Hello" in chat.say("/edit")
    assert re.search(r"\n[a-z]{24}\n", chat.say(", you"))
    assert [question for question, *_ in replies("evening")] == ["Hello, you"]
    for number in range(6):
        chat.say(f"Question {number}")
    assert "evicted" in chat.say("/stats") and len(replies("evening")) == 7
    assert "Unknown command '/nothing'. Try /help" in chat.say("/nothing")
    assert "the window is 150 tokens" in chat.say("/window 150")
    assert re.search(r"\n[a-z]{24}\n", chat.say("Still there?"))
    assert "evening" in chat.say("/sessions")
    assert "is attended to now" in chat.say("/clear")
    assert re.search(r"\n[a-z]{24}\n", chat.say(*[UP] * 3, "?"))  # the line typed three lines ago
    chat.type("/quit", ENTER)
    chat.end()
    assert replies("evening")[-1][0] == "Still there??"
    assert "9 exchanges; snapshot after exchange 9" in done("sessions", "verify", "evening").out


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
    assert "(Ctrl-D exits)" in chat.next()
    chat.leave()
    said = replies("cut")
    assert [finish for *_, finish in said] == ["interrupted", "interrupted"]
    assert all(re.fullmatch("[a-z]{40,}", reply) for _, reply, _ in said)

    again = Chat("--continue", "--max-tokens", 24, "--temp", 0)  # the model is remembered, too
    shown = again.next()
    assert "continuing cut: 2 exchanges attended" in shown and "again" not in shown
    assert re.search(r"\n[a-z]{24}\n", again.say("/retry"))
    again.leave()
    assert replies("cut")[0] == said[0] and replies("cut")[1][2] == "length"


NOT_ANSWERED = (
    "mlx_stream: the last question was not answered because the program ended: /retry answers it"
)


def kill_in_reply(chat, line):
    """Send a line, and kill the program in the middle of the reply."""
    chat.type(line, ENTER)
    chat.program.expect(r"[a-z]{40}")
    chat.program.kill(signal.SIGKILL)
    chat.program.expect(pexpect.EOF)
    chat.program.close()
    assert chat.program.signalstatus == signal.SIGKILL


def test_a_chat_killed_in_a_reply_says_so_the_next_time_and_retry_answers(letters):
    chat = Chat(letters, "--temp", 0, "--max-tokens", 24, "--session", "killed")
    chat.next()
    chat.say("Hello")
    chat.leave()
    first = replies("killed")
    options = ("--continue", "--temp", 0, "--max-tokens")
    chat = Chat(*options, 100_000)
    assert "not answered" not in chat.next()
    kill_in_reply(chat, "And then?")
    assert replies("killed")[1:] == [("And then?", "", ASKED)]

    chat = Chat(*options, 100_000)
    shown = chat.next()
    assert NOT_ANSWERED in shown and "continuing killed: 1 exchange attended" in shown
    kill_in_reply(chat, "/retry")

    chat = Chat(*options, 24)
    assert NOT_ANSWERED in chat.next()
    assert "/edit And then?" in chat.say("/edit")
    chat.type(CTRL_C)
    chat.next()
    assert re.search(r"\n[a-z]{24}\n", chat.say("/retry"))
    (begun, (question, reply, finish)) = replies("killed")
    assert [begun] == first and (question, len(reply), finish) == ("And then?", 24, "length")
    assert re.search(r"\n[a-z]{24}\n", chat.say("And now?"))
    chat.leave()
    chat = Chat("--continue")
    shown = chat.next()
    assert "not answered" not in shown and "again" not in shown
    chat.leave()
    assert "3 exchanges; snapshot after exchange 3" in done("sessions", "verify", "killed").out


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Return the folder of a model that takes seconds to read a few thousand letters."""
    config = tiny_config(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, max_position_embeddings=8192
    )
    return write_letters(tmp_path_factory.mktemp("slow") / "slow", config)


def test_control_c_ends_the_reading_of_a_long_question(slow):
    """The question is in the transcript before its first token is read."""
    chat = Chat(slow, "--temp", 0, "--max-tokens", 24, "--session", "long", "--window", 7000)
    chat.next()
    question = "q" * 6_000
    chat.type(question, ENTER)
    deadline = time.monotonic() + DEADLINE
    while not replies("long"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    chat.type(CTRL_C)
    assert "mlx_stream: stopped" in chat.next()
    assert replies("long") == [(question, "", "interrupted")]
    assert re.search(r"\n[a-z]{24}\n", chat.say("/retry"))
    ((asked, reply, finish),) = replies("long")
    assert asked == question and len(reply) == 24 and finish == "length"
    chat.leave()


def reads(chat, *keys):
    """Send keys, wait until reading begins, and return what later replaces the progress line."""
    chat.type(*keys)
    chat.see("reading")
    after = chat.see(" attended · ").rpartition("\x1b[2K")[2]
    chat.see(" MB")
    assert "reading" not in after
    return ESCAPES.sub("", after)


def test_progress_is_shown_while_something_long_is_read_and_gone_afterwards(slow):
    options = (slow, "--temp", 0, "--max-tokens", 24, "--session", "paste")
    chat = Chat(*options, "--window", 2000)
    chat.next()
    assert re.match(r"[a-z]{24}\n", reads(chat, PASTE.format("q" * 1_500), ENTER))
    assert "the window is 1,900 tokens" in reads(chat, "/window 1900", ENTER)
    assert "has changed" in reads(chat, "/system Be brief.", ENTER)
    chat.leave()
    again = Chat("--continue", "--window", 1800, "--max-tokens", 24)
    assert "continuing paste: 1 exchange attended" in reads(again)
    again.leave()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_notices_help_and_replies_fit_the_terminal(letters, columns):
    chat = Chat(letters, "--temp", 0, "--max-tokens", 300, "--window", 200, columns=columns)
    shown = chat.next() + chat.say("Hi") + chat.say("/help") + chat.say("/nothing")
    chat.leave()
    lines = [line.rstrip() for line in shown.split("\n") if "attended ·" not in line]
    assert [line for line in lines if len(line) > columns] == []
    words = " ".join(shown.split())
    assert "Ctrl-C ends a reply, Ctrl-D exits, /help lists commands" in words
    assert "show or change how many tokens are attended to" in words
    assert "start with // to ask a" in words
    help = Terminal(*program("chat", "--help")[1:], columns=columns)
    help.end()
    lines = [line.rstrip() for line in help.shown.split("\n")]
    assert max(map(len, lines)) <= columns
    assert "Continue the most recently used session." in " ".join(help.shown.split())


def test_a_mark_says_where_attention_begins_and_continue_shows_the_end(letters):
    options = (letters, "--temp", 0, "--max-tokens", 40, "--window", 200, "--session", "marks")
    chat = Chat(*options)
    shown = chat.next() + "".join(chat.say(f"Question {number}") for number in range(6))
    attended = re.search(r"(\d+) exchanges? attended", again_of("marks", chat))
    assert attended
    assert f"attention now begins at: Question {6 - int(attended[1])}" in shown


def again_of(name, chat):
    """Leave a chat, continue it, and return what is shown until its first prompt."""
    chat.leave()
    again = Chat("--session", name)
    shown = again.next()
    assert "> Question 5" in shown and "> Question 0" not in shown
    assert re.search(r"\n[a-z]{40}\n", shown)
    again.leave()
    return shown


def test_views_of_a_conversation(letters):
    chat = Chat(letters, "--temp", 0, "--max-tokens", 24, "--session", "views")
    assert re.search(r"remembers about [\d,]+ words", chat.next())
    chat.say("First?")
    chat.say("Second?")
    assert re.search(r"1  [-\d]{10} [:\d]{5}  First\?\n +2 ", chat.say("/history"))
    assert re.search(r"> First\?\n\n[a-z]{24}\n", chat.say("/show 1"))
    assert re.search(r"> Second\?\n\n[a-z]{24}\n", chat.say("/show"))
    assert "there is no exchange '7'" in chat.say("/show 7")
    assert "the temperature is 0.5" in chat.say("/temp 0.5")
    for number in (-1, 9):
        assert "`temperature` must be from 0 to 5" in chat.say(f"/temp {number}")
    assert re.search(r"llama, [\d.]+M parameters, float32", chat.say("/model"))
    assert re.search(r"views +[-\d]{10} [:\d]{5}  2 exchanges", chat.say("/sessions"))
    chat.leave()


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_what_is_typed_while_the_model_loads_is_asked(letters, term):
    """A question may come while the model loads, at the first prompt, or during a reply."""
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
    if term != "dumb":  # a dumb terminal echoes what is typed at any time
        shown = ESCAPES.sub("", chat.shown)
        assert all(f"> {question}" in shown for question in questions)


def test_thinking_is_dimmed_hidden_or_left_out(tmp_path):
    options = (write_thinker(tmp_path / "model", THINKS["thinks"], SCRIPT, "<|im_end|>"),)
    options += ("--temp", 0, "--window", 200)
    shown = {}
    for how in ("", "--hide-thinking"):
        chat = Chat(*options, *([how] if how else []))
        chat.next()
        chat.type("Hi", ENTER)
        chat.see("jklmno")
        shown[how] = chat.shown
        chat.next()
        chat.leave()
    assert "\x1b[2mabcdefghi\x1b[22m" in shown[""].replace("\r", "").replace("\n", "")
    assert "abcdefghi" not in shown["--hide-thinking"] and "jklmno" in shown["--hide-thinking"]
    assert done("chat", *options, stdin="Hi\n").out == "jklmno\n"
    refused = run("chat", *options, "--no-think", stdin="Hi\n")
    assert refused.code == 1 and "--no-think" in refused.err


def test_endless_repetition_is_noticed_once_with_a_way_out(monkeypatch, capsys):
    for period in (1, 2, 11, 133):
        text = "".join(chr(97 + n * n % 26 if n % 7 else 32) for n in range(period - 1)) + "#"
        assert repeats_itself("Well: " + text * (800 // period + 4))
        assert not repeats_itself(text * (399 // period))
        assert not repeats_itself(text * 900 + "and then?")
    assert not repeats_itself(" ".join(map(str, range(900))))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen = Screen(lambda: None)
    for told in (1, 0):  # the notice appears only once
        with screen.reply():
            screen.show(Piece(f"{n % 3} and on. ") for n in range(90))
        assert capsys.readouterr().err.count("the reply repeats itself; --repetition-pen") == told


def test_sessions_rm_asks_once_on_a_terminal(letters):
    for name in ("one", "two"):
        done("chat", letters, "--max-tokens", 4, "--session", name, stdin="Hello\nAgain\n")
    kept = session_paths("one").database
    for answer in ("", "n", "y"):
        assert kept.exists()
        terminal = Terminal(*program("sessions", "rm", "one")[1:])
        terminal.see("remove one, 2 exchanges? y or n: ")
        terminal.type(answer, ENTER)
        terminal.end()
        assert ("nothing was removed" in terminal.shown) == (answer != "y")
    assert not kept.exists()
    terminal = Terminal(*program("sessions", "rm", "one")[1:])
    assert "y or n" not in terminal.see("does not exist: check the name")
    terminal = Terminal(*program("sessions", "rm", "two", "--yes")[1:])
    terminal.end()
    assert "y or n" not in terminal.shown and not session_paths("two").database.exists()
