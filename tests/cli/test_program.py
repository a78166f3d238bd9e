"""The real program: closed and full streams, interrupts, imports, a pseudo-terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.shell import DEADLINE, GREEDY, done, program

CUT = rb"\r\nmlx_stream: cut at its limit \(--max-tokens\)\r\n> "
ANSWERED = rb"\r\n[a-z]{12}" + CUT + rb"$"
ENDLESS = (*GREEDY, "--max-tokens", "100000")
CLOSED = "mlx_stream: standard output was closed before everything was written\n"


@contextmanager
def started(
    *args: object, stdin: int = subprocess.DEVNULL, stdout: Any = subprocess.PIPE, **changed: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the real program, in a changed environment, and be sure that it ends."""
    # Some machines set this for all; what the interpreter writes at exit is then not tested.
    inherited = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        program(*args),
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**inherited, **changed},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def stderr_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr is not None
    process.wait(DEADLINE)
    return process.stderr.read().decode()


# --- the real program, and streams that go away ---


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_closed_standard_output_ends_a_reply(letters: Path, verb: str) -> None:
    prompt = ("-p", "the") if verb == "generate" else ()
    with started(verb, letters, *prompt, *ENDLESS, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hello\nagain\n")
        process.stdin.close()
        assert process.stdout.read(1).isalpha()
        process.stdout.close()
        assert stderr_of(process) == CLOSED
        assert process.returncode == 1


def test_a_closed_standard_output_ends_a_long_result(letters: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" the and" * 5_000)  # its JSON is larger than what a pipe holds
    with started("score", letters, path, "--window", 16, "--json") as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"{"
        process.stdout.close()
        assert stderr_of(process) == CLOSED
        assert process.returncode == 1


def test_a_standard_output_closed_before_the_first_byte() -> None:
    with started("ls", "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert stderr_of(process) == CLOSED
        assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_one_line(letters: Path) -> None:
    with (
        Path("/dev/full").open("wb") as full,
        started("generate", letters, "-p", "the", *GREEDY, stdout=full) as process,
    ):
        assert stderr_of(process) == (
            "mlx_stream: standard output was full before everything was written\n"
        )
        assert process.returncode == 1


def test_an_interrupt_ends_generate(letters: Path) -> None:
    with started("generate", letters, "-p", "the", *ENDLESS) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        # A signal can be lost where Python cannot raise; a user presses again.
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            if process.poll() is not None:
                break
        assert (first + process.stdout.read()).isalpha()
        assert stderr_of(process) == "mlx_stream: interrupted\n"
        assert process.returncode == 130


def test_a_narrow_encoding_gets_escapes(tiny: Path) -> None:
    options = ("generate", tiny, "-p", "The man", "--seed", 3, "--max-tokens", 24)
    wide = done(*options).out
    assert not wide.isascii()
    with started(*options, PYTHONIOENCODING="ascii") as process:
        assert stderr_of(process) == "" and process.stdout is not None
        assert process.stdout.read() == wide.encode("ascii", "backslashreplace")


UNWANTED = ("mlx_lm", "transformers", "huggingface_hub", "torch", "typer", "rich")
IMPORTS = """
import sys
def unwanted():
    return [name for name in {names} if name in sys.modules]
import mlx_stream
assert not unwanted(), unwanted()
session = mlx_stream.ChatSession(mlx_stream.load({folder!r}), max_tokens=3)
assert "".join(piece.text for piece in session.reply("Hello"))
assert "".join(piece.text for piece in mlx_stream.stream(session.model, "the", max_tokens=3))
assert not unwanted(), unwanted()
"""


def test_importing_loading_and_replying_import_nothing_heavy(letters: Path) -> None:
    code = IMPORTS.format(names=UNWANTED, folder=str(letters))
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# --- a terminal ---

# Makes the terminal that standard input is the controlling one, so that Ctrl-C is a signal.
CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "mlx_stream", *sys.argv[1:]])
"""


class Terminal:
    """The program on a pseudo-terminal: what a user types and sees."""

    def __init__(self, *args: object, **environment: str):
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, *(str(arg) for arg in args)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", **environment},
        )
        os.close(theirs)
        self.seen = b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def sees(self, pattern: bytes) -> bytes:
        """Wait until the screen shows a pattern after what was looked for last; return both."""
        shown = self.shows(pattern, DEADLINE)
        assert shown, f"no {pattern!r} in {self.seen!r}"
        return shown

    def shows(self, pattern: bytes, seconds: float) -> bytes:
        """Do as `sees`, but return nothing if the time is over or the program is."""
        end = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen, re.DOTALL)) is None:
            if time.monotonic() > end or not self._read():
                return b""
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def leaves(self) -> int:
        """Wait for the end, with the screen read; return the exit status."""
        end = time.monotonic() + DEADLINE
        while self._read():
            assert time.monotonic() < end, f"it goes on: {self.seen!r}"
        return self.process.wait(DEADLINE)

    def _read(self) -> bool:
        """Read what there is; return whether the program is still there."""
        if not select.select([self.ours], [], [], 0.2)[0]:
            return self.process.poll() is None
        try:
            data = os.read(self.ours, 65_536)
        except OSError:  # Linux, once nobody holds the other side
            return False
        self.seen += data
        return bool(data)


def test_a_terminal_prompts_answers_and_ends_with_control_d(letters: Path) -> None:
    with Terminal("chat", letters, *GREEDY, "--max-tokens", 12) as terminal:
        assert terminal.sees(rb"> ").endswith(
            b"latest 508 tokens\r\n"
            b"mlx_stream: Ctrl-C ends a reply, Ctrl-D leaves, /help lists commands\r\n> "
        )
        terminal.type(b"Hello\n")
        assert re.search(ANSWERED, terminal.sees(rb"\r\n> "))
        for blank in (b"\n", b" \n"):
            terminal.type(blank)
            assert not re.search(rb"[a-z]", terminal.sees(rb"> "))
        terminal.type(b"And?\n")
        assert re.search(ANSWERED, terminal.sees(rb"\r\n> "))
        terminal.type(b"\x04")
        assert terminal.leaves() == 0
        assert b"Traceback" not in terminal.seen


def test_control_c_ends_a_reply_and_not_the_program(letters: Path) -> None:
    with Terminal("chat", letters, *ENDLESS) as terminal:
        terminal.sees(rb"> ")
        for question in (b"Hello", b"And then?", b"So?"):
            terminal.type(question + b"\n")
            terminal.sees(rb"\r\n[a-z]{30}")
            terminal.type(b"\x03")
            shown = re.sub(rb"mlx_stream: the window [^\r]*\r\n", b"", terminal.sees(rb"> "))
            assert re.fullmatch(rb"[a-z]*(\^C)?[a-z]*\r\nmlx_stream: stopped\r\n> ", shown)
            assert terminal.process.poll() is None
        terminal.type(b"\x04")
        assert terminal.leaves() == 0


def test_control_c_at_the_prompt_drops_the_line(letters: Path) -> None:
    with Terminal("chat", letters, *GREEDY, "--max-tokens", 12) as terminal:
        terminal.sees(rb"> ")
        terminal.type(b"not this")
        terminal.sees(rb"not this")
        # Python's input() sleeps through a signal that comes while it handles a key.
        for _ in range(10):
            terminal.type(b"\x03")
            if terminal.shows(rb"\(Ctrl-D leaves\)\r\n> ", 5.0):
                break
        terminal.type(b"\x15")  # what readline may still hold if the signal came between keys
        terminal.type(b"Hello\n")
        answer = terminal.sees(rb"Hello\r\n[a-z]*" + CUT)
        terminal.type(b"\x04")
        assert terminal.leaves() == 0
    alone = done("chat", letters, *GREEDY, "--max-tokens", 12, stdin="Hello\n").out
    assert re.search(rb"\r\n" + alone.strip().encode() + CUT + rb"$", answer)


def test_a_typed_line_that_is_not_text_is_typed_again(letters: Path) -> None:
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    with Terminal("chat", letters, *GREEDY, "--max-tokens", 12, **strict) as terminal:
        terminal.sees(rb"> ")
        terminal.type(b"\xff\xfe\n")
        assert b"Traceback" not in terminal.sees(rb"\r\n> ")
        terminal.type(b"Hello\n")
        assert re.search(ANSWERED, terminal.sees(rb"\r\n> "))
        terminal.type(b"\x04")
        assert terminal.leaves() == 0
