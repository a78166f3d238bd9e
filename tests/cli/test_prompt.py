"""The prompt on a real pseudo-terminal: keys in, lines out, and a history private to the user."""

import os
import re
import subprocess
import sys
import time

import pytest

from mlx_stream.cli.history import LONGEST_KEPT, open_history
from tests.fakes.terminals import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    CTRL_J,
    ENTER,
    PASTE,
    PROMPT,
    TAB,
    UP,
    Terminal,
)

# Python 3.12 and later warn about a fork in a process with threads. It is harmless here, because
# pexpect's child runs a program immediately.
pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")

PROGRAM = """
import os, sys
from pathlib import Path
from mlx_stream.cli import prompt as module
from mlx_stream.cli.prompt import Prompt, keys_wait

module.SECONDS_OF_IDLENESS = float(os.environ.get("IDLENESS", "60"))
idled = 0
def idle():
    global idled
    idled += 1
    return f"IDLE {idled}"

completions = {"/help": "list", "/retry": "answer again", "/export": "write"}
prompt = Prompt(
    Path(sys.argv[1]), lambda: "7 attended", completions, lambda text: print("NOTE", text), idle
)
default = " ".join(sys.argv[2:])
try:
    while True:
        line, default = prompt.ask(default), ""
        print("GOT", ascii(line), flush=True)
        if line == "wait":
            with keys_wait():
                print("BUSY", flush=True)
                while sys.stdin.buffer.raw.read(1) != b"!":
                    pass
except EOFError:
    print("LEFT", flush=True)
"""


def recalled(path):
    """Return the lines a new program recalls, oldest first."""
    return [*open_history(path, pytest.fail).load_history_strings()][::-1]


def got(terminal, line):
    """Wait until a line has been read and the next prompt is shown."""
    terminal.see(f"GOT {line!a}\r\n")
    terminal.see(PROMPT)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "history"


@pytest.fixture
def terminals():
    opened = []

    def open_one(*args, **env):
        opened.append(Terminal("-c", PROGRAM, *args, **env))
        opened[-1].see(PROMPT)
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.program.close(force=True)


def test_lines_are_typed_edited_completed_dropped_and_pasted(terminals, path):
    terminal = terminals(path)
    terminal.see("7 attended")
    terminal.type("Hello, wörld", ENTER)
    got(terminal, "Hello, wörld")
    terminal.type(ENTER, "  ", ENTER, "one", ALT_ENTER, "two", CTRL_J, "three", ENTER)
    got(terminal, "one\ntwo\nthree")
    terminal.type(PASTE.format("a\r\nb\rc\n\td /re"), ENTER)
    got(terminal, "a\nb\nc\n\td /re")
    terminal.type("/re", TAB)
    terminal.see("/retry")
    terminal.type(" now", ENTER)
    got(terminal, "/retry now")
    terminal.type("see /re", TAB, ENTER)
    got(terminal, "see /re")
    terminal.type("never sent", CTRL_C)
    terminal.see("(Ctrl-D exits)")
    terminal.see(PROMPT)
    terminal.type("ab", "\x1b[D", CTRL_D, ENTER)  # deletes a character
    got(terminal, "a")
    terminal.leave()


def test_what_was_typed_is_recalled_by_the_next_program_and_is_the_users_own(terminals, path):
    before = os.umask(0o022)
    try:
        terminal = terminals(path)
    finally:
        os.umask(before)
    for line in ("first", "same", "same"):
        terminal.type(line, ENTER)
        got(terminal, line)
    terminal.type("two", ALT_ENTER, "lines", ENTER)
    got(terminal, "two\nlines")
    terminal.leave()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert recalled(path) == ["first", "same", "two\nlines"]

    terminal = terminals(path)
    terminal.type(UP, ENTER)
    got(terminal, "two\nlines")
    terminal.type(UP, UP, UP, UP, ENTER)  # the first two go through the lines of the newest entry
    got(terminal, "first")
    terminal.leave()


def test_keys_pressed_during_a_reply_are_the_next_line(terminals, path):
    terminal = terminals(path)
    terminal.type("wait", ENTER)
    terminal.see("BUSY")
    terminal.type("!", "ahead", ENTER)
    assert "ahead" not in terminal.see("\n")  # from BUSY
    got(terminal, "ahead")
    terminal.leave()


def test_a_default_can_be_edited(terminals, path):
    terminal = terminals(path, "/edit Who?")
    terminal.type("\x7f!", ENTER)
    got(terminal, "/edit Who!")
    terminal.leave()


