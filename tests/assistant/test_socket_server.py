"""The assistant's socket, its services and its look at the battery."""

import json
import plistlib
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_stream_assistant import service
from mlx_stream_assistant import socket_server as doors
from mlx_stream_assistant.battery import battery_in, discharging
from mlx_stream_assistant.cli import app
from mlx_stream_assistant.paths import AssistantError, assistant_paths
from mlx_stream_assistant.settings import Settings
from mlx_stream_assistant.socket_server import SocketServer, request


def silent(asked):
    yield from ()


@pytest.fixture
def near():
    """Return a folder with a short path, as a socket needs it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def served(near):
    """Return a path on which requests are answered: `echo` and `fail`."""

    def answer(asked):
        if asked.get("what") == "fail":
            raise AssistantError("it failed")
        yield {"text": asked["what"]}
        yield {"text": "!"}
        if "cut" not in (asked["what"], asked.get("question")):
            yield {"done": True}

    path, ended = near / "s.sock", threading.Event()
    door = SocketServer(path, answer)

    def serve() -> None:
        while not ended.is_set():
            door.admit()
            time.sleep(0.001)

    thread = threading.Thread(target=serve)
    thread.start()
    yield path
    ended.set()
    thread.join()
    door.close()
    assert not path.exists()


def test_a_request_is_answered_in_lines(served):
    assert stat.S_IMODE(served.stat().st_mode) == 0o600
    lines = list(request(served, "main", what="echo"))
    assert lines == [{"text": "echo"}, {"text": "!"}, {"done": True}]
    with pytest.raises(AssistantError, match="it failed"):
        list(request(served, "main", what="fail"))
    with pytest.raises(AssistantError, match="ended before it had answered"):
        list(request(served, "main", what="cut"))


def test_an_answer_that_is_cut_ends_its_line(served, monkeypatch):
    monkeypatch.setenv("MLX_STREAM_HOME", str(served.parent))
    path = assistant_paths("main").socket
    path.parent.mkdir(parents=True)
    path.symlink_to(served)
    for question, status in (("What?", 0), ("cut", 1)):
        done = CliRunner().invoke(app, ["ask", question])
        assert (done.stdout, done.exit_code) == ("ask!\n", status)
    assert done.stderr.count("\n") == 1 and "ended before it had answered" in done.stderr
    path.unlink()
    assert CliRunner().invoke(app, ["ask", "What?"]).stdout == ""


@pytest.mark.parametrize(
    "sent", [b"\n", b"[]\n", b"{\n", b"\xff\n", b"[" * 60_000 + b"\n", b"x" * 70_000, b""]
)
def test_what_is_no_request_gets_a_line(served, sent):
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(served))
        caller.sendall(sent)
        caller.shutdown(socket.SHUT_WR)
        (line,) = caller.makefile("rb").readlines()
    assert "a request " in json.loads(line)["error"]
    assert list(request(served, "main", what="x"))


def test_those_who_say_nothing_do_not_keep_others_out(served, monkeypatch):
    monkeypatch.setattr(doors, "PATIENCE", 0.5)
    idle = [socket.socket(socket.AF_UNIX) for _ in range(doors.MOST_AT_ONCE + 4)]
    for caller in idle:
        caller.connect(str(served))
    # What was too many is told so; the others are left after a while.
    answers = [json.loads(line)["error"] for c in idle if (line := c.makefile("rb").readline())]
    assert answers == [f"{doors.MOST_AT_ONCE} others are being answered: try again"] * 4
    assert list(request(served, "main", what="x"))
    for caller in idle:
        caller.close()


def test_a_socket_that_is_in_use_or_left_behind(near, served):
    with pytest.raises(AssistantError, match="another process listens on it"):
        SocketServer(served, silent)
    left = near / "left.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    with pytest.raises(AssistantError, match="does not run"):
        list(request(left, "main", what="x"))
    SocketServer(left, silent).close()
    left.write_text("mine")
    with pytest.raises(AssistantError, match="not a socket; move it away"):
        SocketServer(left, silent)
    assert left.read_text() == "mine"
    with pytest.raises(AssistantError, match="too long for a socket"):
        SocketServer(near / ("x" * 110), silent)


# --- services ---

HARD = Path('/a b/50% $HOME/"x\\.log')


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Have a home without launchctl and systemctl."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def settings(**more) -> Settings:
    return Settings(follow=(HARD,), notes=Path("/n.md"), window=508, **more)


def test_an_agent_of_launchd():
    made = service.service_for(settings(pause_on_battery=True), Path("/l.log"))
    agent = plistlib.loads(service.agent(made))
    assert agent["Label"] == "mlx_stream.assistant.main"
    program, *module, verb, first = agent["ProgramArguments"][:6]
    options = agent["ProgramArguments"][5:]
    assert Path(program).is_absolute() and verb == "run" and first == options[0]
    assert module == ["-P", "-m", "mlx_stream_assistant"]
    assert {f"--follow={HARD}", "--notes=/n.md", "--window=508"} < set(options)
    assert options[-1] == "--pause-on-battery"
    assert agent["ProcessType"] == "Adaptive" and agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"Crashed": True}
    assert "MLX_STREAM_HOME" in agent["EnvironmentVariables"]
    assert service.place("main", "darwin").parts[-3:-1] == ("Library", "LaunchAgents")
    (start,), (stop,) = service.start_commands("x", "darwin"), service.stop_commands("x", "darwin")
    assert start[:2] == ["launchctl", "bootstrap"] and start[3].endswith("assistant.x.plist")
    assert stop[:2] == ["launchctl", "bootout"] and stop[2].endswith("/mlx_stream.assistant.x")


def test_a_unit_of_systemd(tmp_path):
    unit = service.unit(service.service_for(settings(), Path("/l.log")))
    assert "Restart=on-abnormal\n" in unit and "WantedBy=default.target\n" in unit
    assert '"--follow=/a b/50%% $$HOME/\\"x\\\\.log"' in unit
    with pytest.raises(AssistantError, match="leave such characters out"):
        service.word("a\nb")
    if shutil.which("systemd-analyze"):
        path = tmp_path / "mlx_stream-assistant-main.service"
        path.write_text(unit)
        command = ["systemd-analyze", "--user", "--man=no", "verify", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        # Of other units there may be anything to say, and in a container it has no bus.
        assert path.name not in done.stderr, done.stderr


def test_what_install_writes_is_what_run_would_be_told(home):
    words = service.words(
        settings(every=5.0, name="n", system="Be $brief.", snapshot_every=2.5, from_end=True)
    )
    assert "--from-end" in words
    path = service.place("n")
    done = CliRunner().invoke(app, ["install", *words])
    assert done.exit_code == 1 and "but it could not be started: " in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    text = path.read_bytes().decode()
    assert all(word.split("=")[0] in text for word in words) and "--stdin" not in text
    again = CliRunner().invoke(app, ["install", *words])
    assert again.exit_code == 1 and path.read_bytes().decode() == text
    done = CliRunner().invoke(app, ["uninstall", "--name", "n"])
    assert done.exit_code == 0 and not path.exists() and str(path) in done.stderr
    done = CliRunner().invoke(app, ["uninstall", "--name", "n"])
    assert done.exit_code == 1 and "is not installed" in done.stderr
    assert list(path.parent.iterdir()) == []


def test_commands_that_start_and_stop_it_are_carried_out(home):
    said = home / "said"
    for name in ("launchctl", "systemctl"):
        (home / name).write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
        (home / name).chmod(0o700)
    path, trouble = service.install(service.service_for(settings(), home / "l.log"))
    assert trouble == "" and service.uninstall("main") == path
    assert said.read_text().splitlines()[-1].startswith(("bootout", "--user disable --now"))
    (home / "launchctl").write_text("#!/bin/sh\necho no bus >&2\nexit 5\n")
    (home / "systemctl").write_text("#!/bin/sh\necho no bus >&2\nexit 5\n")
    assert service.install(service.service_for(settings(), home / "l.log"))[1].endswith(": no bus")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--follow=x", "--every=0"],
        ["--follow=x", "--every=nan"],
        ["--follow=x", "--snapshot-every=-1"],
        ["--follow=x", "--notes=x"],
        ["--folder=.", "--name=a/b"],
    ],
)
def test_what_cannot_be_done_is_refused_before_it_is_installed(home, words):
    for verb in ("install", "run"):
        done = CliRunner().invoke(app, [verb, *words])
        assert done.exit_code == 1 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert [path.name for path in home.rglob("*") if path.is_file()] == []


# --- the battery ---


def test_the_battery(tmp_path):
    assert battery_in("Now drawing from 'Battery Power'\n -InternalBattery-0\t81%; discharging;")
    assert not battery_in("Now drawing from 'AC Power'\n -InternalBattery-0\t100%; charged;")
    assert not battery_in("") and not discharging(tmp_path / "none")
    mouse = {"type": "Battery", "status": "Discharging", "scope": "Device"}
    supplies = {
        "AC": {"type": "Mains", "online": "0"},
        "hidpp_battery_0": mouse,
        "BAT0": {"type": "Battery", "status": "Full"},
    }
    for name, files in supplies.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text + "\n")
    assert not discharging(tmp_path)
    (tmp_path / "BAT0" / "status").write_text("Discharging\n")
    assert discharging(tmp_path)
