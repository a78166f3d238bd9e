"""Tests with their own servers: not read from, idle, without a model, and in a separate process."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mlx_stream
from mlx_stream.errors import ValueRefused
from mlx_stream.server.connection import TimedConnection
from mlx_stream.server.service import ServiceOptions
from tests.fakes.conversations import said
from tests.fakes.engines import DEADLINE, GREEDY, eventually
from tests.fakes.servers import ENDLESS, MODEL, PATH, body_of, read_answer, serving


def test_a_client_that_does_not_read_is_cut(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedConnection, "seconds_unread", 0.5)
    aliases = tuple(f"{number:0200}" for number in range(60_000))
    with serving(letters, aliases=aliases) as server, closing(server.connect()) as client:
        client.sendall(server.head("GET", "/v1/models"))
        time.sleep(1.5)
        found = 0
        with pytest.raises(ConnectionError):
            while part := client.recv(2**20):
                found += len(part)
            raise ConnectionResetError if found < 12_000_000 else AssertionError
        assert server.ask("GET", "/health").status == 200


def test_an_idle_server_releases_the_weights_and_loads_them_again(letters: Path) -> None:
    with serving(letters, idle_unload=1 / 60) as server:
        first = server.ask("POST", PATH, body=body_of(stream=False))
        engine = server.service.engine
        assert engine and engine.memory[0] > 0
        eventually(lambda: server.service.engine is None)
        eventually(lambda: engine.memory[0] == 0)
        assert server.ask("GET", "/health").json == {"status": "unloaded"}
        assert server.ask("GET", "/v1/models").status == 200
        answers = []

        def ask() -> None:
            answers.append(server.ask("POST", PATH, body=body_of(stream=False)))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        texts = {answer.json["choices"][0]["message"]["content"] for answer in (first, *answers)}
        assert len(answers) == 3 and len(texts) == 1


def test_an_unloaded_server_recognizes_what_it_kept(letters: Path, tmp_path: Path) -> None:
    messages, caches = [], []
    with serving(letters, window=256, idle_unload=1 / 60, keep=tmp_path / "kept") as server:
        for number in range(3):
            messages.append({"role": "user", "content": f"Hello {number}"})
            answer = server.ask("POST", PATH, body=body_of(stream=False, messages=messages))
            caches.append(answer.json["mlx_stream"]["cache"])
            messages.append(answer.json["choices"][0]["message"])
            eventually(lambda: server.service.engine is None)
    assert caches == ["new", "restored", "restored"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"keep_size": 0}, "--keep-size"),
        ({"keep_size": float("nan"), "keep": Path("x")}, "--keep-size"),
        ({"keep_size": 3}, "add --keep"),
    ],
)
def test_options_of_kept_conversations_are_checked(
    letters: Path, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueRefused, match=what):
        ServiceOptions(letters, (MODEL,), **options)


def test_a_refused_request_loads_no_model(letters: Path) -> None:
    with serving(letters, idle_unload=1 / 60) as server:
        eventually(lambda: server.service.engine is None)
        for path, body in (
            (PATH, "{"),
            (PATH, body_of(model="other")),
            (PATH, body_of(n=2)),
            (PATH, body_of(messages=[])),
            (PATH, body_of(mlx_stream={"session": "a/b"})),
            ("/v1/completions", "{}"),
            ("/v1/completions", json.dumps({"model": "other", "prompt": "x"})),
        ):
            assert server.ask("POST", path, body=body).status in (400, 404)
            assert server.service.engine is None


def test_the_default_window_leaves_room_for_a_system_prompt(letters: Path) -> None:
    with serving(letters) as server:
        messages = [
            {"role": "system", "content": "Be brief. " * 10},
            {"role": "user", "content": "Hello"},
        ]
        answer = server.ask("POST", PATH, body=body_of(stream=False, messages=messages))
        assert answer.status == 200, answer
        trained = json.loads((letters / "config.json").read_text())["max_position_embeddings"]
        assert trained // 2 < answer.json["mlx_stream"]["window"] < trained


def test_a_history_of_megabytes_is_extended(letters: Path) -> None:
    """It is parsed and compared on another thread; meanwhile, health requests are answered."""
    turns = [
        {"role": role, "content": f"{number} {role} " * 100}
        for number in range(1_000)
        for role in ("user", "assistant")
    ]
    question = {"role": "user", "content": "Hello"}
    with serving(letters, window=256) as server:
        body = body_of(stream=False, messages=[*turns, question])
        assert len(body) > 2_000_000
        answer = server.ask("POST", PATH, body=body)
        assert answer.json["mlx_stream"]["cache"] == "cold"
        text = answer.json["choices"][0]["message"]["content"]
        turns += [question, {"role": "assistant", "content": text}, question]
        answer = server.ask("POST", PATH, body=body_of(stream=False, messages=turns))
        about = answer.json["mlx_stream"]
        assert about["cache"] == "extended" and about["read"] < 40
        assert about["evicted_turns"] >= 1_000


def test_a_model_that_cannot_be_loaded_is_said_to_each_request(tmp_path: Path) -> None:
    with serving(tmp_path / "none", wait=False) as server:
        eventually(lambda: "ready" in str(server.notices) or len(server.notices) > 1)
        for method, path in (("GET", "/health"), ("POST", PATH)):
            answer = server.ask(method, path, body=body_of() if method == "POST" else "")
            assert answer.status == 503 and answer.error["code"] == "no_model"


# --- the program ---


@contextmanager
def program_serving(folder: Path, *words: object) -> Iterator[tuple[Any, int]]:
    """Run `mlx_stream serve` on a free port; yield the process and the port."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_stream", "serve", folder, "--port", port]
    command += ["--alias", MODEL, *words]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()


