"""Measure the delays of a user interface while an engine works: a thread ticks every 16 ms.

    python -m tests.measure.ui_ticks [MODEL] [--tokens 200] [--feed FILE]

Ticks on the main thread, as windows do, first with nothing else to do, then while the model is
loaded, while a long question is read and answered, while a stream listens, answers and is saved,
and while 8 sessions read a question and reply.

A tick is late if it comes more than 8 ms, half a frame, after it is due. Prints one line of JSON.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx_stream

TICK = 0.016
LATE = 0.008


def ticking(done: Callable[[], bool], least: float = 2.0) -> dict[str, float]:
    """Tick until something is done; return how late the ticks were, in ms and as shares."""
    late: list[float] = []
    begun = due = time.perf_counter()
    while not done() or due - begun < least:
        due += TICK
        time.sleep(max(0.0, due - time.perf_counter()))
        now = time.perf_counter()
        late.append(now - due)
        due = max(due, now - TICK)  # missed ticks count as one late tick
    late.sort()
    return {
        "ticks": len(late),
        "late_share": round(sum(x > LATE for x in late) / len(late), 4),
        "median_ms": round(1e3 * late[len(late) // 2], 2),
        "p99_ms": round(1e3 * late[len(late) * 99 // 100], 2),
        "worst_ms": round(1e3 * late[-1], 1),
    }


def during(task: Callable[[], object]) -> dict[str, float]:
    """Tick while another thread does something; raise what it raises."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            task()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    begun = time.perf_counter()
    thread.start()
    found = ticking(lambda: not thread.is_alive())
    if failed:
        raise failed[0]
    return {**found, "seconds": round(time.perf_counter() - begun, 1)}


def measure(model: str, tokens: int, text: str) -> dict[str, dict[str, float]]:
    found = {"nothing": ticking(lambda: True, least=5.0)}
    with tempfile.TemporaryDirectory() as folder, mlx_stream.Engine(model) as engine:
        found["loading"] = ticking(lambda: engine.ready or engine.error is not None)
        greedy = mlx_stream.Sampling(temperature=0)
        chat = engine.session(sampling=greedy, window=1_020)
        found["reading a question, replying"] = during(
            lambda: list(chat.reply(f"{text[:4_000]}\nWhat is this about?", tokens))
        )
        found["replying"] = during(lambda: list(chat.reply("Go on.", tokens)))
        listener = engine.listen(sampling=greedy, window=1_020)

        def listen() -> None:
            for at in range(0, 12_000, 1_000):
                listener.feed(text[at : at + 1_000], timeout=600)
            listener.flush()
            list(listener.ask("What is this about?", remember=False, max_tokens=tokens // 10))
            for number in range(3):
                listener.save(Path(folder) / "stream.safetensors", {"number": number})

        found["listening, asked aside, saved"] = during(listen)
        found["both"] = during(lambda: [list(chat.reply("And?", tokens // 2)), listener.flush()])
        chats = [engine.session(sampling=greedy, window=508, shared=True) for _ in range(8)]
        questions = [f"{text[1_000 * at :][:1_000]}\nWhat is this about?" for at in range(8)]

        def reply_to_all() -> None:
            with ThreadPoolExecutor(8) as pool:
                jobs = [
                    pool.submit(lambda c, q: sum(1 for _ in c.reply(q, tokens)), *each)
                    for each in zip(chats, questions, strict=True)
                ]
                for job in jobs:
                    job.result()

        found["8 replies"] = during(reply_to_all)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="starter")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--feed", type=Path)
    chosen = parser.parse_args()
    if chosen.feed:
        text = chosen.feed.read_text("utf-8", errors="replace")
    else:
        import pydoc_data.topics

        text = "\n".join(pydoc_data.topics.topics.values())
    print(json.dumps(measure(chosen.model, chosen.tokens, text), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
