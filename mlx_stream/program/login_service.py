"""A program that starts at login: a launchd agent or a systemd user unit.

Both start it when its user logs in, and restart it if it is killed, for example because memory ran
out, but not if it exits by itself (it was stopped, or its user has to fix something first). launchd
does not count a process that the system killed as crashed, so the agent asks for a restart after
any exit status other than 0. Neither keeps the machine awake.
"""

import os
import plistlib
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_stream.errors import MlxStreamError
from mlx_stream.program.paths import private

# Environment variables that determine where models and a program's files are.
PASSED_ON = ("MLX_STREAM_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_DATA_HOME", "XDG_CACHE_HOME")
SECONDS_TO_STOP, SECONDS_BETWEEN_STARTS = 5, 30
Commands = list[list[str]]


class LoginServiceError(MlxStreamError):
    """A launchd or systemd file cannot be written or removed."""


@dataclass(frozen=True)
class LoginService:
    """A program to start at login.

    Attributes:
        name: used in file names, with dots; also launchd's label.
        description: shown in systemd's lists.
        command: the program and its arguments.
        log: where launchd writes its messages; systemd has its own journal.
        agent_mark: an environment variable that is set to 1 when launchd starts the program.
        agent: additional keys for launchd; see launchd.plist(5).
        unit: additional lines for systemd's [Service] section.
    """

    name: str
    description: str
    command: tuple[str, ...]
    log: Path
    agent_mark: str
    agent: Mapping[str, Any] = field(default_factory=dict)
    unit: tuple[str, ...] = ()

    def install(self) -> tuple[Path, str]:
        """Write the file and start the program; return its path, and why it did not start, or "".

        Raises:
            LoginServiceError: the file cannot be written.
        """
        path = service_path(self.name)
        data = self.as_agent() if sys.platform == "darwin" else self.as_unit().encode()
        private(self.log.parent)
        try:
            if path.exists():
                run_commands(stop_commands(self.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_name(f".{path.name}.new")
            written.write_bytes(data)
            written.replace(path)
        except OSError as error:
            raise LoginServiceError(
                f"{path}: cannot be written: {error.strerror}; check the folder's permissions"
            ) from error
        return path, run_commands(start_commands(self.name))

    def as_agent(self) -> bytes:
        """Return a launchd agent."""
        return plistlib.dumps(
            {
                "Label": self.name,
                "ProgramArguments": [*self.command],
                "EnvironmentVariables": {**environment(), self.agent_mark: "1"},
                "RunAtLoad": True,
                "KeepAlive": {"SuccessfulExit": False},
                "ThrottleInterval": SECONDS_BETWEEN_STARTS,
                "ExitTimeOut": SECONDS_TO_STOP,
                "Umask": 0o077,
                "StandardOutPath": str(self.log),
                "StandardErrorPath": str(self.log),
                **self.agent,
            }
        )

    def as_unit(self) -> str:
        """Return a systemd user unit."""
        variables = "".join(
            f"Environment={quote_word(f'{k}={v}')}\n" for k, v in environment().items()
        )
        more = "".join(f"{line}\n" for line in self.unit)
        return f"""[Unit]
Description={self.description}

[Service]
ExecStart={" ".join(quote_word(word, command=True) for word in self.command)}
{variables}Restart=on-abnormal
RestartSec={SECONDS_BETWEEN_STARTS}
TimeoutStopSec={SECONDS_TO_STOP}
{more}UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


def uninstall_service(name: str) -> Path | None:
    """Stop a program and remove its file; return its path, or None if there was none.

    Raises:
        LoginServiceError: the file cannot be removed.
    """
    path = service_path(name)
    if not path.exists():
        return None
    run_commands(stop_commands(name))
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise LoginServiceError(f"{path}: cannot be removed: {error.strerror}") from error
    return path


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}


def quote_word(text: str, command: bool = False) -> str:
    """Return a word quoted so that systemd reads it unchanged.

    >>> quote_word('50% of "a b"'), quote_word("$HOME", command=True)
    ('"50%% of \\\\"a b\\\\""', '"$$HOME"')
    """
    if any(not c.isprintable() for c in text):
        raise LoginServiceError(
            f"{text!r} cannot be used in a systemd unit: remove the unprintable characters"
        )
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if command else text}"'


def service_path(name: str, platform: str = sys.platform) -> Path:
    """Return where the system looks for a program's file.

    >>> service_path("mlx_stream.assistant.a.b", "linux").name
    'mlx_stream-assistant-a.b.service'
    """
    if platform == "darwin":
        return Path.home() / "Library" / "LaunchAgents" / f"{name}.plist"
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return configuration / "systemd" / "user" / f"{name.replace('.', '-', 2)}.service"


def start_commands(name: str, platform: str = sys.platform) -> Commands:
    """Return the commands that start a program, now and at each login."""
    path = service_path(name, platform)
    if platform == "darwin":
        return [["launchctl", "bootstrap", f"gui/{os.getuid()}", str(path)]]
    systemctl = ["systemctl", "--user"]
    return [[*systemctl, "daemon-reload"], [*systemctl, "enable", "--now", path.name]]


def stop_commands(name: str, platform: str = sys.platform) -> Commands:
    """Return the commands that stop a program and stop it from starting at login."""
    if platform == "darwin":
        return [["launchctl", "bootout", f"gui/{os.getuid()}/{name}"]]
    return [["systemctl", "--user", "disable", "--now", service_path(name, platform).name]]


def run_commands(commands: Commands) -> str:
    """Run commands; return the error of the first one that fails, or ""."""
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command)}: {getattr(error, 'strerror', None) or 'took too long'}"
        if done.returncode:
            reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            return f"{' '.join(command)}: {reason}"
    return ""
