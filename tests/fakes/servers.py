"""The server on a thread of the test's own process, and clients that write bytes to its sockets."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_stream.server.gate import GateRules
from mlx_stream.server.listening import Listening, listen_on_port
from mlx_stream.server.run import serve_until
from mlx_stream.server.service import ModelService, ServiceOptions
from tests.fakes.engines import DEADLINE

MODEL = "tiny"
PATH = "/v1/chat/completions"
ENDLESS = 10**9


def body_of(text: str = "Hello", stream: bool = True, limit: int = 8, **more: Any) -> str:
    messages = [{"role": "user", "content": text}]
    given = {"model": MODEL, "messages": messages, "stream": stream, "max_tokens": limit}
    return json.dumps({**given, "temperature": 0, **more})


@dataclass
class RunningServer:
    """A running server; `lines` are its log, and `notices` what it tells its user."""

    service: ModelService
    listening: Listening
    lines: list[str]
    notices: list[str]
    has_token: bool

    @property
    def port(self) -> int:
        return self.listening.sockets[0].getsockname()[1]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection((host, self.port), DEADLINE)

    def head(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str | None] | None = None,
        body: str = "",
    ) -> bytes:
        """Return the bytes of a request; a header of None is left out."""
        found: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}"}
        if method == "POST":
            found |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"{k}: {v}" for k, v in {**found, **(headers or {})}.items() if v is not None]
        return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", body]).encode()

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str | None] | None = None,
        body: str = "",
        host: str = "127.0.0.1",
    ) -> "Answer":
        """Send one request, and return what comes until the server closes or the body ends."""
        return self.send(self.head(method, path, headers, body), host)

    def send(self, data: bytes, host: str = "127.0.0.1") -> "Answer":
        with closing(self.connect(host)) as client:
            client.sendall(data)
            return read_answer(client)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]


def read_answer(client: socket.socket) -> Answer:
    """Read one answer; a body without a Content-Length ends when the connection does."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(65_536)
        if not part:
            raise ConnectionError(f"closed after {data!r}")
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    length = headers.get("content-length")
    while length is None or len(body) < int(length):
        part = client.recv(65_536)
        if not part:
            break
        body += part
        if headers.get("transfer-encoding") == "chunked" and body.endswith(b"\r\n0\r\n\r\n"):
            break
    if headers.get("transfer-encoding") == "chunked":
        body = joined_chunks(body)
    return Answer(int(first.split()[1]), headers, body)


def joined_chunks(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        found, data = found + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return found


@contextmanager
def serving(
    folder: Path, rules: GateRules | None = None, wait: bool = True, **options: Any
) -> Iterator[RunningServer]:
    """Serve a model on free ports of loopback until the block ends."""
    lines, notices = list[str](), list[str]()
    given = {"dtype": "float32", "keep_quantized": False, "aliases": (MODEL,), **options}
    service = ModelService(ServiceOptions(folder, **given), notices.append)
    listening = listen_on_port("localhost", 0)
    loop, asked = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        await serve_until(asked, service, rules or GateRules(None), listening, lines.append)

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        if wait:
            assert service.engine
            service.engine.wait(DEADLINE)
        yield RunningServer(service, listening, lines, notices, bool(rules and rules.token))
    finally:
        loop.call_soon_threadsafe(asked.set)
        thread.join(DEADLINE)
        assert service.close() and not thread.is_alive()
