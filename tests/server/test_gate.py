"""Which requests are accepted, as raw bytes on every path; the engine does nothing for the rest."""

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.routing import Route

from mlx_stream.errors import ValueRefused
from mlx_stream.server.api_token import read_token
from mlx_stream.server.app import routes_of
from mlx_stream.server.connection import TimedConnection
from mlx_stream.server.gate import GateRules
from mlx_stream.server.listening import Listening, listen_on_path, listen_on_port
from tests.fakes.engines import eventually
from tests.fakes.servers import RunningServer, read_answer, serving

TOKEN = "a-token-of-many-characters"
PAGE = "http://page.example"


@pytest.fixture(scope="module", params=[None, TOKEN], ids=["open", "token"])
def server(request: pytest.FixtureRequest, letters: Path) -> Iterator[RunningServer]:
    token = request.param and request.param.encode()
    rules = GateRules(None, frozenset({PAGE}), token, max_body=4_000, seconds_between_bytes=0.3)
    with serving(letters, rules) as found:
        yield found


def paths(server: RunningServer) -> list[tuple[str, str]]:
    """Return the method and path of each route."""
    routes = [route for route in routes_of(server.service) if isinstance(route, Route)]
    found = [
        (
            method,
            route.path.replace("{id:path}", "x")
            .replace("{rest:path}", "x")
            .replace("{number}", "1"),
        )
        for route in routes
        for method in sorted(route.methods or ())
        if method != "HEAD"
    ]
    assert len(found) > 8 and not any("{" in path for _, path in found)
    return [*found, ("GET", "/nowhere"), ("POST", "/nowhere")]


