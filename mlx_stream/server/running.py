"""Finds this user's running servers by the locks that they hold; independent of the server."""

from pathlib import Path
from urllib.parse import quote, unquote

from mlx_stream.program.lock import Lock, holder_of
from mlx_stream.program.paths import data_folder

SERVICE = "mlx_stream.server"
# Set for a process started by launchd: it must exit with 0 whenever it exits by itself.
AGENT = "MLX_STREAM_SERVER_AGENT"
BUSY = "another server is already running at this address: {holder}"


def servers_folder() -> Path:
    return data_folder("server")


def server_log() -> Path:
    """Return where a server that launchd started writes its messages."""
    return servers_folder() / "server.log"


def claim_place(url: str) -> Lock:
    """Take the lock for a server's address, to be held until the server exits.

    Raises:
        SessionError: another server holds the lock, or its file cannot be created.
    """
    return Lock.acquire(servers_folder() / f"{quote(url, safe='')}.lock", BUSY)


def running_servers() -> list[str]:
    """Return the addresses of the running servers, with their processes."""
    found = []
    for path in sorted(servers_folder().glob("*.lock")):
        if holder := holder_of(path):
            found.append(f"{unquote(path.stem)}, {holder}")
    return found
