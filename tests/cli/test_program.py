"""The real program: closed and full streams, interrupts, imports."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.shell import DEADLINE, GREEDY, done, program

ENDLESS = (*GREEDY, "--max-tokens", "100000")
CLOSED = "mlx_stream: standard output was closed before everything was written\n"


@contextmanager
def started(
    *args: object, stdin: int = subprocess.DEVNULL, stdout: Any = subprocess.PIPE, **changed: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the real program in a changed environment, and make sure that it ends."""
    # Some machines set this globally, and then what the interpreter writes at exit is not tested.
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


# --- the real program, and streams that close ---


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_closed_standard_output_ends_a_reply(letters: Path, verb: str) -> None:
    prompt = ("-p", "the") if verb == "generate" else ()
    with started(verb, letters, *prompt, *ENDLESS, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hello\nagain\n")
        process.stdin.close()
        assert process.stdout.read(1).isalpha()
        process.stdout.close()
        assert (stderr_of(process), process.returncode) == (CLOSED, 1)


def test_a_standard_output_closed_before_the_first_byte() -> None:
    with started("ls", "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert (stderr_of(process), process.returncode) == (CLOSED, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_one_line(letters: Path) -> None:
    with (
        Path("/dev/full").open("wb") as full,
        started("generate", letters, "-p", "the", *GREEDY, stdout=full) as process,
    ):
        assert "standard output was full before" in stderr_of(process)
        assert process.returncode == 1


def test_an_interrupt_ends_generate(letters: Path) -> None:
    with started("generate", letters, "-p", "the", *ENDLESS) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        # A signal can be lost where Python cannot raise; a user would press the key again.
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
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


@pytest.mark.parametrize(
    "code",
    [
        IMPORTS,
        "import sys, mlx_stream.cli.plan, mlx_stream.cli.devices\n"
        "assert 'mlx.core' not in sys.modules",
    ],
    ids=["the package", "the help of plan"],
)
def test_nothing_heavy_is_imported_by(letters: Path, code: str) -> None:
    code = code.format(names=UNWANTED, folder=str(letters))
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