def allowed(server: RunningServer, headers: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return headers with the token that a server asks for."""
    token = {"Authorization": f"Bearer {TOKEN}"} if server.has_token else {}
    return {**token, **headers}


def refused_everywhere(
    server: RunningServer, headers: dict[str, str | None], status: int, body: str = "{}"
) -> None:
    """Check that no path answers a request, and that the engine is not asked."""
    assert server.service.engine
    before = server.service.engine.memory
    for method, path in paths(server):
        found = server.ask(method, path, headers, body if method == "POST" else "")
        assert found.status == status, (method, path, found)
        assert found.error["message"] and found.headers["connection"] == "close"
    assert server.service.requests == 0 and server.service.engine.memory == before


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("name", ["127.0.0.1:{}", "localhost:{}", "[::1]:{}", "LocalHost:{}"])
def test_both_addresses_of_loopback_answer_to_their_names(
    server: RunningServer, host: str, name: str
) -> None:
    headers = allowed(server, {"Host": name.format(server.port)})
    assert server.ask("GET", "/v1/models", headers, host=host).status == 200


@pytest.mark.parametrize(
    "name",
    [
        *(
            "page.example",
            "page.example:{}",
            "localhost",
            "127.0.0.1",
            "127.0.0.1:1",
            "127.0.0.2:{}",
        ),
        *(
            "localhost.:{}",
            "localhost:{}.page.example",
            "localhost:{}@page.example",
            "xlocalhost:{}",
        ),
        *("[::]:{}", "0.0.0.0:{}", "127.1:{}", "2130706433:{}", "localhost:0{}", "", "::1:{}"),
    ],
)
def test_another_host_is_refused(server: RunningServer, name: str) -> None:
    refused_everywhere(server, allowed(server, {"Host": name.format(server.port)}), 421)


@pytest.mark.parametrize("name", [None, "twice"])
def test_a_host_is_there_once(server: RunningServer, name: str | None) -> None:
    head = server.head("GET", "/v1/models", allowed(server, {"Host": None}))
    if name:
        host = f"Host: 127.0.0.1:{server.port}\r\n".encode()
        head = head.replace(b"\r\n\r\n", b"\r\n" + host + host + b"\r\n")
    assert server.send(head).status == 400


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "http://page.example.org",
            "null",
            "",
            "file://",
            "http://localhost",
            "HTTP://PAGE.EXAMPLE",
        ),
        *("https://127.0.0.1:{}", "http://127.0.0.1:1", "http://127.0.0.1:{}.page.example"),
        *("http://localhost:{}", "http://page.example:80", "*"),
    ],
)
def test_a_page_of_another_origin_is_refused(server: RunningServer, origin: str) -> None:
    headers = allowed(server, {"Origin": origin.format(server.port)})
    refused_everywhere(server, headers, 403)
    assert "access-control-allow-origin" not in server.ask("GET", "/v1/models", headers).headers


@pytest.mark.parametrize("site", ["cross-site", "CROSS-SITE", " Cross-Site "])
def test_a_page_of_another_site_is_refused(server: RunningServer, site: str) -> None:
    refused_everywhere(server, allowed(server, {"Sec-Fetch-Site": site}), 403)


def test_a_path_may_be_a_url_of_the_server(server: RunningServer) -> None:
    for host in ("localhost:{}", "LOCALHOST:{}", "127.0.0.1:{}", "[::1]:{}"):
        url = f"http://{host.format(server.port)}"
        for path, status in (("/v1/models", 200), ("/v1/models?x=/y", 200), ("/no%2Fwhere", 404)):
            assert server.ask("GET", url + path, allowed(server, {})).status == status
        assert server.ask("GET", url, allowed(server, {})).status == 404
        if server.has_token:
            assert server.ask("GET", f"{url}/v1/models").status == 401
        assert server.ask("PUT", f"HTTP{url[4:]}/v1/models", allowed(server, {})).status == 405
    eventually(lambda: "GET /v1/models 200" in "\n".join(server.lines))


@pytest.mark.parametrize(
    "host", ["page.example", "localhost", "localhost:{}@page.example", "me@localhost:{}", ""]
)
def test_a_path_may_not_be_another_url(server: RunningServer, host: str) -> None:
    url = f"http://{host.format(server.port)}/v1/models"
    assert server.ask("GET", url, allowed(server, {})).status == 421
    own = f"http://localhost:{server.port}/v1/models"
    assert server.ask("GET", own, allowed(server, {"Host": "page.example"})).status == 421
    assert server.ask("GET", own.replace("http", "ftp"), allowed(server, {})).status == 404


def test_pages_of_the_server_and_of_allowed_origins_may_ask(server: RunningServer) -> None:
    own = {"Origin": f"http://127.0.0.1:{server.port}", "Sec-Fetch-Site": "same-origin"}
    found = server.ask("GET", "/v1/models", allowed(server, own))
    assert found.status == 200 and "access-control-allow-origin" not in found.headers
    page = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}
    found = server.ask("GET", "/v1/models", allowed(server, page))
    assert found.status == 200 and found.headers["access-control-allow-origin"] == PAGE
    found = server.ask("PUT", "/v1/models", page)  # the page can read why it is refused
    assert found.status >= 400 and found.headers["access-control-allow-origin"] == PAGE
    asks = {**page, "Access-Control-Request-Method": "GET"}
    found = server.ask("OPTIONS", "/v1/models", asks)
    assert found.status == 204 and "GET" in found.headers["access-control-allow-methods"]
    assert found.headers["access-control-allow-origin"] == PAGE
    asks["Origin"] = "http://other.example"
    assert server.ask("OPTIONS", "/v1/models", asks).status == 403


@pytest.mark.parametrize(
    "headers",
    [
        *({}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {TOKEN}x"}),
        *({"Authorization": f"Basic {TOKEN}"}, {"Authorization": TOKEN}, {"X-Api-Key": TOKEN[:-1]}),
    ],
)
def test_a_token_is_asked_for(server: RunningServer, headers: dict[str, str | None]) -> None:
    if not server.has_token:
        assert server.ask("GET", "/v1/models", headers).status == 200
        return
    refused_everywhere(server, headers, 401)
    assert server.ask("GET", "/v1/models", {"X-Api-Key": TOKEN}).status == 200


def test_a_method_that_a_path_does_not_have_is_refused(server: RunningServer) -> None:
    known = paths(server)[:-2]
    for _, path in known:
        for method in ("PUT", "PATCH", "TRACE", "OPTIONS", "X"):
            found = server.ask(method, path, allowed(server, {}))
            assert found.status == 405 and found.headers["allow"], (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        *(
            {"Content-Type": None},
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/jsonx"},
        ),
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Encoding": "gzip"},
    ],
)
def test_a_body_of_another_type_is_refused(
    server: RunningServer, headers: dict[str, str | None]
) -> None:
    posts = [path for method, path in paths(server) if method == "POST"]
    for path in posts:
        assert server.ask("POST", path, allowed(server, headers), "{}").status == 415, path


@pytest.mark.parametrize("name", ["Origin", "Authorization", "Content-Type", "Sec-Fetch-Site"])
def test_a_header_that_decides_is_there_once(server: RunningServer, name: str) -> None:
    head = server.head("POST", "/v1/models", allowed(server, {}))
    one = f"{name}: application/json\r\n".encode()
    found = server.send(head.replace(b"\r\n\r\n", b"\r\n" + one + one + b"\r\n", 1))
    assert found.status == 400 and found.error["code"] == "doubled_header"


def posts(server: RunningServer) -> list[str]:
    return [p for m, p in paths(server) if m == "POST" and p != "/nowhere"]


def test_a_long_body_is_refused_before_it_is_read(server: RunningServer) -> None:
    for path in posts(server):
        for length in (4_001, 300 * 2**20, 10**30):
            head = server.head("POST", path, allowed(server, {"Content-Length": str(length)}))
            found = server.send(head)
            assert found.status in (400, 413), (path, length)
    chunked = allowed(server, {"Content-Length": None, "Transfer-Encoding": "chunked"})
    head = server.head("POST", posts(server)[0], chunked)
    part = b"fa0\r\n" + b" " * 4_000 + b"\r\n"
    assert server.send(head + part + part).error["code"] == "too_large"


def test_a_body_where_there_is_none_is_refused(server: RunningServer) -> None:
    for method, path in paths(server):
        if method != "POST":
            headers = allowed(server, {"Content-Length": "2"})
            found = server.ask(method, path, headers, "{}")
            assert found.status == 413 and found.error["code"] == "body", path


def test_bodies_in_memory_are_bounded(server: RunningServer) -> None:
    """At most four of the largest are held at once; those already answered do not count."""
    path, large = posts(server)[0], "x" * 3_900
    for _ in range(6):
        assert server.ask("POST", path, allowed(server, {}), large).status != 503
    head = server.head("POST", path, allowed(server, {"Content-Length": "4000"}), large)
    clients = [server.connect() for _ in range(5)]
    try:
        for client in clients:
            client.sendall(head)
            time.sleep(0.02)
        assert read_answer(clients[-1]).error["code"] == "busy"
    finally:
        for client in clients:
            client.close()
    assert server.ask("POST", path, allowed(server, {}), large).status != 503


def test_a_client_that_sends_too_much_can_read_why(server: RunningServer) -> None:
    body = " " * 20 * 2**20
    found = server.ask("POST", posts(server)[0], allowed(server, {}), body)
    assert found.error["code"] == "too_large"


def test_a_slow_body_is_refused(server: RunningServer) -> None:
    for path in posts(server)[:2]:
        with closing(server.connect()) as client:
            client.sendall(server.head("POST", path, allowed(server, {"Content-Length": "10"})))
            client.sendall(b"{")
            assert read_answer(client).status == 408


def test_slow_headers_end_a_connection(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimedConnection, "seconds_for_headers", 0.4)
    started = time.monotonic()
    with closing(server.connect()) as silent, closing(server.connect()) as slow:
        for byte in b"GET /health HTTP/1.1\r\nX: ":
            try:
                slow.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
        assert slow.recv(999).startswith(b"HTTP/1.1 408") and silent.recv(999)
    assert time.monotonic() - started < 3
    with closing(server.connect()) as kept:  # on a connection that has been used, too
        for _ in range(2):
            kept.sendall(server.head("GET", "/v1/models", allowed(server, {})))
            assert read_answer(kept).status == 200
        kept.sendall(b"GET /")
        assert kept.recv(999).startswith(b"HTTP/1.1 408")


def test_others_are_served_while_many_connections_wait(server: RunningServer) -> None:
    waiting = [server.connect() for _ in range(200)]
    try:
        with_body = allowed(server, {"Content-Length": "10"})
        for client in waiting[::2]:
            client.sendall(server.head("POST", posts(server)[0], with_body)[:40])
        assert server.ask("GET", "/v1/models", allowed(server, {})).status == 200
    finally:
        for client in waiting:
            client.close()


def test_the_oldest_idle_connection_makes_room(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimedConnection, "most", 8)
    waiting = [server.connect() for _ in range(12)]
    try:
        assert server.ask("GET", "/v1/models", allowed(server, {})).status == 200
        closed = 0
        for client in waiting:
            client.settimeout(0.1)
            with suppress(TimeoutError):
                try:
                    closed += client.recv(1) == b""
                except ConnectionError:
                    closed += 1
        assert closed >= 4
    finally:
        for client in waiting:
            client.close()


@pytest.mark.parametrize("ending", [b"", b"\x00", b"\r\n\r\n", b"GET", b"\xff\xfe" * 99])
def test_what_is_not_http_is_refused(server: RunningServer, ending: bytes) -> None:
    with closing(server.connect()) as client:
        client.sendall(b"nonsense " + ending + b"\r\n\r\n")
        assert read_answer(client).status == 400


def test_a_client_that_vanishes_leaves_nothing(server: RunningServer) -> None:
    for path in posts(server):
        for linger in (False, True):
            client = server.connect()
            client.sendall(server.head("POST", path, allowed(server, {"Content-Length": "10"})))
            if linger:
                reset = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            client.close()
    assert server.ask("GET", "/v1/models", allowed(server, {})).status == 200
    assert server.service.requests == 0


def test_a_log_line_has_no_text_of_the_request(server: RunningServer) -> None:
    server.ask("GET", "/canary?canary=1", allowed(server, {"X-Canary": "canary"}))
    server.ask("POST", posts(server)[0], allowed(server, {}), '{"canary": "canary"}')
    time.sleep(0.05)
    assert len(server.lines) > 1 and "canary" not in "\n".join(server.lines)
    assert server.lines[-1].startswith("POST /") and server.lines[-1].endswith(" ms")


# --- parts ---


def test_a_token_file_is_made_and_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "token"
    made = read_token(path)
    assert path.stat().st_mode & 0o777 == 0o600 and read_token(path) == made and len(made) > 40
    path.chmod(0o640)
    with pytest.raises(ValueRefused, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    for text in ("", "short", "two words of some length", "ä" * 20):
        path.write_text(text)
        with pytest.raises(ValueRefused, match="characters"):
            read_token(path)
    with pytest.raises(ValueRefused):
        read_token(tmp_path)


def test_a_socket_is_private_and_replaces_a_dead_one_only(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_on_path(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueRefused, match="another process"):
        listen_on_path(path)
    first.sockets[0].close()
    listen_on_path(path).sockets[0].close()
    path.unlink()
    path.write_text("a file")
    with pytest.raises(ValueRefused, match="not a socket"):
        listen_on_path(path)


def test_a_port_in_use_is_one_line() -> None:
    first = listen_on_port("localhost", 0)
    port = first.sockets[0].getsockname()[1]
    try:
        assert len(first.sockets) == 2
        for host in ("localhost", "127.0.0.1", "::1"):
            with pytest.raises(ValueRefused, match="--port"):
                listen_on_port(host, port)
        with pytest.raises(ValueRefused):
            listen_on_port("page.example", port)
    finally:
        for one in first.sockets:
            one.close()


def test_another_name_of_the_server_may_be_given() -> None:
    found = listen_on_port("localhost", 0, ["Host.Docker.internal"])
    port = found.sockets[0].getsockname()[1]
    for one in found.sockets:
        one.close()
    assert found.answers_to(f"host.docker.internal:{port}")
    assert not found.answers_to("host.docker.internal")
    assert not found.answers_to(f"docker.internal:{port}")


def test_on_every_address_an_address_is_a_host_and_a_name_is_not() -> None:
    anywhere = Listening((), frozenset({"mac.local:80"}), 8085, "")
    assert anywhere.answers_to("192.168.1.2:8085") and anywhere.answers_to("[fe80::1]:8085")
    for host in ("page.example:8085", "192.168.1.2", "192.168.1.2:80", "fe80::1:8085", ":8085"):
        assert not anywhere.answers_to(host), host
    assert replace(anywhere, any_address=80).answers_to("192.168.1.2")
