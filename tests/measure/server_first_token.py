"""Time the first tokens of `mlx_stream serve` and `mlx_lm.server` once the window is full.

    mlx_stream convert starter starter-f32 --dtype float32
    python -m tests.measure.server_first_token starter-f32 [--window 1024] [--turns 12]

Both servers serve the same folder. Each is asked the same questions, streamed and greedy, in one
conversation. Ours gets the whole history; mlx_lm's client leaves out the oldest turns so that
the history fits the window. Prints one line of JSON with the commands, the times in milliseconds
and both servers' `cached_tokens`. It exits with 1 if mlx_lm's median is less than 8 times ours, our
median is more than 1.3 times the time of our third turn, or the ring has grown by turn 200. Run it
on an otherwise idle machine.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer

SYSTEM = {"role": "system", "content": "You are brief."}
TEXT = Path(__file__).with_name("reply.md")
QUESTION_WORDS, REPLY_TOKENS = 12, 48
TOKENS_OF_A_MESSAGE = 8  # the maximum that a template adds to a message
LEAST_RATIO, MOST_GROWTH = 8.0, 1.3
LAST_TURN = 200
# Without this package, MLX finds no fast BLAS on Linux.
PEER = "import sys, mlx_stream; from mlx_lm.server import main; main()"


@dataclass
class Chat:
    """A conversation with one server.

    Attributes:
        times: milliseconds to the first text of each turn.
        cached: `cached_tokens` of each turn.
    """

    port: int
    model: str
    messages: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)

    def ask(self, question: str, sent: list[dict[str, str]], limit: int = REPLY_TOKENS) -> None:
        """Ask, with the messages `sent` before the question."""
        asked = {"role": "user", "content": question}
        body = {
            "model": self.model,
            "messages": [SYSTEM, *sent, asked],
            "max_tokens": limit,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started, first, text, usage = time.perf_counter(), 0.0, "", {}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    if said := choice["delta"].get("content"):
                        first = first or time.perf_counter()
                        text += said
        assert first and text, "the reply was empty"
        self.times.append(1e3 * (first - started))
        self.cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        self.messages += [asked, {"role": "assistant", "content": text}]


def fitting(messages: list[dict[str, str]], question: str, count: Any, window: int) -> Any:
    """Return the newest turns that fit a window together with a question and its reply."""
    room = window - count(SYSTEM["content"]) - count(question) - REPLY_TOKENS
    first = len(messages)
    while first >= 2:
        turn = messages[first - 2 : first]
        room -= sum(count(message["content"]) for message in turn)
        if room < 0:
            break
        first -= 2
    return messages[first:]


def questions() -> Iterator[str]:
    """Yield questions of this many words, each a different part of one text."""
    words, at = TEXT.read_text("utf-8").split(), 0
    while True:
        part = [words[(at + step) % len(words)] for step in range(QUESTION_WORDS)]
        yield f"{at}. What does this say? " + " ".join(part)
        at += 17


@contextmanager
def server(command: list[str], port: int) -> Iterator[None]:
    """Run a server until the block ends; the block begins when it answers."""
    log = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < until, f"{command} does not run"
            try:
                with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        break
            except OSError:
                pass
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return found.getsockname()[1]


def ring_bytes(port: int) -> int:
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/mlx_stream/streams")
        (stream,) = json.load(connection.getresponse())["streams"]
        return stream["cache_bytes"]


def measure(folder: Path, window: int, turns: int, last: int) -> dict[str, Any]:
    """Fill the window, take `turns` turns with each server, and then more with ours."""
    ports = free_port(), free_port()
    ours = [sys.executable, "-m", "mlx_stream", "serve", str(folder), "--alias", "model"]
    ours += ["--port", str(ports[0]), "--window", str(window), "--streams", "1"]
    peer = [sys.executable, "-c", PEER, "--model", str(folder), "--port", str(ports[1])]
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def count(text: str) -> int:
        return len(backend.encode(text, add_special_tokens=False).ids) + TOKENS_OF_A_MESSAGE

    with server(ours, ports[0]), server(peer, ports[1]):
        chats = Chat(ports[0], "model"), Chat(ports[1], str(folder))
        filled, rings, asked = 0, {}, questions()
        while len(chats[0].times) < filled + turns or not filled:
            question = next(asked)
            for chat in chats if len(chats[0].times) % 2 else chats[::-1]:
                trimmed = fitting(chat.messages, question, count, window)
                chat.ask(question, chat.messages if chat is chats[0] else trimmed)
                if chat is chats[1] and len(trimmed) < len(chat.messages) - 2 and not filled:
                    filled = len(chats[0].times)
        rings[len(chats[0].times)] = ring_bytes(ports[0])
        while len(chats[0].times) < last:
            chats[0].ask(next(asked), chats[0].messages, 4)
        rings[len(chats[0].times)] = ring_bytes(ports[0])
    times = [chat.times[filled : filled + turns] for chat in chats]
    medians = [median(values) for values in times]
    return {
        "commands": [" ".join(command) for command in (ours, peer)],
        "window": window,
        "turns_before": filled,
        "ours_ms": [round(value, 1) for value in times[0]],
        "mlx_lm_ms": [round(value, 1) for value in times[1]],
        "ours_cached": chats[0].cached[filled : filled + turns],
        "mlx_lm_cached": chats[1].cached[filled : filled + turns],
        "medians_ms": [round(value, 1) for value in medians],
        "ratio": round(medians[1] / medians[0], 2),
        "over_third_turn": round(medians[0] / chats[0].times[2], 2),
        "ring_bytes": rings,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--window", type=int, default=1_024)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--last", type=int, default=LAST_TURN, help="the last turn with ours")
    options = parser.parse_args()
    found = measure(options.folder, options.window, options.turns, options.last)
    found["holds"] = (
        found["ratio"] >= LEAST_RATIO
        and found["over_third_turn"] <= MOST_GROWTH
        and len(set(found["ring_bytes"].values())) == 1
    )
    print(json.dumps(found))
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
