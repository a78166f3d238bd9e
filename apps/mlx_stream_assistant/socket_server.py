"""A Unix socket: a request is one line of JSON, its answer several; independent of requests.

Only this user's processes may connect. Even so, there are limits on the length of a
request, the time it takes, and how many are answered at once.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import chdir, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_stream.errors import MlxStreamError
from mlx_stream_assistant.errors import AssistantError

LONGEST_REQUEST = 64 * 1024
MOST_AT_ONCE = 32
# Seconds allowed for sending a request, and for receiving a piece of an answer.
PATIENCE = 10.0
# Seconds allowed for a refused client to finish sending, and for a descriptor to become free.
BRIEFLY = 0.1
# The maximum length of a socket path, in bytes: 104 on a Mac, including the final null byte.
LONGEST_PATH = 103
Answer = Generator[dict[str, Any], None, None]


class SocketServer:
    """A listening socket; `answer` yields the lines for a request, on a separate thread."""

    def __init__(self, path: Path, answer: Callable[[dict[str, Any]], Answer]):
        """Create the socket, replacing one left behind by a killed process."""
        self.path, self._answer = path, answer
        self._at_once = threading.BoundedSemaphore(MOST_AT_ONCE)
        if os.path.lexists(path) and not path.is_socket():
            raise AssistantError(f"{path}: not a socket; rename it")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            # Any old socket was left by a dead process: this one holds the assistant's lock.
            path.unlink(missing_ok=True)
            with socket_address(path) as address:
                self._socket.bind(address)
            self._socket.listen(MOST_AT_ONCE)
            self._socket.setblocking(False)
        except OSError as error:
            self._socket.close()
            raise AssistantError(f"{path}: cannot listen: {error.strerror}") from error
        finally:
            os.umask(before)

    def fileno(self) -> int:
        return self._socket.fileno()

    def admit(self) -> None:
        """Accept one connection, and answer it in the background."""
        try:
            caller, _ = self._socket.accept()
        except OSError as error:
            # The client has hung up, or has to wait because no descriptor is free.
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(BRIEFLY)
            return
        if self._at_once.acquire(blocking=False):
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()
            return
        with caller, suppress(OSError):
            caller.settimeout(BRIEFLY)
            drain(caller)
            busy = f"{MOST_AT_ONCE} other requests are being answered: try again later"
            send(caller, {"error": busy})

    def close(self) -> None:
        """Stop accepting requests, and remove the socket."""
        self._socket.close()
        with suppress(OSError):
            self.path.unlink()

    def _serve(self, caller: socket.socket) -> None:
        try:
            with caller, suppress(OSError):
                try:
                    with closing(self._answer(receive(caller))) as lines:
                        for line in lines:
                            send(caller, line)
                except MlxStreamError as error:
                    send(caller, {"error": str(error)})
        finally:
            self._at_once.release()


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Yield a path short enough for a socket address, changing to its folder if necessary."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield os.fspath(path)
        return
    with chdir(path.parent):
        yield path.name


def receive(caller: socket.socket) -> dict[str, Any]:
    """Receive a request and return it."""
    line, until = b"", time.monotonic() + PATIENCE
    while not line.endswith(b"\n"):
        caller.settimeout(max(0.001, until - time.monotonic()))
        part = caller.recv(LONGEST_REQUEST + 1 - len(line))
        line += part
        if len(line) > LONGEST_REQUEST:
            drain(caller)
            raise AssistantError(f"a request may be at most {LONGEST_REQUEST:,} bytes long")
        if not part:
            break
    caller.settimeout(PATIENCE)
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise AssistantError("a request must be one JSON object on one line")
    return request


def drain(caller: socket.socket) -> None:
    # If part of a request were unread, closing would discard the answer.
    with suppress(OSError):
        caller.recv(LONGEST_REQUEST)


def send(caller: socket.socket, line: dict[str, Any]) -> None:
    caller.sendall(json.dumps(line).encode() + b"\n")


def request(path: Path, name: str, **what: Any) -> Answer:
    """Send a request to the listening process; yield the lines of its answer."""
    if len(json.dumps(what)) >= LONGEST_REQUEST:
        raise AssistantError(
            f"the request is too long: it may be at most {LONGEST_REQUEST:,} bytes long"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        try:
            with socket_address(path) as address:
                caller.connect(address)
        except OSError as error:
            raise AssistantError(
                f"the assistant {name!r} is not running: start it with `run`, or `install` it"
            ) from error
        with suppress(OSError, ValueError):
            with suppress(
                BrokenPipeError
            ):  # the request was refused unread; the reason can still be read
                send(caller, what)
            with caller.makefile("rb") as lines:
                for text in lines:
                    line = json.loads(text)
                    if "error" in line:
                        raise AssistantError(line["error"])
                    yield line
                    if line.get("done"):
                        return
        raise AssistantError(f"the assistant {name!r} exited before it answered")
