"""A launchd agent or a systemd user unit that runs the assistant; independent of streams.

Both start it when its user logs in, and restart it if it is killed, for example because memory ran
out, but not if it exits by itself (it was stopped, or its user has to fix something first). launchd
does not count a process that the system killed as crashed, so the agent asks for a restart after
any exit status other than 0. Neither keeps the machine awake.
"""

import os
import plistlib
import subprocess
import sys
from pathlib import Path

from mlx_stream.program.paths import private
from mlx_stream_assistant.errors import AssistantError
from mlx_stream_assistant.paths import AGENT
from mlx_stream_assistant.settings import Settings

# Variables that decide where models and the assistant's files are.
PASSED_ON = ("MLX_STREAM_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_DATA_HOME", "XDG_CACHE_HOME")
SECONDS_TO_STOP, SECONDS_BETWEEN_STARTS = 5, 30
Commands = list[list[str]]


def install(settings: Settings, log: Path) -> tuple[Path, str]:
    """Write the file and start the assistant; return its path, and why it did not start, or "".

    A launchd agent writes messages to `log`; systemd has its own journal.
    """
    path = service_path(settings.name)
    data = agent(settings, log) if sys.platform == "darwin" else unit(settings).encode()
    private(log.parent)
    try:
        if path.exists():
            run_commands(stop_commands(settings.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f".{path.name}.new")
        written.write_bytes(data)
        written.replace(path)
    except OSError as error:
        raise AssistantError(
            f"{path}: cannot be written: {error.strerror}; check the folder's permissions"
        ) from error
    return path, run_commands(start_commands(settings.name))


def uninstall(name: str) -> Path | None:
    """Stop the assistant and remove its file; return its path, or None if there was none."""
    path = service_path(name)
    if not path.exists():
        return None
    run_commands(stop_commands(name))
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise AssistantError(f"{path}: cannot be removed: {error.strerror}") from error
    return path


def command_line(settings: Settings) -> list[str]:
    return [sys.executable, "-P", "-m", "mlx_stream_assistant", "run", *settings.options()]


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}


def agent(settings: Settings, log: Path) -> bytes:
    """Return a launchd agent; keys as in launchd.plist(5)."""
    return plistlib.dumps(
        {
            "Label": label(settings.name),
            "ProgramArguments": command_line(settings),
            "EnvironmentVariables": {**environment(), AGENT: "1"},
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": SECONDS_BETWEEN_STARTS,
            # The process uses few resources while idle, and responds quickly to a question.
            "ProcessType": "Adaptive",
            "LowPriorityIO": True,
            "ExitTimeOut": SECONDS_TO_STOP,
            "Umask": 0o077,
            "StandardOutPath": str(log),
            "StandardErrorPath": str(log),
        }
    )


def unit(settings: Settings) -> str:
    """Return a systemd user unit."""
    variables = "".join(f"Environment={quote(f'{k}={v}')}\n" for k, v in environment().items())
    return f"""[Unit]
Description=mlx_stream assistant {settings.name!r}

[Service]
ExecStart={" ".join(quote(word, command=True) for word in command_line(settings))}
{variables}Restart=on-abnormal
RestartSec={SECONDS_BETWEEN_STARTS}
TimeoutStopSec={SECONDS_TO_STOP}
Nice=10
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


def quote(text: str, command: bool = False) -> str:
    """Return a word quoted so that systemd reads it unchanged.

    >>> quote('50% of "a b"'), quote("$HOME", command=True)
    ('"50%% of \\\\"a b\\\\""', '"$$HOME"')
    """
    if any(not c.isprintable() for c in text):
        raise AssistantError(
            f"{text!r} cannot be used in a systemd unit: remove the unprintable characters"
        )
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if command else text}"'


def label(name: str) -> str:
    return f"mlx_stream.assistant.{name}"


def service_path(name: str, platform: str = sys.platform) -> Path:
    """Return where the system looks for an assistant's file."""
    if platform == "darwin":
        return Path.home() / "Library" / "LaunchAgents" / f"{label(name)}.plist"
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return configuration / "systemd" / "user" / f"mlx_stream-assistant-{name}.service"


def start_commands(name: str, platform: str = sys.platform) -> Commands:
    """Return the commands that start an assistant, now and at each login."""
    path = service_path(name, platform)
    if platform == "darwin":
        return [["launchctl", "bootstrap", f"gui/{os.getuid()}", str(path)]]
    systemctl = ["systemctl", "--user"]
    return [[*systemctl, "daemon-reload"], [*systemctl, "enable", "--now", path.name]]


def stop_commands(name: str, platform: str = sys.platform) -> Commands:
    """Return the commands that stop an assistant and stop it from starting at login."""
    if platform == "darwin":
        return [["launchctl", "bootout", f"gui/{os.getuid()}/{label(name)}"]]
    return [["systemctl", "--user", "disable", "--now", service_path(name, platform).name]]


def run_commands(commands: Commands) -> str:
    """Run commands; return what went wrong with the first that failed, or ""."""
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command)}: {getattr(error, 'strerror', None) or 'took too long'}"
        if done.returncode:
            reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            return f"{' '.join(command)}: {reason}"
    return ""
