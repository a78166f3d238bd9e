"""Thinking over HTTP: `reasoning_content`, its count, its switch; the answer alone is compared."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chat.test_settle import SCRIPT, THINKS
from tests.fakes.servers import PATH, RunningServer, body_of, serving
from tests.fakes.thinkers import write_thinker

SWITCHED = THINKS["thinks"].replace(
    "ant\n{% endif %}",
    "ant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = write_thinker(tmp_path_factory.mktemp("x") / "model", SWITCHED, SCRIPT, "<|im_end|>")
    with serving(path, window=200, shared=False) as found:
        yield found


def chunks_of(body: bytes) -> list[dict[str, Any]]:
    events = [line for line in body.decode().split("\n\n") if line.startswith("data: {")]
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_thinking_comes_apart_and_is_counted(server: RunningServer) -> None:
    answer = server.ask("POST", PATH, body=body_of("Hi", False, 20)).json
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("abcdefghi", "jklmno")
    usage = answer["usage"]
    # `<think>`, its letters and `</think>` are not part of the answer.
    assert usage["completion_tokens_details"]["reasoning_tokens"] >= 11
    assert usage["completion_tokens"] - usage["completion_tokens_details"]["reasoning_tokens"] >= 6
    deltas = [
        choice["delta"]
        for chunk in chunks_of(server.ask("POST", PATH, body=body_of("Ho", True, 20)).body)
        for choice in chunk["choices"]
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "abcdefghi"
    assert "".join(delta.get("content", "") for delta in deltas) == "jklmno"


def test_max_tokens_counts_the_answer(server: RunningServer) -> None:
    choice = server.ask("POST", PATH, body=body_of("Hi", False, 2)).json["choices"][0]
    assert choice["message"]["content"] == "jk" and choice["finish_reason"] == "length"


@pytest.mark.parametrize("sent", [True, False], ids=["sent back", "left out"])
def test_a_history_is_known_by_its_answers(server: RunningServer, sent: bool) -> None:
    messages = [{"role": "user", "content": f"Hello {sent}"}]
    for number in range(4):
        body = body_of(stream=False, limit=20, messages=messages)
        answer = server.ask("POST", PATH, body=body).json
        assert answer["mlx_stream"]["cache"] == ("extended" if number else "new")
        message = answer["choices"][0]["message"]
        if not sent:
            del message["reasoning_content"]
        messages += [message, {"role": "user", "content": "And?"}]


def test_thinking_can_be_switched_off(server: RunningServer) -> None:
    """The template then writes an empty thinking block before the reply."""
    read = []
    for switch in (None, True, False):
        more = {"chat_template_kwargs": {"enable_thinking": switch}}
        body = json.loads(body_of("Hi", False, 20)) | more
        answer = server.ask("POST", PATH, body=json.dumps(body)).json
        read.append(answer["usage"]["prompt_tokens"])
    assert read[0] == read[1] < read[2]
