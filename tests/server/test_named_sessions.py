"""Saved conversations over HTTP: continued by name, across servers and a kill."""

import signal
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import mlx_stream
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.engine.session_worker import SessionWorker
from tests.fakes.engines import DEADLINE, GREEDY, alone
from tests.fakes.servers import ENDLESS, PATH, Answer, RunningServer, body_of, read_answer, serving
from tests.server.test_program import connect_when_up, program_serving, request

OPTIONS: dict[str, Any] = {"window": 128, "shared": False, "sessions": True, "streams": 2}


def ask(server: RunningServer, text: str, name: str = "work", **more: Any) -> Answer:
    body = body_of(text, False, 8, mlx_stream={"session": name}, **more)
    return server.ask("POST", PATH, body=body)


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer
    return answer.json["choices"][0]["message"]["content"]


def test_a_session_is_continued_by_name(tiny: Path) -> None:
    questions = [f"What of the {number}th man?" for number in range(8)]
    expected, _ = alone(tiny, questions, window=128, max_tokens=8)
    found, caches, sent = [], [], list[dict[str, str]]()
    for part in (questions[:3], questions[3:]):
        with serving(tiny, **OPTIONS) as server:
            for number, question in enumerate(part):
                if number % 2:  # the whole history, or only the new turn
                    messages = [*sent, {"role": "user", "content": question}]
                    answer = ask(server, "", messages=messages)
                else:
                    answer = ask(server, question)
                found.append(text_of(answer))
                about = answer.json["mlx_stream"]
                caches.append(about["cache"])
                assert about["session"] == "work" and about["window"] == 128
                sent += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": found[-1]},
                ]
    assert found == expected
    assert caches == ["new", "extended", "extended", "restored", *["extended"] * 4]


@pytest.mark.parametrize("late", [False, True])
def test_a_question_is_asked_again(tiny: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """This works even while the last turn is being settled."""
    update = SessionWorker.update

    def update_late(self: SessionWorker, task_ended: bool) -> Any:
        time.sleep(0.2 * task_ended)
        return update(self, task_ended)

    if late:
        monkeypatch.setattr(SessionWorker, "update", update_late)
    with serving(tiny, **OPTIONS) as server:
        first = text_of(ask(server, "Hello"))
        second = text_of(ask(server, "And then?"))
        messages = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And then?"},
        ]
        answer = ask(server, "", messages=messages)
        assert text_of(answer) == second and answer.json["mlx_stream"]["cache"] == "retried"
        assert answer.json["mlx_stream"]["read"] == 1
        messages[1]["content"] = "something else"
        answer = ask(server, "", messages=messages)
        assert answer.status == 409 and "only the new turn" in answer.error["message"]


def test_a_name_works_as_a_header_and_must_be_one(tiny: Path) -> None:
    with serving(tiny, **OPTIONS) as server:
        header = {"X-Mlx-Stream-Session": "other"}
        answer = server.ask("POST", PATH, header, body_of("Hello", False))
        assert answer.json["mlx_stream"]["session"] == "other"
        for name in ("../../etc/passwd", "a/b", ".", "x" * 200):
            answer = ask(server, "Hello", name)
            assert answer.status == 400 and answer.error["code"] == "session_name"
        answer = server.ask("POST", PATH, {"X-Mlx-Stream-Session": "a b"}, body_of("Hello", False))
        assert answer.status == 400 and "not a valid session name" in answer.error["message"]
        assert ask(server, "Hello", "").status == 400
    with serving(tiny, window=128) as server:
        answer = ask(server, "Hello")
        assert answer.status == 400 and "--sessions" in answer.error["message"]


def test_a_session_that_is_open_elsewhere_is_refused_and_tried_again(tiny: Path) -> None:
    model = mlx_stream.load(tiny, dtype="float32", keep_quantized=False)
    other = open_session("work", model, SessionOptions(window=128, sampling=GREEDY))
    with serving(tiny, **OPTIONS) as server:
        answer = ask(server, "Hello")
        assert answer.status == 409 and "is open in" in answer.error["message"]
        other.close()
        assert ask(server, "Hello").status == 200


def test_more_sessions_than_streams_take_turns(tiny: Path) -> None:
    with serving(tiny, **OPTIONS) as server:
        for _ in range(2):
            for name in "abcd":
                assert ask(server, "Hello", name).status == 200
        assert ask(server, "Hello", "a").json["mlx_stream"]["cache"] == "restored"


def test_requests_for_one_session_wait_for_each_other(tiny: Path) -> None:
    with serving(tiny, **OPTIONS) as server:
        answers = list[Answer]()
        threads = [
            threading.Thread(target=lambda: answers.append(ask(server, "Hello"))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert [answer.status for answer in answers] == [200] * 3
    model = mlx_stream.load(tiny, dtype="float32", keep_quantized=False)
    saved = open_session("work", model, SessionOptions(window=128))
    assert len(saved.chat.exchanges) == 3
    saved.close()


def test_a_kill_leaves_the_transcript_whole(letters: Path) -> None:
    body = body_of("Hello", False, 8, mlx_stream={"session": "work"})
    options = ("--window", 128, "--sessions")
    texts = []
    for _ in range(2):
        with program_serving(letters, *options) as (process, port):
            while True:
                with closing(connect_when_up(port)) as client:
                    client.sendall(request(port, body))
                    answer = read_answer(client)
                    if answer.status == 200:
                        break
            texts.append(answer.json["mlx_stream"]["attended"])
            with closing(connect_when_up(port)) as client:
                endless = body_of("Cut", True, ENDLESS, mlx_stream={"session": "work"})
                client.sendall(request(port, endless))
                client.recv(99)
                process.send_signal(signal.SIGKILL)
                process.wait(DEADLINE)
    assert texts[1] > texts[0] > 0
    model = mlx_stream.load(letters, dtype="float32", keep_quantized=False)
    saved = open_session("work", model, SessionOptions(window=128))
    questions = [exchange.question for exchange in saved.chat.exchanges]
    assert questions[0] == "Hello" and "Hello" in questions[1:]
    saved.close()


def test_a_client_that_leaves_while_a_session_opens_does_not_close_it(tiny: Path) -> None:
    """Another client is waiting for the same session."""
    with serving(tiny, **OPTIONS) as server:
        ask(server, "Hello", "other")
        for number in range(6):
            body = body_of("Hello", False, 3, mlx_stream={"session": f"new-{number}"})
            with closing(server.connect()) as leaving, closing(server.connect()) as waiting:
                for client in (leaving, waiting):
                    client.sendall(server.head("POST", PATH, body=body))
                leaving.close()
                assert read_answer(waiting).status == 200
