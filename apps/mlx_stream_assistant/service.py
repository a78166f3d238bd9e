"""The assistant as a program that starts at login; independent of streams."""

import sys
from pathlib import Path

from mlx_stream.program.login_service import LoginService
from mlx_stream_assistant.paths import AGENT
from mlx_stream_assistant.settings import Settings


def login_service(settings: Settings, log: Path) -> LoginService:
    """Return how the system starts an assistant; see `LoginService`."""
    return LoginService(
        service_name(settings.name),
        f"The assistant {settings.name!r} of mlx_stream",
        (sys.executable, "-P", "-m", "mlx_stream_assistant", "run", *settings.options()),
        log,
        AGENT,
        # The process is light while idle, and quick when it is asked a question.
        {"ProcessType": "Adaptive", "LowPriorityIO": True},
        ("Nice=10",),
    )


def service_name(name: str) -> str:
    return f"mlx_stream.assistant.{name}"
