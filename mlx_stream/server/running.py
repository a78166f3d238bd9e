"""Which servers of this user run, by the locks that they hold; imports no server."""

from pathlib import Path
from urllib.parse import quote, unquote

from mlx_stream.program.lock import Lock, holder_of
from mlx_stream.program.paths import data_folder

SERVICE = "mlx_stream.server"
# Set for a process that launchd started: 0 must be its status whenever it ended by itself.
AGENT = "MLX_STREAM_SERVER_AGENT"
BUSY = "another server has this place already: {holder}"


def servers_folder() -> Path:
    return data_folder("server")


def server_log() -> Path:
    """Return where a server that launchd started writes its messages."""
    return servers_folder() / "server.log"


def claim_place(url: str) -> Lock:
    """Hold the lock of a server's place until it ends.

    Raises:
        SessionError: another server holds it, or it cannot be made.
    """
    return Lock.acquire(servers_folder() / f"{quote(url, safe='')}.lock", BUSY)


def running_servers() -> list[str]:
    """Return where servers are reached, and by which processes."""
    found = []
    for path in sorted(servers_folder().glob("*.lock")):
        if holder := holder_of(path):
            found.append(f"{unquote(path.stem)}, {holder}")
    return found