def test_bytes_that_are_no_text_are_not_sent(terminals, path):
    terminal = terminals(path)
    terminal.type("caf")
    os.write(terminal.program.child_fd, b"\xe9 \xff")
    terminal.type(ENTER)
    terminal.see("NOTE that line is not UTF-8")
    terminal.see(PROMPT)
    terminal.type("\x7f" * 3, "é", ENTER)
    got(terminal, "café")
    terminal.leave()


def test_idleness_is_told_once_a_prompt_and_not_while_someone_types(terminals, path):
    terminal = terminals(path, IDLENESS="0.6")
    for key in "typing":
        terminal.type(key)
        time.sleep(0.3)
    terminal.type(ENTER)
    assert "IDLE" not in terminal.see("GOT 'typing'\r\n")
    terminal.see("NOTE IDLE 1")
    time.sleep(1.5)
    terminal.type("more", ENTER)
    assert "IDLE" not in terminal.see("GOT 'more'\r\n")
    terminal.see("NOTE IDLE 2")
    terminal.leave()


def colours(text):
    """Return the colours that SGR sequences in a text choose."""
    numbers = [n for found in re.findall(r"\x1b\[([\d;]*)m", text) for n in found.split(";") if n]
    return [n for n in map(int, numbers) if 30 <= n <= 49 or 90 <= n <= 107]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_means_none(terminals, path, no_color):
    terminal = terminals(path, NO_COLOR=no_color)
    terminal.see("7 attended")
    terminal.type("/")
    terminal.see("answer again")  # the menu
    terminal.type("re", TAB, ENTER)
    got(terminal, "/retry")
    terminal.leave()
    assert bool(colours(terminal.shown)) == (not no_color)


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_without_a_cursor_gets_plain_lines(terminals, path, term):
    terminal = terminals(path, "/edit Who?", TERM=term)
    terminal.see("[/edit Who?] ")
    terminal.type(ENTER)
    got(terminal, "/edit Who?")
    terminal.type(ENTER, "never sent", CTRL_C)
    terminal.see("(Ctrl-D exits)")
    terminal.see(PROMPT)
    os.write(terminal.program.child_fd, b"caf\xe9\n")
    terminal.see("NOTE that line is not UTF-8")
    terminal.see("> [caf\ufffd] ")
    terminal.type("café", ENTER)
    got(terminal, "café")
    terminal.leave()
    assert "\x1b" not in terminal.shown
    assert recalled(path)[-1] == "café" and "/edit Who?" in recalled(path)


def folder(path):
    path.mkdir(parents=True)


def no_folder(path):
    path.parent.write_text("a file")


def pipe(path):
    path.parent.mkdir()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [folder, no_folder, pipe])
def test_a_history_that_cannot_be_used_is_one_notice(path, spoil):
    spoil(path)
    notices = []
    history = open_history(path, notices.append)
    history.append_string("one")
    assert history.get_strings() == ["one"]
    assert len(notices) == 1 and "\n" not in notices[0] and str(path) in notices[0]


FULL = """
import resource, sys
from pathlib import Path
from mlx_stream.cli.history import open_history
history = open_history(Path(sys.argv[1]), lambda text: print("NOTE", text))
history.append_string("kept")
resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))
history.append_string("what the disk has no room for")
history.append_string("another")
"""


def test_a_full_disk_is_one_notice_and_loses_no_earlier_line(path):
    result = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.count("NOTE") == result.stdout.count("\n") == 1
    assert recalled(path)[0] == "kept"
    open_history(path, pytest.fail).append_string("later")
    assert recalled(path)[-1] == "later"


def test_what_an_earlier_version_kept_is_recalled_and_closed_to_others(path):
    path.parent.mkdir()
    path.write_text('"old"\n"of two\\nlines, caf\\u00e9"\n"cut sh')
    path.chmod(0o644)
    open_history(path, pytest.fail).append_string("new\nlines")
    assert recalled(path) == ["old", "of two\nlines, café", "new\nlines"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_chats_at_the_same_time_keep_the_lines_of_all(path):
    histories = [open_history(path, pytest.fail) for _ in range(3)]
    for number in range(30):
        histories[number % 3].append_string(f"line {number}\nand more")
    assert recalled(path) == [f"line {number}\nand more" for number in range(30)]


def test_what_is_not_worth_keeping_is_not_kept(path):
    for line in ("x" * (LONGEST_KEPT + 1), "  "):
        open_history(path, pytest.fail).append_string(line)
    assert recalled(path) == []


def test_prompt_toolkit_waits_until_it_is_needed():
    code = (
        "import sys, mlx_stream.cli, mlx_stream.cli.prompt; print('prompt_toolkit' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "False\n"
