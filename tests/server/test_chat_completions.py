"""Chat completions via the `openai` package match a session that reads everything once."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

import mlx_stream
from mlx_stream.server.request_body import check_structure
from mlx_stream.server.schemas import ChatRequest
from mlx_stream.text.pieces import Piece
from tests.fakes.engines import GREEDY
from tests.fakes.servers import MODEL, RunningServer, read_answer, serving

WINDOW = 256
HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[RunningServer]:
    with serving(tiny, window=WINDOW, shared=False) as found:
        yield found


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as found:
        yield found


def ask(client: openai.OpenAI, messages: list[Any], stream: bool, **options: Any) -> Any:
    """Return text, usage, finish reason and `mlx_stream` object of a whole or streamed reply."""
    given = {"model": MODEL, "messages": messages, **options}
    if not stream:
        answer = client.chat.completions.create(**given)
        (choice,) = answer.choices
        return choice.message.content, answer.usage, choice.finish_reason, answer.mlx_stream
    usage, finish, about, text = None, None, None, ""
    given |= {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(**given):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            about = getattr(chunk, "mlx_stream", None) or about
    return text, usage, finish, about


def twin(folder: Path, questions: list[str], **options: Any) -> list[tuple[str, Piece]]:
    """Return the replies of a session on this thread, each with its last piece."""
    model = mlx_stream.load(folder, dtype="float32", keep_quantized=False)
    chat = mlx_stream.ChatSession(model, sampling=GREEDY, window=WINDOW, **options)
    found = []
    for question in questions:
        pieces = [*chat.reply(question)]
        found.append(("".join(piece.text for piece in pieces), pieces[-1]))
    return found


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_history_that_is_sent_whole_is_read_once(
    server: RunningServer, client: openai.OpenAI, tiny: Path, stream: bool
) -> None:
    """The 40 turns are four times what the window holds."""
    system = f"Be brief. {stream}"
    questions = [f"And what of the {number}th man in the house?" for number in range(40)]
    expected = twin(tiny, questions, system=system, max_tokens=10)
    messages: list[Any] = [{"role": "system", "content": system}]
    cached, about = [], {}
    for number, (question, (reply, last)) in enumerate(zip(questions, expected, strict=True)):
        messages.append({"role": "user", "content": question})
        text, usage, _, about = ask(client, messages, stream, temperature=0, max_tokens=10)
        assert text == reply and usage.completion_tokens == last.written
        assert about["cache"] == ("extended" if number else "new")
        read = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
        assert read == about["read"] == last.read + last.settled
        cached.append(usage.prompt_tokens_details.cached_tokens)
        messages.append({"role": "assistant", "content": text})
    assert about["evicted_turns"] > 20 and about["evicted_tokens"] > WINDOW
    assert min(cached[20:]) > WINDOW // 2


def test_chunks_are_what_the_api_says(server: RunningServer) -> None:
    for options in (
        {},
        {"stream_options": {"include_usage": True}},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 0, "stop": ["e"]},
    ):
        body = {"model": MODEL, "messages": HELLO, "stream": True, "max_tokens": 20, **options}
        events = events_of(server, body)
        assert events[-1] == "[DONE]"
        chunks = [
            ChatCompletionChunk.model_validate(json.loads(e), strict=True) for e in events[:-1]
        ]
        assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
        usage = chunks.pop() if "stream_options" in options else None
        assert (usage is None) or (usage.choices == [] and usage.usage)
        assert all(c.usage is None for c in chunks)
        finishes = [c.choices[0].finish_reason for c in chunks]
        assert finishes[:-1] == [None] * (len(finishes) - 1) and finishes[-1] in ("length", "stop")
        assert chunks[0].choices[0].delta.role == "assistant"
        raw = [json.loads(event) for event in events[:-1]]
        assert all("tool_calls" not in c["delta"] for one in raw for c in one["choices"])
        assert [one for one in raw if "mlx_stream" in one] == [raw[len(chunks) - 1]]
        found = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
        tokens = [token for one in found for token in one.content or ()]
        assert bool(tokens) == ("logprobs" in options)
        most = options.get("top_logprobs", 0)
        assert all(len(token.top_logprobs) == most for token in tokens)


def test_a_whole_answer_is_what_the_api_says(server: RunningServer) -> None:
    body = {
        "model": MODEL,
        "messages": HELLO,
        "max_tokens": 20,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = server.ask("POST", "/v1/chat/completions", body=json.dumps(body))
    found = ChatCompletion.model_validate(answer.json, strict=True)
    assert answer.headers["x-mlx-stream-cache"] == "new"
    assert answer.headers["x-mlx-stream-evicted"] == "turns=0, tokens=0"
    assert found.choices[0].logprobs and found.choices[0].logprobs.content
    content = found.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes or ()) for token in content).decode(errors="replace")
    assert found.choices[0].message.content == text
    assert found.usage and found.usage.completion_tokens == len(content) == 20
    listed = server.ask("GET", "/models").json
    assert [Model.model_validate(one, strict=True).id for one in listed["data"]] == [MODEL]
    shown = server.ask("GET", f"/v1/models/{MODEL}")
    assert Model.model_validate(shown.json, strict=True).id == MODEL


def test_options_do_what_they_say(client: openai.OpenAI, tiny: Path) -> None:
    plain, usage, finish, _ = ask(client, HELLO, False, temperature=0, max_tokens=12)
    assert finish == "length" and usage.completion_tokens == 12
    same = ask(client, HELLO, True, temperature=0, max_completion_tokens=12)
    assert same[0] == plain
    stop = plain[4:6]
    text, _, finish, _ = ask(client, HELLO, True, temperature=0, max_tokens=12, stop=stop)
    assert (text, finish) == (plain[: plain.index(stop)], "stop")
    seeded = [ask(client, HELLO, False, seed=-3, max_tokens=12, temperature=1.5)[0] for _ in "ab"]
    assert seeded[0] == seeded[1] != plain
    vocabulary = mlx_stream.load(tiny).tokenizer.vocabulary()
    bias = {str(vocabulary["z"]): 100}
    text, *_ = ask(client, HELLO, False, temperature=0, max_tokens=4, logit_bias=bias)
    assert text == "zzzz"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "../../etc/passwd"}, 404, "model"),
        ({"model": "other"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": "x" * 257}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"logit_bias": {"the": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, 400, None),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"top_logprobs": 2}, 400, None),
        ({"stream_options": {"include_usage": True}}, 400, None),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None),
        ({"reasoning_effort": "high"}, 400, None),
        ({"modalities": ["audio"]}, 400, None),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    server: RunningServer, change: dict[str, Any], status: int, param: str | None
) -> None:
    for stream in (False,) if "stream_options" in change else (False, True):
        body = {"model": MODEL, "messages": HELLO, "stream": stream, **change}
        answer = server.ask("POST", "/v1/chat/completions", body=json.dumps(body))
        assert answer.status == status and answer.headers["content-type"] == "application/json"
        assert answer.error["param"] == param and answer.error["message"], answer
        assert answer.error["type"] == "invalid_request_error"


def test_what_is_refused_opens_and_closes_no_stream(server: RunningServer) -> None:
    """This holds even if room would have to be made."""
    lines = server.service.lines
    server.ask("POST", "/v1/chat/completions", body=json.dumps({"model": MODEL, "messages": HELLO}))
    assert lines
    for number in range(lines.streams):
        messages = [{"role": "user", "content": f"Hello {number}"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 1}
        assert server.ask("POST", "/v1/chat/completions", body=json.dumps(body)).status == 200
    before = [line.id for line in lines.state()], lines._numbers
    for change in (
        {"logit_bias": {"100000": 1}},
        {"reasoning_effort": "high"},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ):
        body = {"model": MODEL, "messages": HELLO, **change}
        answer = server.ask("POST", "/v1/chat/completions", body=json.dumps(body))
        assert answer.status == 400, change
        assert ([line.id for line in lines.state()], lines._numbers) == before, change


GOOD = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "x"}}], "x": %s}}'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        *((body, "not_json") for body in ("", "{", "{'model': 1}", "\\u0000", '"' * 100_001)),
        *((body, None) for body in ("[]", "null", "{}", "1")),
        *((GOOD % number, "not_json") for number in ("NaN", "-Infinity", "[Infinity]")),
        *((GOOD % text, "not_json") for text in ('"\\ud800"', '"\\udc00x"', '"\x01"')),
        *(("[" * 200_000, "too_deep"), (GOOD % ("[" * 32 + "]" * 32), "too_deep")),
        (GOOD % ('{"a":' * 40 + "1" + "}" * 40), "too_deep"),
    ],
)
def test_what_is_not_json_is_refused(server: RunningServer, body: str, code: str | None) -> None:
    answer = server.ask("POST", "/v1/chat/completions", body=body)
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"
    assert answer.error["code"] == code and "ud800" not in answer.error["message"]


@pytest.mark.parametrize(
    ("field", "item"),
    [("content", "{}"), ("stop", "1"), ("modalities", "1"), ("logit_bias", '"%d": []')],
)
def test_of_many_wrong_items_one_is_reported(field: str, item: str) -> None:
    """Each report would take about a kilobyte, and a long body could have millions of items."""
    items = ",".join(item % at if "%" in item else item for at in range(20_000))
    value = f"{{{items}}}" if field == "logit_bias" else f"[{items}]"
    message = f'"role": "user", "content": {value if field == "content" else 1}'
    more = "" if field == "content" else f', "{field}": {value}'
    body = f'{{"model": "{MODEL}", "messages": [{{{message}}}]{more}}}'
    with pytest.raises(ValidationError) as raised:
        ChatRequest.model_validate_json(body)
    assert raised.value.error_count() < 5


def test_a_text_without_an_end_is_read_once() -> None:
    """If each of its quotes were tried as a beginning, this would take hours."""
    started = time.process_time()
    check_structure(b'{"x": "' + b'\\"' * 300_000)
    assert time.process_time() - started < 5


def test_deep_json_within_the_limit_and_brackets_in_texts_are_fine(server: RunningServer) -> None:
    deep: Any = "x"
    for _ in range(30):
        deep = [deep]
    messages = [{"role": "user", "content": '[{"' * 500 + "\\"}]
    body = {"model": MODEL, "messages": messages, "metadata": deep, "max_tokens": 2}
    assert server.ask("POST", "/v1/chat/completions", body=json.dumps(body)).status == 200


def test_fields_that_are_not_known_are_named(client: openai.OpenAI) -> None:
    more = {"keep_alive": 5, "user": "me", "chat_template_kwargs": {"colour": 1}}
    *_, about = ask(client, HELLO, False, max_tokens=2, extra_body=more)
    said = " ".join(about["notices"])
    assert "keep_alive" in said and "colour" in said and "user" not in said


def test_a_beginning_of_the_reply_is_continued(client: openai.OpenAI) -> None:
    plain = ask(client, HELLO, False, temperature=0, max_tokens=12)[0]
    begun = [*HELLO, {"role": "assistant", "content": "Well, the"}]
    text, *_ = ask(client, begun, False, temperature=0, max_tokens=12)
    assert text and text != plain


@pytest.mark.parametrize(
    "path", ["/api/chat", "/api/generate", "/api/tags", "/v1/embeddings", "/embeddings", "/api/a/b"]
)
def test_apis_that_are_not_offered_say_what_to_use(server: RunningServer, path: str) -> None:
    answer = server.ask("POST", path, body="{}")
    assert answer.status == 404 and ": " in answer.error["message"]


def test_no_address_is_opened(server: RunningServer) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        for part in (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "file", "file": {"file_id": url}},
            {"type": "video_url", "video_url": {"url": url}},
        ):
            messages = [{"role": "user", "content": [{"type": "text", "text": "Look"}, part]}]
            body = json.dumps({"model": MODEL, "messages": messages})
            answer = server.ask("POST", "/v1/chat/completions", body=body)
            assert answer.status == 400 and "text only" in answer.error["message"]
        with pytest.raises(TimeoutError):
            listener.accept()


def test_contents_may_be_parts_and_developers_are_the_system(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    system = {"role": "system", "content": "Be kind."}
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}
    plain = ask(client, [system, *HELLO], False, temperature=0, max_tokens=8)
    same = ask(
        client, [developer, {"role": "user", "content": parts}], True, temperature=0, max_tokens=8
    )
    assert plain[0] == same[0]


def events_of(server: RunningServer, body: dict[str, Any]) -> list[str]:
    """Return the data of a stream's events; comments are left out."""
    with closing(server.connect()) as client:
        client.sendall(server.head("POST", "/v1/chat/completions", body=json.dumps(body)))
        answer = read_answer(client)
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.body.decode().split("\n\n") if line]
    assert all(line.startswith(("data: ", ": ")) for line in lines)
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
