"""The assistant's socket: what it answers, and that no caller can block the others."""

import errno
import json
import os
import resource
import socket
import stat
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_stream_assistant import socket_server as doors
from mlx_stream_assistant.cli import app
from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.paths import assistant_paths
from mlx_stream_assistant.socket_server import SocketServer, request
from tests.fakes.engines import eventually


def silent(asked):
    yield from ()


@pytest.fixture
def near():
    """Return a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def answering(server):
    """Accept connections on another thread."""
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            server.admit()
            time.sleep(0.001)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def served(near):
    """Return a path on which requests are echoed, except `fail`, which fails."""

    def answer(asked):
        if asked.get("what") == "fail":
            raise AssistantError("it failed")
        yield {"text": asked["what"]}
        yield {"text": "!"}
        if "cut" not in (asked["what"], asked.get("question")):
            yield {"done": True}

    path = near / "s.sock"
    door = SocketServer(path, answer)
    with answering(door):
        yield path
    door.close()
    assert not path.exists()


def test_a_request_is_answered_in_lines(served):
    assert stat.S_IMODE(served.stat().st_mode) == 0o600
    lines = list(request(served, "main", what="echo"))
    assert lines == [{"text": "echo"}, {"text": "!"}, {"done": True}]
    with pytest.raises(AssistantError, match="it failed"):
        list(request(served, "main", what="fail"))
    with pytest.raises(AssistantError, match="exited before it answered"):
        list(request(served, "main", what="cut"))


def test_an_answer_that_is_cut_ends_its_line(served, monkeypatch):
    monkeypatch.setenv("MLX_STREAM_HOME", str(served.parent))
    path = assistant_paths("main").socket
    path.parent.mkdir(parents=True)
    path.symlink_to(served)
    for question, status in (("What?", 0), ("cut", 1)):
        done = CliRunner().invoke(app, ["ask", question])
        assert (done.stdout, done.exit_code) == ("ask!\n", status)
    assert done.stderr.count("\n") == 1 and "exited before it answered" in done.stderr
    path.unlink()
    assert CliRunner().invoke(app, ["ask", "What?"]).stdout == ""


@pytest.mark.parametrize(
    "sent", [b"\n", b"[]\n", b"{\n", b"\xff\n", b"[" * 60_000 + b"\n", b"x" * 70_000, b""]
)
def test_data_that_is_not_a_request_gets_one_line(served, sent):
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(served))
        caller.sendall(sent)
        caller.shutdown(socket.SHUT_WR)
        (line,) = caller.makefile("rb").readlines()
    assert "a request " in json.loads(line)["error"]
    assert list(request(served, "main", what="x"))


def test_silent_callers_do_not_keep_others_out(served, monkeypatch):
    monkeypatch.setattr(doors, "PATIENCE", 2.0)
    idle = [socket.socket(socket.AF_UNIX) for _ in range(doors.MOST_AT_ONCE + 4)]
    for caller in idle:
        caller.connect(str(served))
    # Callers beyond the limit are refused; the others are dropped after a while.
    answers = [json.loads(line)["error"] for c in idle if (line := c.makefile("rb").readline())]
    busy = f"{doors.MOST_AT_ONCE} other requests are being answered: try again later"
    assert answers == [busy] * 4
    assert list(request(served, "main", what="x"))
    for caller in idle:
        caller.close()


def test_a_socket_that_is_left_behind(near):
    left = near / "left.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    with pytest.raises(AssistantError, match="is not running"):
        list(request(left, "main", what="x"))
    SocketServer(left, silent).close()
    left.write_text("mine")
    with pytest.raises(AssistantError, match="not a socket; rename it"):
        SocketServer(left, silent)
    assert left.read_text() == "mine"


def test_a_socket_in_a_folder_with_a_long_path(tmp_path):
    path = tmp_path / ("long ü" * 20) / "main.sock"
    with pytest.raises(AssistantError, match="is not running"):
        list(request(path, "main", what="x"))
    path.parent.mkdir()
    before, server = Path.cwd(), SocketServer(path, lambda asked: (line for line in [{"done": 1}]))
    with answering(server):
        assert list(request(path, "main", what="x")) == [{"done": 1}]
    server.close()
    assert not path.exists() and Path.cwd() == before


def test_a_request_that_is_too_long_is_not_sent():
    with pytest.raises(AssistantError, match="too long"):
        list(request(Path("/nowhere.sock"), "main", what="ask", question="ж" * 20_000))


def test_without_descriptors_it_waits(near):
    door = SocketServer(near / "s.sock", lambda asked: (line for line in [{"done": True}]))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(door.path))
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                os.dup(0)
            begun = time.monotonic()
            door.admit()
            assert time.monotonic() - begun >= doors.BRIEFLY
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        doors.send(caller, {"what": "status"})
        door.admit()
        assert caller.makefile("rb").readline() == b'{"done": true}\n'
        eventually(lambda: door._at_once._value == doors.MOST_AT_ONCE)
    door.close()
