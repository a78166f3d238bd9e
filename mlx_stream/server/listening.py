"""Sockets to listen on, and the Host names that they accept; independent of requests.

Loopback is 127.0.0.1 and ::1: browsers, Node and macOS try ::1 first for `localhost`.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_stream.errors import ValueRefused

BACKLOG = 1_024
LOOPBACK = ("127.0.0.1", "::1")
HTTP_PORT = 80


@dataclass(frozen=True)
class Listening:
    """What a server listens on.

    Attributes:
        sockets: the bound sockets.
        hosts: the values that the Host header may have; None if it is not checked.
        any_address: the port if the server listens on all addresses; then any is accepted.
        url: the server's address, for display.
    """

    sockets: tuple[socket.socket, ...]
    hosts: frozenset[str] | None
    any_address: int | None
    url: str

    def answers_to(self, host: str) -> bool:
        """Return whether a Host is one of the server's."""
        if self.hosts is None or host in self.hosts:
            return True
        if self.any_address is None:
            return False
        # A name can be made to point here; an address cannot.
        address = host.removesuffix(f":{self.any_address}")
        if address == host and self.any_address != HTTP_PORT:
            return False
        bare = address[1:-1] if address[:1] == "[" and address[-1:] == "]" else address
        with suppress(ValueError):
            return (ipaddress.ip_address(bare).version == 6) == (bare != address)
        return False


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def listen_on_port(host: str, port: int, more_names: Sequence[str] = ()) -> Listening:
    """Bind an address, or both loopback addresses.

    Args:
        host: an address, or `localhost` for 127.0.0.1 and ::1.
        port: 0 picks a free port.
        more_names: additional names by which clients reach the server.

    Raises:
        ValueRefused: the address cannot be bound.
    """
    if not 0 <= port < 2**16:
        raise ValueRefused(f"--port must be from 0 to 65535, not {port}")
    asked = LOOPBACK if host in ("localhost", *LOOPBACK) else (host,)
    found: list[socket.socket] = []
    try:
        for address in asked:
            try:
                found.append(bind(address, port))
            except OSError as error:
                if found and error.errno != errno.EADDRINUSE:  # this machine has no ::1
                    continue
                raise
            port = found[0].getsockname()[1]
    except (OSError, ValueError) as error:
        for one in found:
            one.close()
        reason = getattr(error, "strerror", None) or "not an address"
        other = "use another --port" if isinstance(error, OSError) else "use an address"
        raise ValueRefused(f"cannot listen on {host}:{port}: {reason}: {other}") from error
    names = {*asked, "localhost"} if is_loopback(host) else {host}
    anywhere = host in ("0.0.0.0", "::")
    if anywhere:
        names = {"localhost", socket.gethostname().lower()}
    names |= {name.lower() for name in more_names}
    hosts = frozenset(one for name in names for one in with_port(name, port))
    shown = bracketed("localhost" if is_loopback(host) else host)
    return Listening(tuple(found), hosts, port if anywhere else None, f"http://{shown}:{port}")


def bind(host: str, port: int) -> socket.socket:
    address = ipaddress.ip_address(host)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind((host, port))
        found.listen(BACKLOG)
    except BaseException:
        found.close()
        raise
    return found


def with_port(name: str, port: int) -> list[str]:
    """Return the Host header for a host and a port."""
    return [f"{bracketed(name)}:{port}", *([bracketed(name)] if port == HTTP_PORT else [])]


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def listen_on_path(path: Path) -> Listening:
    """Bind a Unix socket that only this user may use; one left by a dead process is replaced.

    Raises:
        ValueRefused: another process is listening on it, or it cannot be bound.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        if os.path.lexists(path):
            if not path.is_socket() or path.is_symlink():
                raise ValueRefused(f"{path}: not a socket; rename it, or use another --socket")
            if accepts(path):
                raise ValueRefused(f"{path}: in use by another process: use another --socket")
            path.unlink()
        found.bind(os.fspath(path))
        found.listen(BACKLOG)
    except BaseException as error:
        found.close()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise ValueRefused(f"{path}: cannot listen on it: {reason}") from error
        raise
    finally:
        os.umask(before)
    return Listening((found,), None, None, f"unix:{path}")


def accepts(path: Path) -> bool:
    """Return whether a process is listening on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        try:
            caller.connect(os.fspath(path))
        except OSError:
            return False
        return True
