"""Clients that leave, wait, come in crowds or do not read; a server that stops, fails or stalls."""

import gc
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlx_stream.engine.worker import Worker
from mlx_stream.server import reply_answer
from mlx_stream.server import service as service_module
from mlx_stream.server.chat_completions import ChatFormat
from mlx_stream.server.connection import TimedConnection
from tests.fakes.engines import DEADLINE, LONG, eventually
from tests.fakes.failing import failing
from tests.fakes.servers import ENDLESS, PATH, RunningServer, body_of, read_answer, serving


@pytest.fixture(scope="module")
def server(letters: Path) -> Iterator[RunningServer]:
    with serving(letters, window=256, streams=2, queue=4) as found:
        yield found


def is_idle(server: RunningServer) -> bool:
    lines = server.service.lines
    return server.service.requests == 0 and (
        lines is None or all(line.state == "idle" for line in lines.state())
    )


def is_replying(server: RunningServer) -> bool:
    lines = server.service.lines
    return lines is not None and any(line.state == "replying" for line in lines.state())


def open_files() -> int:
    return len([*Path("/dev/fd").iterdir()])


def asked(server: RunningServer, body: str) -> socket.socket:
    client = server.connect()
    client.sendall(server.head("POST", PATH, body=body))
    return client


def leave(client: socket.socket, reset: bool) -> None:
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("reading", [False, True], ids=["writing", "reading"])
def test_a_client_that_leaves_ends_its_reply(
    server: RunningServer, reset: bool, stream: bool, reading: bool
) -> None:
    engine = server.service.engine
    assert engine
    text = LONG * 40 if reading else "Hello"
    client = asked(server, body_of(text, stream, ENDLESS))
    eventually(lambda: is_replying(server))
    if stream and not reading:
        client.recv(10)
    leave(client, reset)
    eventually(lambda: is_idle(server))
    engine.ping().result(DEADLINE)
    time.sleep(0.02)
    assert engine.step_seconds == 0  # no step follows
    answer = server.ask("POST", PATH, body=body_of(stream=False))
    assert answer.status == 200 and len(answer.json["choices"][0]["message"]["content"]) == 8
    eventually(lambda: " 200 cache=" in server.lines[-1])


def test_a_reply_may_take_longer_than_headers(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimedConnection, "seconds_for_headers", 0.2)
    with closing(asked(server, body_of("Hello", True, ENDLESS))) as client:
        until, found = time.monotonic() + 0.6, b""
        while time.monotonic() < until:
            found = client.recv(65_536)
            assert found and b"408" not in found


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "cancelled"])
def test_a_reply_that_is_cut_ends_with_an_error(server: RunningServer, closed: bool) -> None:
    with closing(asked(server, body_of("Hello", True, ENDLESS))) as client:
        found = client.recv(10)
        (line,) = [x for x in listed(server) if x["state"] == "replying"]
        if closed:
            assert server.ask("DELETE", f"/mlx_stream/streams/{line['id']}").status == 200
        else:
            lines = server.service.lines
            assert lines
            (task,) = [x.session._reply for x in lines._lines if x.reply]
            assert task
            task.cancel()
        while part := client.recv(65_536):
            found += part
            if b"0\r\n\r\n" in part:
                break
    assert b'data: {"error":' in found[-600:] and b"[DONE]" not in found
    assert (b'"stream_closed"' if closed else b'"cut"') in found and b"shutting" not in found
    assert (line["id"] in [x["id"] for x in listed(server)]) != closed
    eventually(lambda: is_idle(server))


def test_a_whole_reply_whose_stream_is_closed_is_an_error(server: RunningServer) -> None:
    with closing(asked(server, body_of("Hello", False, ENDLESS))) as client:
        eventually(lambda: is_replying(server))
        (line,) = [x for x in listed(server) if x["state"] == "replying"]
        assert server.ask("DELETE", f"/mlx_stream/streams/{line['id']}").status == 200
        answer = read_answer(client)
    assert answer.status == 503 and answer.error["code"] == "stream_closed"
    assert "closed by another request" in answer.error["message"]
    eventually(lambda: is_idle(server))


def listed(server: RunningServer) -> list[dict[str, Any]]:
    return server.ask("GET", "/mlx_stream/streams").json["streams"]


