"""Completions of text, metrics and streams."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion

import mlx_stream
from tests.fakes.engines import GREEDY
from tests.fakes.servers import MODEL, PATH, RunningServer, body_of, serving


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[RunningServer]:
    with serving(tiny, window=64, shared=False, streams=2) as found:
        yield found


@pytest.mark.parametrize("prompt", ["Once upon a time", "the man and the house " * 40])
def test_a_text_is_continued_as_by_generate(server: RunningServer, tiny: Path, prompt: str) -> None:
    model = mlx_stream.load(tiny, dtype="float32", keep_quantized=False)
    given: dict[str, Any] = {"max_tokens": 20, "sampling": GREEDY, "window": 64}
    expected = "".join(piece.text for piece in mlx_stream.stream(model, prompt, **given))
    count = len(model.tokenizer.encode(prompt))
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        ask = client.completions.create
        whole = ask(model=MODEL, prompt=prompt, max_tokens=20, temperature=0, echo=True)
        assert whole.choices[0].text == prompt + expected
        assert whole.usage and whole.usage.completion_tokens == 20
        assert whole.usage.prompt_tokens == min(count, 68)
        chunks = [*ask(model=MODEL, prompt=[prompt], max_tokens=20, temperature=0, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_a_completion_is_what_the_api_says(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": "The man", "max_tokens": 6, "logprobs": 2}
    answer = server.ask("POST", "/completions", body=json.dumps(body))
    found = Completion.model_validate(answer.json, strict=True).choices[0]
    logprobs = found.logprobs
    assert logprobs and logprobs.tokens and logprobs.text_offset and logprobs.top_logprobs
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == 6
    lengths = [len(token) for token in logprobs.tokens]
    assert logprobs.text_offset == [sum(lengths[:at]) for at in range(6)]
    assert all(len(top) <= 2 for top in logprobs.top_logprobs)
    for wrong in ({"prompt": ["a", "b"]}, {"best_of": 2}, {"suffix": "x"}, {"prompt": ""}):
        answer = server.ask("POST", "/completions", body=json.dumps({**body, **wrong}))
        assert answer.status == 400, wrong


def test_streams_are_listed_without_text_and_can_be_closed(server: RunningServer) -> None:
    server.ask("POST", PATH, body=body_of("canary", stream=False))
    listed = server.ask("GET", "/mlx_stream/streams")
    (line,) = listed.json["streams"]
    assert line["state"] == "idle" and line["turns"] == 1 and line["window"] == 64
    assert "canary" not in listed.body.decode()
    for number in ("9" * 5_000, "-1", "x"):  # Python refuses to read thousands of digits
        answer = server.ask("DELETE", f"/mlx_stream/streams/{number}")
        assert answer.status == 404 and answer.error["code"] == "no_such_stream"
    path = f"/mlx_stream/streams/{line['id']}"
    assert server.ask("DELETE", path).json == {"id": line["id"], "deleted": True}
    assert server.ask("GET", "/mlx_stream/streams").json == {"streams": []}
    assert server.ask("DELETE", path).status == 404


def test_metrics_count(server: RunningServer) -> None:
    def values() -> dict[str, float]:
        answer = server.ask("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [x for x in answer.body.decode().splitlines() if not x.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = values()
    server.ask("POST", PATH, body=body_of("canary", stream=False))
    server.ask("POST", PATH, body="{")
    after = values()
    for name, more in (
        ("reply_tokens_total", 8),
        ("first_token_seconds_count", 1),
        ('replies_total{cache="new"}', 1),
        ('answers_total{path="/v1/chat/completions",status="400"}', 1),
        ('answers_total{path="/v1/chat/completions",status="200"}', 1),
    ):
        assert after[f"mlx_stream_{name}"] == before.get(f"mlx_stream_{name}", 0) + more, name
    assert after["mlx_stream_streams"] >= 1 and after["mlx_stream_requests"] == 0
    assert after["mlx_stream_memory_bytes"] > 0 and not any("canary" in name for name in after)
