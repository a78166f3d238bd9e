"""A signal ends a chat at any moment: what was asked and said is saved, and the status is right."""

import os
import random
import re
import signal
import subprocess
import time

import pexpect
import pytest

from mlx_stream.chat.schema import ASKED
from mlx_stream.chat.session_files import session_paths
from mlx_stream.chat.store import Store
from mlx_stream.program.exits import ending_on_signals, finished_before_signals
from tests.fakes.shell import DEADLINE, done, program
from tests.fakes.terminals import ENTER, Terminal

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")

ENDING = (signal.SIGHUP, signal.SIGTERM)
ALL = (*ENDING, signal.SIGINT)
MOMENTS = 3  # tests/long/signals.py has more
FIRST = "Hello"


def turns(name):
    if not session_paths(name).database.exists():
        return []
    with Store.open(session_paths(name).database) as store:
        return store.turns()


@pytest.mark.parametrize("number", ALL)
def test_a_signal_at_a_random_moment(letters, number):
    """The first turn has 400 tokens; the second does not end."""
    luck = random.Random(int(number))
    for moment in range(MOMENTS):
        name = f"s{moment}"
        command = program("chat", letters, "--temp", 0, "--max-tokens", 400, "--session", name)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as chat:
            assert chat.stdin
            chat.stdin.write(f"{FIRST}\n{'long ' * 300}\nAnd now?\n".encode() * 20)
            chat.stdin.flush()  # and stays open: the chat waits for more
            deadline = time.monotonic() + DEADLINE
            while not turns(name):
                assert time.monotonic() < deadline and chat.poll() is None
                time.sleep(0.01)
            time.sleep(luck.uniform(0, 1.5))
            chat.send_signal(number)
            out, err = chat.communicate(timeout=DEADLINE)
        assert chat.returncode == 128 + number, err
        assert b"Traceback" not in err
        found = turns(name)
        assert found[0].exchange.question == FIRST
        # Until the first token of a question is read, the turn is only in the state ASKED.
        answered = [turn.exchange.reply for turn in found if turn.state != ASKED]
        assert len(answered) >= len(found) - 1
        # The last line may lack a piece that was computed but not shown.
        *whole, last = out.decode().removesuffix("\n").split("\n")
        assert answered[: len(whole)] == whole
        assert [*answered, ""][len(whole)].startswith(last)
        verified = done("sessions", "verify", name).out
        assert f"snapshot after exchange {len(answered)}\n" in verified or not answered


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
@pytest.mark.parametrize("moment", ["prompt", "reply"])
def test_a_signal_on_a_terminal(letters, number, term, moment):
    options = ("--temp", 0, "--max-tokens", 100_000, "--session", "work")
    chat = Terminal(*program("chat", letters, *options)[1:], TERM=term)
    chat.see(">")
    if moment == "reply":
        chat.type("Hello", ENTER)
        chat.program.expect(r"[a-z]{60}")
    else:
        time.sleep(0.5)
    chat.program.kill(number)
    chat.program.expect(pexpect.EOF)
    chat.program.close()
    assert chat.program.exitstatus == 128 + number
    assert "Traceback" not in str(chat.program.before)
    if moment == "reply":
        (turn,) = turns("work")
        assert turn.exchange.question == "Hello" and re.match("[a-z]{40}", turn.exchange.reply)
        assert "1 exchange; snapshot after exchange 1" in done("sessions", "verify", "work").out


def test_what_nohup_ignores_stays_ignored(letters):
    command = program("chat", letters, "--temp", 0, "--max-tokens", 100_000, "--session", "work")
    with subprocess.Popen(
        ["nohup", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as chat:
        assert chat.stdin and chat.stdout
        chat.stdin.write(b"Hello\n")
        chat.stdin.flush()
        chat.stdout.read(40)
        chat.send_signal(signal.SIGHUP)
        chat.stdout.read(4_000)
        chat.send_signal(signal.SIGTERM)
        chat.communicate(timeout=DEADLINE)
    assert chat.returncode == 128 + signal.SIGTERM


@pytest.fixture
def handlers():
    before = {one: signal.getsignal(one) for one in ALL}
    yield
    for one, how in before.items():
        signal.signal(one, how)


@pytest.mark.parametrize("number", ALL)
def test_what_is_being_written_is_finished_first(number, handlers):
    signal.signal(number, lambda *_: pytest.fail("not in the middle"))
    steps = []
    with pytest.raises(SystemExit) as ended, finished_before_signals():
        os.kill(os.getpid(), number)
        steps.append("written")
        assert signal.getsignal(number) == signal.SIG_DFL  # a second signal ends it
    assert ended.value.code == 128 + number and steps == ["written"]
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", ALL)
@pytest.mark.parametrize("checks", [True, False])
def test_a_signal_ends_the_program_though_its_exception_was_lost(number, checks, handlers):
    steps = []
    with pytest.raises(SystemExit) as ended, ending_on_signals(*ALL) as check:
        check()
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), number)
            steps.append("not reached")
        steps.append("after")
        if checks:
            check()
            steps.append("not reached")
    assert ended.value.code == 128 + number and steps == ["after"]
