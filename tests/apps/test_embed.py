"""The examples for other people's apps, each run unchanged."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.test_engine_exit import environment
from tests.fakes.engines import DEADLINE

EMBED = Path(__file__).parents[2] / "apps" / "embed"

# Drives the window as a user does, on Tk's own thread.
DRIVE_TK = """
import sys, time, tkinter
sys.path.insert(0, sys.argv[2])
import mlx_stream, tk_window

def until(holds):
    end = time.monotonic() + 60
    while not holds():
        root.update()
        assert time.monotonic() < end, window.text.get("1.0", "end")

with mlx_stream.Engine(sys.argv[1], dtype="float32") as engine:
    root = tkinter.Tk()
    window = tk_window.Window(root, engine)
    # Greedy it writes letters for ever; drawn at random it may end after a few.
    window.chat = engine.session(sampling=mlx_stream.Sampling(temperature=0))
    said = lambda: window.text.get("1.0", "end")
    window.entry.insert(0, "Hello?")
    window.ask()
    until(lambda: len(said()) > len("> Hello?") + 20)
    window.stopping.set()
    until(lambda: len(window.chat.exchanges) == 1)
    window.entry.insert(0, "Again?")
    window.ask()
    until(lambda: "> Again?" in said() and len(said().split("> Again?")[1]) > 10)
    assert "attended" in window.status.cget("text")
    window.stopping.set()
    until(lambda: len(window.chat.exchanges) == 2)
    assert window.chat.exchanges[0].finish == "interrupted"
    root.destroy()
print("driven")
"""

DRIVE_APPKIT = """
import runpy, sys, threading, time
from AppKit import NSApplication
from PyObjCTools import AppHelper

def drive():
    delegate = NSApplication.sharedApplication().delegate()
    delegate.field.setStringValue_("Hello?")
    delegate.ask_(None)
    check()

def check(until=time.monotonic() + 60):
    if len(NSApplication.sharedApplication().delegate().text.string()) > len("> Hello?") + 3:
        print("driven", flush=True)
        AppHelper.stopEventLoop()
    elif time.monotonic() < until:
        AppHelper.callLater(0.1, check)
    else:
        AppHelper.stopEventLoop()

AppHelper.callLater(1.0, drive)
sys.argv = [sys.argv[2] + "/pyobjc_window.py", sys.argv[1]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(
    *arguments: object, home: Path, stdin: str = "", cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        input=stdin,
        cwd=cwd,
        env={**environment(home), **more},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
    )


@pytest.fixture
def display() -> Iterator[str]:
    """Yield a screen to draw on: the user's, macOS's own, or a virtual one."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if sys.platform == "darwin" or os.environ.get("DISPLAY"):
        yield os.environ.get("DISPLAY", "")
        return
    if not (xvfb := shutil.which("Xvfb")):
        pytest.skip("there is no display, and no Xvfb (Debian: apt-get install xvfb)")
    reading, writing = os.pipe()
    # Xvfb finds a free display number, and writes it once it is ready.
    server = subprocess.Popen(
        [xvfb, "-displayfd", str(writing), "-nolisten", "tcp"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as ready:
        number = ready.readline().strip()
    try:
        assert number, "Xvfb did not start"
        yield f":{number}"
    finally:
        server.terminate()
        server.wait()


def readme_blocks() -> list[str]:
    """Return the Python code in the engine's README, which is for app developers."""
    readme = (EMBED.parent.parent / "mlx_stream" / "engine" / "README.md").read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)


def test_the_readmes_blocks_run_in_their_order(letters, tmp_path):
    blocks = readme_blocks()
    assert len(blocks) == 6
    program = "\n".join(blocks).replace('"starter"', f"{str(letters)!r}, dtype='float32'")
    ended = run("-c", program, home=tmp_path, cwd=tmp_path)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert "tokens attended" in ended.stdout and "trained context of 512" in ended.stdout
    assert "{'lines': 2} " in ended.stdout


@pytest.mark.starter
def test_the_readmes_refused_session_is_refused_by_the_starter_anywhere(starter):
    """Its window exceeds the context: a refusal for lack of memory would depend on the machine."""
    asked = re.search(r"session\(window=([\d_]+)\)\.wait", "\n".join(readme_blocks()))
    assert asked and int(asked[1]) + 4 > starter.config.max_position_embeddings


# Ends the program if it tries to use the network or to start another program.
DENY = """
import os, sys
def deny(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind",
                 "socket.gethostbyname", "subprocess.Popen", "os.system"):
        print("denied:", event, arguments, flush=True)
        os._exit(9)
sys.addaudithook(deny)
"""


def test_nothing_leaves_the_machine(letters, tmp_path):
    talk = """
import mlx_stream
with mlx_stream.Engine(sys.argv[1]) as engine:
    with engine.session(name="kept", max_tokens=9) as chat:
        list(chat.reply("Hi"))
    with engine.listen() as listener:
        listener.feed("One two three. " * 50)
        list(listener.ask("What?", max_tokens=9))
        listener.save("stream.safetensors", {})
print("talked")
"""
    ended = run("-c", DENY + talk, letters, home=tmp_path, cwd=tmp_path)
    assert ended.stdout == "talked\n", ended.stdout + ended.stderr
    asked = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert run("-c", DENY + asked, home=tmp_path).returncode == 9


def test_the_script(letters, tmp_path):
    notes = "Bob has a dog. " * 100
    ended = run(EMBED / "script.py", letters, home=tmp_path, stdin=notes)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") >= 2  # a reply of random letters may end early
    assert "tokens attended" in ended.stderr and " MB" in ended.stderr
    refused = run(EMBED / "script.py", tmp_path / "none", home=tmp_path)
    assert refused.returncode == 1 and refused.stderr.startswith("script.py: ")
    assert len(refused.stderr.splitlines()) == 1


def test_the_asyncio_program(letters, tmp_path):
    ended = run(EMBED / "asyncio_chat.py", letters, home=tmp_path, stdin="One?\n\nTwo?\n")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") >= 2
    refused = run(EMBED / "asyncio_chat.py", tmp_path / "none", home=tmp_path, stdin="Hi\n")
    assert "none" in refused.stderr and "Traceback" not in refused.stderr


def test_the_tk_window(letters, tmp_path, display):
    ended = run("-c", DRIVE_TK, letters, EMBED, home=tmp_path, DISPLAY=display)
    assert ended.stdout == "driven\n", ended.stderr


@pytest.mark.skipif(sys.platform != "darwin", reason="AppKit is macOS's")
def test_the_appkit_window(letters, tmp_path):
    pytest.importorskip("AppKit", reason="needs PyObjC (pip install pyobjc-framework-Cocoa)")
    ended = run("-c", DRIVE_APPKIT, letters, EMBED, home=tmp_path)
    assert "driven" in ended.stdout, ended.stderr