def connect_when_up(port: int) -> socket.socket:
    until = time.monotonic() + DEADLINE
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), DEADLINE)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)


def request(port: int, body: str) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_ends_streams_with_an_error_and_the_program_soon(
    letters: Path, number: signal.Signals
) -> None:
    with program_serving(letters, "--window", 256) as (process, port):
        while True:
            with closing(connect_when_up(port)) as client:
                client.sendall(request(port, body_of("canary one", True, ENDLESS)))
                found = client.recv(99)
                if found.startswith(b"HTTP/1.1 503"):
                    continue  # the server is up before its model is
                assert found.startswith(b"HTTP/1.1 200")
                whole = connect_when_up(port)
                whole.sendall(request(port, body_of("canary two", False, ENDLESS)))
                time.sleep(0.1)
                process.send_signal(number)
                started = time.monotonic()
                while part := client.recv(65_536):
                    found += part
                assert b'data: {"error":' in found[-500:] and b"[DONE]" not in found
                assert read_answer(whole).error["code"] == "shutting_down"
                whole.close()
                break
        assert process.wait(DEADLINE) == 128 + number
        assert time.monotonic() - started < 5
        log = process.stderr.read()
        assert "POST /v1/chat/completions 200 cache=" in log and "canary" not in log
    home = Path(os.environ["MLX_STREAM_HOME"])
    texts = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert texts and not any(b"canary" in text for text in texts)


def answered(port: int, body: str) -> Any:
    """Return the answer to a request once the model is loaded."""
    while True:
        with closing(connect_when_up(port)) as client:
            client.sendall(request(port, body))
            answer = read_answer(client)
        if answer.status != 503:
            assert answer.status == 200, answer
            return answer.json


def is_kept(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.glob("*.safetensors"))


def test_a_killed_server_recognizes_what_it_kept(letters: Path, tmp_path: Path) -> None:
    kept, messages, texts = tmp_path / "kept", [], []
    for number in range(3):
        with program_serving(letters, "--window", 256, "--keep", kept) as (process, port):
            for turn in range(2):
                messages.append({"role": "user", "content": f"canary {number}.{turn}"})
                body = body_of(stream=False, messages=messages)
                about = (found := answered(port, body))["mlx_stream"]
                before = "new" if not number else "restored"
                assert about["cache"] == ("extended" if turn else before), about
                assert about["read"] < 60
                texts.append(found["choices"][0]["message"]["content"])
                messages.append({"role": "assistant", "content": texts[-1]})
            eventually(partial(is_kept, kept, f"canary {number}.1"))
            with closing(connect_when_up(port)) as client:  # killed while it writes a reply
                endless = [*messages, {"role": "user", "content": "Cut"}]
                client.sendall(request(port, body_of("", True, ENDLESS, messages=endless)))
                client.recv(99)
                process.send_signal(signal.SIGKILL)
                process.wait(DEADLINE)
    twin = mlx_stream.load(letters, dtype="float32", keep_quantized=False)
    chat = mlx_stream.ChatSession(twin, window=256, max_tokens=8, sampling=GREEDY)
    assert texts == [said(chat.reply(message["content"])) for message in messages[::2]]
    assert len([*kept.iterdir()]) == 3
    with program_serving(letters, "--window", 256, "--keep", kept) as (_, port):
        answered(port, body_of(stream=False))
        with program_serving(letters, "--keep", kept) as (other, _):
            assert other.wait(DEADLINE) == 1
            (line,) = other.stderr.read().splitlines()
            assert "used by another server" in line


def test_a_folder_that_others_can_read_is_refused_in_one_line(
    letters: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir(mode=0o755)
    command = [sys.executable, "-m", "mlx_stream", "serve", letters, "--keep", tmp_path / "kept"]
    command += ["--socket", tmp_path / "s"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "chmod 700" in line
    assert not (tmp_path / "s").exists() and not [*(tmp_path / "kept").iterdir()]


def test_a_signal_keeps_the_reply_in_progress(letters: Path, tmp_path: Path) -> None:
    with program_serving(letters, "--window", 256, "--keep", tmp_path / "kept") as (process, port):
        answered(port, body_of(stream=False))
        with closing(connect_when_up(port)) as client:
            client.sendall(request(port, body_of("canary", True, ENDLESS)))
            client.recv(99)
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 143
    texts = [path.read_bytes() for path in (tmp_path / "kept").glob("*.safetensors")]
    assert len(texts) == 2 and sum(b"canary" in text for text in texts) == 1


# The program; it reports every connection that it makes.
WATCHED = """
import os, sys
sys.addaudithook(lambda name, args: name == "socket.connect" and os.write(2, b"CONNECTED"))
from mlx_stream.cli import main
main()
"""


def test_a_socket_is_served_and_removed_and_nothing_is_connected_to(
    letters: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-c", WATCHED, "serve", letters, "--socket", path]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE)
    try:
        eventually(path.exists)
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(path))
            client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: anything\r\n\r\n")
            assert read_answer(client).json["data"][0]["id"] == letters.name
            image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}
            for content, status in (("Hello", 200), ([image], 400)):
                messages = [{"role": "user", "content": content}]
                body = body_of(stream=False, model=letters.name, messages=messages)
                eventually(lambda: health(path) == 200)
                client.sendall(request(0, body))
                assert read_answer(client).status == status
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 143 and not path.exists()
    finally:
        process.kill()
        assert b"CONNECTED" not in process.communicate()[1]


def health(path: Path) -> int:
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(path))
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        return read_answer(client).status


def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_stream.server.run import raise_file_limit

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(TimedConnection, "most", TimedConnection.most)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1_000
        assert TimedConnection.most > 800
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
