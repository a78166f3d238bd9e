"""A launchd agent or a systemd user unit that runs the assistant; knows no stream.

Both start it when its user logs in, and again if it crashed; not if it ended by itself, which it
does when it is stopped or when something must be put right first. Neither keeps the machine awake.
"""

import os
import plistlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_stream_assistant.paths import AssistantError, private
from mlx_stream_assistant.settings import Settings

# What decides where models and the assistant's files are, and which of the processor is used.
PASSED_ON = ("MLX_STREAM_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_DATA_HOME", "XDG_CACHE_HOME")
# Seconds it is given to stop; it takes one.
STOPPING = 5
# Seconds before it is started again.
BETWEEN_STARTS = 30


@dataclass(frozen=True)
class Service:
    """What the system starts.

    Attributes:
        name: of the assistant.
        command: the words that run it.
        environment: what it is given beside the system's own.
        log: where a launchd agent says what it has to say; systemd has its journal.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path


def service_for(settings: Settings, log: Path) -> Service:
    """Return the service that runs an assistant with these settings, with this Python."""
    environment = {n: os.environ[n] for n in PASSED_ON if os.environ.get(n)}
    command = (sys.executable, "-P", "-m", "mlx_stream_assistant", "run", *words(settings))
    return Service(settings.name, command, environment, log)


def words(settings: Settings) -> list[str]:
    """Return the options of `run` that say the same."""
    found = []
    for option, value in (
        *(("--follow", path) for path in settings.follow),
        *(("--folder", path) for path in settings.folders),
        ("--notes", settings.notes),
        ("--every", settings.every),
        ("--model", settings.model),
        ("--window", settings.window),
        ("--name", settings.name),
        ("--system", settings.system),
        ("--snapshot-every", settings.snapshot_every),
    ):
        if value is not None:
            found.append(f"{option}={value}")
    flags = ("--from-end", settings.from_end), ("--pause-on-battery", settings.pause_on_battery)
    return [*found, *(option for option, is_set in flags if is_set)]


def agent(service: Service) -> bytes:
    """Return a launchd agent; keys as in launchd.plist(5)."""
    return plistlib.dumps(
        {
            "Label": label(service.name),
            "ProgramArguments": list(service.command),
            "EnvironmentVariables": service.environment,
            "RunAtLoad": True,
            "KeepAlive": {"Crashed": True},
            "ThrottleInterval": BETWEEN_STARTS,
            # Light while nothing is asked of it, quick when it is.
            "ProcessType": "Adaptive",
            "LowPriorityIO": True,
            "ExitTimeOut": STOPPING,
            "Umask": 0o077,
            "StandardOutPath": str(service.log),
            "StandardErrorPath": str(service.log),
        }
    )


def unit(service: Service) -> str:
    """Return a systemd user unit."""
    environment = [f"Environment={word(f'{k}={v}')}" for k, v in service.environment.items()]
    lines = [
        "[Unit]",
        f"Description=The assistant {service.name!r} of mlx_stream",
        "",
        "[Service]",
        f"ExecStart={' '.join(word(each, command=True) for each in service.command)}",
        *environment,
        "Restart=on-abnormal",
        f"RestartSec={BETWEEN_STARTS}",
        f"TimeoutStopSec={STOPPING}",
        "Nice=10",
        "UMask=0077",
        "NoNewPrivileges=yes",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def word(text: str, command: bool = False) -> str:
    """Return a word as systemd reads it: quoted; nothing in it is replaced.

    >>> word('50% of "a b"'), word("$HOME", command=True)
    ('"50%% of \\\\"a b\\\\""', '"$$HOME"')
    """
    if any(not c.isprintable() for c in text):
        raise AssistantError(f"{text!r} cannot be in a unit of systemd: leave such characters out")
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if command else text}"'


def label(name: str) -> str:
    return f"mlx_stream.assistant.{name}"


def place(name: str, platform: str = sys.platform) -> Path:
    """Return where the system looks for an assistant's file."""
    home = Path.home()
    if platform == "darwin":
        return home / "Library" / "LaunchAgents" / f"{label(name)}.plist"
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return configuration / "systemd" / "user" / f"mlx_stream-assistant-{name}.service"


def start_commands(name: str, platform: str = sys.platform) -> list[list[str]]:
    """Return the commands that have the system start it, now and at each login."""
    path = place(name, platform)
    if platform == "darwin":
        return [["launchctl", "bootstrap", f"gui/{os.getuid()}", str(path)]]
    return [
        ["systemctl", "--user", "daemon-reload"],
        ["systemctl", "--user", "enable", "--now", path.name],
    ]


def stop_commands(name: str, platform: str = sys.platform) -> list[list[str]]:
    """Return the commands that have the system stop it and forget it."""
    if platform == "darwin":
        return [["launchctl", "bootout", f"gui/{os.getuid()}/{label(name)}"]]
    return [["systemctl", "--user", "disable", "--now", place(name, platform).name]]


def install(service: Service) -> tuple[Path, str]:
    """Write the file and start the assistant; return where it is, and why it was not started.

    Raises:
        AssistantError: the file cannot be written.
    """
    path = place(service.name)
    data = agent(service) if sys.platform == "darwin" else unit(service).encode()
    private(service.log.parent)
    try:
        if path.exists():
            run_command(stop_commands(service.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f".{path.name}.new")
        written.write_bytes(data)
        written.replace(path)
    except OSError as error:
        raise AssistantError(
            f"{path}: cannot be written: {error.strerror}; check the folder's permissions"
        ) from error
    return path, run_command(start_commands(service.name))


def uninstall(name: str) -> Path | None:
    """Stop the assistant and remove its file; return where that was, None if there was none.

    Raises:
        AssistantError: the file cannot be removed.
    """
    path = place(name)
    if not path.exists():
        return None
    run_command(stop_commands(name))
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise AssistantError(f"{path}: cannot be removed: {error.strerror}") from error
    return path


def run_command(commands: list[list[str]]) -> str:
    """Carry commands out; return what went wrong with the first that failed, or ""."""
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command)}: {getattr(error, 'strerror', None) or 'took too long'}"
        if done.returncode:
            reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            return f"{' '.join(command)}: {reason}"
    return ""