def test_a_crowd_is_answered_or_told_to_come_back(server: RunningServer) -> None:
    """Of 64 simultaneous clients, 2 have streams and 4 may wait."""
    server.ask("POST", PATH, body=body_of())
    eventually(lambda: is_idle(server))
    gc.collect()
    before = threading.active_count(), open_files()
    server.lines.clear()
    clients = [asked(server, body_of(f"Hello {n}", n % 2 == 0, 60)) for n in range(64)]
    answers = [read_answer(client) for client in clients]
    for client in clients:
        client.close()
    good = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(good) >= 6 and len(refused) >= 40
    for answer in refused:
        assert answer.status == 503 and answer.error["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) > 0
    times = [int(line.split()[-2]) for line in server.lines if " 503 " in line]
    assert max(times) <= 100
    eventually(lambda: is_idle(server))
    eventually(lambda: open_files() <= before[1])
    assert threading.active_count() <= before[0]


def test_a_text_of_megabytes_holds_up_nobody(server: RunningServer) -> None:
    """Encoding it would occupy the engine's thread for seconds."""
    long, hello = "a" * 4_000_000, {"role": "user", "content": "Hello"}
    head = [{"role": "system", "content": long}, hello]
    old = [{"role": "user", "content": long}, {"role": "assistant", "content": "x"}, hello]
    with closing(asked(server, body_of("Hello", True, ENDLESS))) as client:
        client.recv(10)
        text = json.dumps({"model": "tiny", "prompt": long})
        for path, body in (
            (PATH, body_of(long, True)),
            (PATH, body_of(messages=head)),
            ("/v1/completions", text),
        ):
            answer = server.ask("POST", path, body=body)
            assert answer.status == 400 and "4,000,000 characters" in answer.error["message"]
        answer = server.ask("POST", PATH, body=body_of(stream=False, messages=old))
        about = answer.json["mlx_stream"]
        assert about["cache"] == "cold" and about["evicted_turns"] == 1 and about["read"] < 60
    eventually(lambda: is_idle(server))


def test_those_that_wait_are_answered_in_turn(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_answer, "SILENCES_BEFORE_HEAD", 1)
    with closing(asked(server, body_of("a", True, ENDLESS))) as first:
        first.recv(10)
        with closing(asked(server, body_of("b", True, ENDLESS))) as second:
            second.recv(10)
            waiting = asked(server, body_of("c", True, 8))
            comes = waiting.recv(9999)  # the head arrives even though no stream is free
            assert comes.startswith(b"HTTP/1.1 200") and b"x-mlx-stream" not in comes
            assert server.ask("GET", "/health").status == 200
        found = b""
        while b"[DONE]" not in found:
            found += waiting.recv(9999)
        assert b"waiting for a stream" in comes + found and b'"mlx_stream"' in found
        waiting.close()


def test_a_stream_in_http_1_0_ends_with_its_connection(server: RunningServer) -> None:
    """This is how the Swift client reads it: by lines, without chunks."""
    with closing(server.connect()) as client:
        head = server.head("POST", PATH, body=body_of("Hello", True, 5))
        client.sendall(head.replace(b"HTTP/1.1", b"HTTP/1.0"))
        found = b""
        while part := client.recv(65_536):
            found += part
    head, _, body = found.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and body.endswith(b"data: [DONE]\n\n")
    assert all(line[:1] in (b"d", b":", b"") for line in body.split(b"\n"))


def test_requests_on_one_connection_are_answered_in_order(server: RunningServer) -> None:
    with closing(server.connect()) as client:
        one = server.head("POST", PATH, body=body_of("a", False, 3))
        other = server.head("GET", "/v1/models")
        client.sendall(one + other + one)
        kinds = [read_one(client)["object"] for _ in range(3)]
    assert kinds == ["chat.completion", "list", "chat.completion"]


def read_one(client: socket.socket) -> Any:
    """Read one answer that has a length, and nothing after it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    (length,) = (int(line.split()[1]) for line in head.split(b"\r\n") if b"content-length" in line)
    body = b""
    while len(body) < length:
        body += client.recv(length - len(body))
    return json.loads(body)


def test_a_failed_step_is_an_error_of_its_own_reply(server: RunningServer) -> None:
    engine = server.service.engine
    assert engine
    network = engine._host.model.network
    run, left = Worker._run_round, list[int]()

    def run_or_fail(self: Worker, queues: Any) -> None:
        if left and any(queue.request for queue in queues):
            left.pop()
            with failing(network):
                return run(self, queues)
        run(self, queues)

    for stream in (False, True):
        left.append(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Worker, "_run_round", run_or_fail)
            answer = server.ask("POST", PATH, body=body_of(LONG, stream, 4))
        assert not left
        if stream and answer.status == 200:
            assert b'{"error":' in answer.body and b"[DONE]" not in answer.body
        else:
            assert answer.status == 500 and answer.error["code"] == "compute_failed"
        answer = server.ask("POST", PATH, body=body_of(LONG, stream, 4))
        assert answer.status == 200 and b"error" not in answer.body


def test_a_fault_of_the_server_is_logged_by_its_place_only(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("canary")

    for name, stream in (("piece", True), ("whole", False)):
        with monkeypatch.context() as patch:
            patch.setattr(ChatFormat, name, fail)
            answer = server.ask("POST", PATH, body=body_of(stream=stream))
        assert b"internal_error" in answer.body and b"canary" not in answer.body
        assert stream or answer.status == 500
        eventually(lambda: "RuntimeError at " in server.lines[-1])
        assert "canary" not in server.lines[-1]
    assert server.ask("POST", PATH, body=body_of(stream=False)).status == 200


def test_health_asks_the_thread(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.ask("GET", "/health").json == {"status": "ok"}
    monkeypatch.setattr(service_module, "SECONDS_WITHOUT_A_STEP", 0.4)
    monkeypatch.setattr(service_module, "SECONDS_FOR_A_PING", 0.1)
    hold, run = threading.Event(), Worker._run_round

    def run_late(self: Worker, queues: Any) -> None:
        hold.wait(DEADLINE)
        run(self, queues)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_run_round", run_late)
        assert server.ask("GET", "/health").status == 200  # it is late, but not too late
        time.sleep(0.5)
        answer = server.ask("GET", "/health")
        hold.set()
    assert answer.status == 503 and answer.error["code"] == "stalled"
    eventually(lambda: server.ask("GET", "/health").status == 200)
