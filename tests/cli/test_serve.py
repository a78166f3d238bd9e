"""`mlx_stream serve` without a server: its options, the extra it needs, and the server at login."""

import os
import plistlib
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mlx_stream.cli.serve import ListenOptions, ServiceChoices, option_words
from mlx_stream.program.login_service import LoginService, service_path
from mlx_stream.server.running import AGENT, SERVICE, claim_place
from tests.fakes.shell import DEADLINE, done, parsed, run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home without launchctl or systemctl."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a b", "only one model can be served"),
        ("--host 0.0.0.0", "--token-file"),
        ("--host 192.0.2.1", "--token-file"),
        ("--port 70000", "--port must be from 0 to 65535"),
        ("--max-body 0", "--max-body"),
        ("--streams 0", "--streams must be at least 1"),
        ("--queue -1", "--queue must be at least 0"),
        ("--idle-unload 0", "--idle-unload"),
        ("--alias=", "--alias"),
        ("--allow-origin page.example", "--allow-origin"),
        ("--allow-origin *", "--allow-origin"),
        ("--allow-origin http://page.example/x", "--allow-origin"),
        ("--socket .", "not a socket"),
        ("--socket no/such/folder/s", "cannot listen"),
        ("--token-file .", "token"),
        ("uninstall starter", "uninstall takes no MODEL"),
        ("uninstall --port 1", "uninstall takes no MODEL"),
        ("uninstall", "is not installed"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    home: Path, elsewhere: None, words: str, said: str
) -> None:
    found = run("serve", *words.split())
    assert (found.code, found.out) == (1, "") and found.err.count("\n") == 1
    assert said in found.err


def test_a_missing_extra_is_one_line(home: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from mlx_stream.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "starter"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert "serve needs uvicorn" in found.stderr and "mlx_stream[server]" in found.stderr


def test_a_server_at_login_has_the_options_it_was_given(
    home: Path, letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(letters.parent)
    words = ["--port", "8091", "--alias", "a", "--alias", "b", "--any-model", "--window", "508"]
    words += ["--token-file", "token", "--dequantize", "--idle-unload", "60"]
    path, texts = service_path(SERVICE), []
    for _ in range(2):
        found = run("serve", "install", letters.name, *words)
        assert found.code == 1 and "but it could not be started: " in found.err
        texts.append(path.read_bytes().decode())
    assert texts[0] == texts[1]
    for word in (
        *("--port=8091", "--alias=a", "--alias=b", "--any-model", "--window=508", "--dequantize"),
        *(f"--token-file={letters.parent / 'token'}", str(letters), "--idle-unload=60.0"),
    ):
        assert word in texts[0]
    assert "--streams" not in texts[0] and os.environ["MLX_STREAM_HOME"] in texts[0]
    assert str(path) in done("serve", "uninstall").err
    assert not path.exists()


def test_what_is_installed_parses_and_an_agent_is_interactive(home: Path) -> None:
    listen = ListenOptions(socket=Path("s"), allow_origin=["http://a", "http://b"])
    choices = ServiceChoices(keep_quantized=True, streams=2)
    words = [*option_words(listen), *option_words(choices)]
    assert words == [
        *(f"--socket={Path('s').absolute()}", "--allow-origin=http://a", "--allow-origin=http://b"),
        *("--streams=2", "--keep-quantized"),
    ]
    given = {"ProcessType": "Interactive"}
    service = LoginService(SERVICE, "x", ("python",), home / "log", AGENT, given)
    agent = plistlib.loads(service.as_agent())
    assert agent["ProcessType"] == "Interactive" and agent["ThrottleInterval"] == 30
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["EnvironmentVariables"][AGENT] == "1"


def test_launchd_does_not_start_what_cannot_run_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AGENT, "1")
    found = run("serve", "--host", "0.0.0.0")
    assert found.code == 0 and "--token-file" in found.err


def test_doctor_says_which_servers_run(home: Path) -> None:
    assert parsed(done("doctor", "--json").out)["server"] == "none is running"
    with closing(claim_place("http://localhost:8085")), closing(claim_place("unix:/a b/s")):
        found = parsed(done("doctor", "--json").out)["server"]
    here = f"process {os.getpid()} since"
    assert f"http://localhost:8085, {here}" in found and f"unix:/a b/s, {here}" in found
    assert parsed(done("doctor", "--json").out)["server"] == "none is running"
