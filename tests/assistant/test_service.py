"""The assistant at login, its options, and how it checks the battery."""

import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_stream.program import login_service
from mlx_stream.program.login_service import LoginServiceError
from mlx_stream_assistant.battery import is_battery_power, is_discharging
from mlx_stream_assistant.cli import app
from mlx_stream_assistant.paths import AGENT
from mlx_stream_assistant.service import login_service as assistant_service
from mlx_stream_assistant.service import service_name
from mlx_stream_assistant.settings import Settings

HARD = Path('/a b/50% $HOME/"x\\.log')


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a home without launchctl or systemctl."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def settings(**more) -> Settings:
    return Settings(follow=[HARD], notes=Path("/n.md"), window=508, **more)


def test_an_agent_of_launchd():
    agent = plistlib.loads(
        assistant_service(settings(pause_on_battery=True), Path("/l.log")).as_agent()
    )
    assert agent["Label"] == "mlx_stream.assistant.main"
    program, *words = agent["ProgramArguments"]
    assert Path(program).is_absolute() and words[:4] == ["-P", "-m", "mlx_stream_assistant", "run"]
    options = {f"--follow={HARD}", "--notes=/n.md", "--window=508", "--pause-on-battery"}
    assert options < {*words[4:]} and "--from-end" not in words
    assert agent["ProcessType"] == "Adaptive" and agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}  # also restarts after an OOM kill
    assert {"MLX_STREAM_HOME", AGENT} <= {*agent["EnvironmentVariables"]}
    path = login_service.service_path(service_name("main"), "darwin")
    assert path.parts[-3:-1] == ("Library", "LaunchAgents")
    name = service_name("x")
    (start,) = login_service.start_commands(name, "darwin")
    (stop,) = login_service.stop_commands(name, "darwin")
    assert start[:2] == ["launchctl", "bootstrap"] and start[3].endswith("assistant.x.plist")
    assert stop[:2] == ["launchctl", "bootout"] and stop[2].endswith("/mlx_stream.assistant.x")


def test_a_unit_of_systemd(tmp_path):
    path = login_service.service_path(service_name("a.b"), "linux")
    assert path.name == "mlx_stream-assistant-a.b.service"
    unit = assistant_service(settings(), Path("/l.log")).as_unit()
    assert "Restart=on-abnormal\n" in unit and "WantedBy=default.target\n" in unit
    assert '"--follow=/a b/50%% $$HOME/\\"x\\\\.log"' in unit
    with pytest.raises(LoginServiceError, match="remove the unprintable characters"):
        login_service.quote_word("a\nb")
    if shutil.which("systemd-analyze"):
        path = tmp_path / "mlx_stream-assistant-main.service"
        path.write_text(unit)
        command = ["systemd-analyze", "--user", "--man=no", "verify", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        # It may print messages about other units, and in a container it has no bus.
        assert path.name not in done.stderr, done.stderr


def test_install_writes_the_options_it_is_given(home):
    given = settings(every=5.0, name="n", system="Be $brief.", snapshot_every=2.5, from_end=True)
    words, path = given.options(), login_service.service_path(service_name("n"))
    assert "--from-end" in words
    texts = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["install", *words])
        assert done.exit_code == 1 and "but it could not be started: " in done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""
        texts.append(path.read_bytes().decode())
    assert texts[0] == texts[1] and "--stdin" not in texts[0]
    assert all(word.split("=")[0] in texts[0] for word in words)
    for code, said in ((0, str(path)), (1, "is not installed")):
        done = CliRunner().invoke(app, ["uninstall", "--name", "n"])
        assert done.exit_code == code and said in done.stderr
    assert list(path.parent.iterdir()) == []


def test_the_systems_commands_are_run_and_a_failure_is_reported(home):
    said = home / "said"

    def programs(script: str) -> None:
        for name in ("launchctl", "systemctl"):
            (home / name).write_text(f"#!/bin/sh\n{script}\n")
            (home / name).chmod(0o700)

    programs(f'echo "$@" >> {said}')
    service = assistant_service(settings(), home / "l.log")
    path, trouble = service.install()
    assert trouble == "" and login_service.uninstall_service(service_name("main")) == path
    assert said.read_text().splitlines()[-1].startswith(("bootout", "--user disable --now"))
    programs("echo no bus >&2; exit 5")
    assert service.install()[1].endswith(": no bus")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--follow=x --every=0",
        "--follow=x --every=nan",
        "--follow=x --snapshot-every=-1",
        "--follow=x --notes=x",
        "--folder=. --name=a/b",
    ],
)
def test_settings_that_cannot_be_carried_out_are_refused_first(home, words):
    for verb in ("install", "run"):
        done = CliRunner().invoke(app, [verb, *words.split()])
        assert done.exit_code == 1 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert [path.name for path in home.rglob("*") if path.is_file()] == []


def test_the_battery(tmp_path):
    assert is_battery_power("Now drawing from 'Battery Power'\n -InternalBattery-0\t81%;")
    assert not is_battery_power("Now drawing from 'AC Power'\n -InternalBattery-0\t100%; charged;")
    assert not is_battery_power("") and not is_discharging(tmp_path / "none")
    for name, kind, status, scope in (
        ("AC", "Mains", "", ""),
        ("hidpp_battery_0", "Battery", "Discharging", "Device"),
        ("BAT0", "Battery", "Full", ""),
    ):
        (tmp_path / name).mkdir()
        for file, text in (("type", kind), ("status", status), ("scope", scope)):
            if text:
                (tmp_path / name / file).write_text(text + "\n")
    assert not is_discharging(tmp_path)
    (tmp_path / "BAT0" / "status").write_text("Discharging\n")
    assert is_discharging(tmp_path)
