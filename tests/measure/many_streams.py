"""Measure sessions of an engine that share steps: gaps between tokens, first tokens, memory.

    python -m tests.measure.many_streams gaps     # a 4,000-token question alongside 4 replies
    python -m tests.measure.many_streams busy     # the same, while 2 more sessions read questions
    python -m tests.measure.many_streams first    # 8 questions of 20 tokens at once
    python -m tests.measure.many_streams heads    # the same system prompt of 1,000 tokens, 8 times
    python -m tests.measure.many_streams memory   # a step of 8 streams, and `plan --streams 8`
    python -m tests.measure.many_streams equal    # logits of streams with shared steps and alone

The model is the starter in float32, windows hold 512 tokens, replies are greedy and nothing is
guessed. Prints one line of JSON; exits with 1 if a figure is not what the shared-steps issue
asked for. Run it on an otherwise idle machine.
"""

import argparse
import json
import pydoc_data.topics
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx
import numpy as np

from mlx_stream.cache.steps.verify import spare_rows
from mlx_stream.evaluate.shared_speed import together
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.shared_step import run_together
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.plan import devices
from mlx_stream.plan.inspect import summarize_model
from mlx_stream.plan.planner import PlanRequest, make_plan

MODEL, WINDOW, BESIDE = "starter", 512, 4
LONGEST_MEDIAN_GAP, LONGEST_GAP, LONGEST_PROMPT = 3.0, 5.0, 1.6
LONGEST_FIRST, SOONER = 1.5, 10.0
STEP_BYTES, LARGEST_SHARE = 8 * 2**20, 1e-5
WORDS = pydoc_data.topics.topics["compound"]
GREEDY = mlx_stream.Sampling(temperature=0)


@contextmanager
def engine_of() -> Iterator[mlx_stream.Engine]:
    with mlx_stream.Engine(MODEL, dtype="float32", keep_quantized=False) as engine:
        engine.wait(600)
        yield engine


def session(engine: mlx_stream.Engine, **options: Any) -> Any:
    chat = engine.session(window=WINDOW, sampling=GREEDY, shared=True, **options)
    chat.wait(600)
    inner = chat._session_worker.chat
    assert inner
    inner.writer = replace(inner.writer, speculator=None)
    return chat


def text_of(engine: mlx_stream.Engine, tokens: int, start: int = 0) -> str:
    """Return a text of this many tokens."""
    tokenizer = engine._host.model.tokenizer
    return tokenizer.decode(tokenizer.encode(WORDS[start:])[:tokens])


def on_thread(task: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=task, daemon=True)
    thread.start()
    return thread


def seconds_of(task: Callable[[], Any]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


@contextmanager
def ends_of_steps(engine: mlx_stream.Engine) -> Iterator[list[tuple[float, int, int]]]:
    """Record when each step with reply tokens ended, how many it had, and its other rows."""
    scheduler, ends = engine._worker._scheduler, []
    run = scheduler.run

    def recorded(requests: Any, measure: bool = True) -> Any:
        found = run(requests, measure)
        tokens = sum(request.want is Want.TOKEN for request in requests)
        rows = sum(getattr(result, "count", 0) for result in found) - tokens
        ends.append((time.perf_counter(), tokens, rows))
        return found

    scheduler.run = recorded  # type: ignore[method-assign]
    yield ends
    scheduler.run = run  # type: ignore[method-assign]


def gaps(others: int = 0) -> dict[str, Any]:
    """Read a long question alongside replies, and `others` that keep reading questions.

    With others, its own time is not limited: they share its rows.
    """
    with engine_of() as engine, ends_of_steps(engine) as ends:
        prompt = text_of(engine, 4_000)
        alone = [seconds_of(lambda: next(session(engine).reply(prompt, 1)))]
        chats = [session(engine) for _ in range(BESIDE)]
        replies = [
            chat.reply(text_of(engine, 700, 100 * at), 100_000) for at, chat in enumerate(chats)
        ]
        stop = threading.Event()

        def read(reply: Any) -> None:
            for _ in reply:
                if stop.is_set():
                    return

        threads = [on_thread(lambda reply=reply: read(reply)) for reply in replies]
        while len(ends) < 100 or any(tokens < BESIDE or rows for _, tokens, rows in ends[-40:]):
            time.sleep(0.1)
        late, before, read_by_all = session(engine), len(ends), threading.Event()

        def ask_repeatedly(chat: Any) -> None:
            while not read_by_all.is_set():
                next(chat.reply(prompt[:3_000], 1))

        for chat in [session(engine) for _ in range(others)]:
            threads.append(on_thread(lambda chat=chat: ask_repeatedly(chat)))
        beside = seconds_of(lambda: next(late.reply(prompt, 1)))
        after = len(ends)
        read_by_all.set()
        while any(tokens < BESIDE or rows for _, tokens, rows in ends[-40:]):
            time.sleep(0.1)
        last = ends[-40:]
        stop.set()
        for thread in threads:
            thread.join(60)
        alone.append(seconds_of(lambda: next(session(engine).reply(prompt, 1))))
    # A machine's speed varies, so the baseline is measured before and after.
    around = [*pairwise(ends[before - 40 : before]), *pairwise(last)]
    plain = statistics.median(b[0] - a[0] for a, b in around)
    during = [end for end, tokens, _ in ends[before:after] if tokens == BESIDE]
    between = [(b - a) / plain for a, b in pairwise(during)]
    found = {
        "plain_ms": 1e3 * plain,
        "median_gap": statistics.median(between),
        "longest_gap": max(between),
        "prompt_alone": alone,
        "prompt_beside": beside / statistics.mean(alone),
        "steps": len(between),
    }
    good = (
        found["median_gap"] <= LONGEST_MEDIAN_GAP
        and found["longest_gap"] <= LONGEST_GAP
        and (others > 0 or found["prompt_beside"] <= LONGEST_PROMPT)
    )
    return {**found, "good": good}


def first() -> dict[str, Any]:
    ratios = []
    with engine_of() as engine:
        for _ in range(5):
            alone = seconds_of(lambda: next(session(engine).reply(text_of(engine, 130), 1)))
            chats = [session(engine) for _ in range(8)]
            replies = [
                chat.reply(text_of(engine, 12, 300 * at), 1) for at, chat in enumerate(chats)
            ]
            threads = [threading.Thread(target=next, args=(reply,)) for reply in replies]

            def run(threads: list[threading.Thread] = threads) -> None:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(600)

            ratios.append(seconds_of(run) / alone)
    ratio = statistics.median(ratios)
    return {"ratios": ratios, "median": ratio, "good": ratio <= LONGEST_FIRST}


def heads() -> dict[str, Any]:
    with engine_of() as engine:
        system, times = text_of(engine, 1_000), []
        for _ in range(8):
            chat = session(engine, system=system)
            times.append(seconds_of(lambda chat=chat: next(chat.reply("Hello, who are you?", 1))))
    sooner = times[0] / max(times[1:])
    return {"seconds": times, "sooner": sooner, "good": sooner >= SOONER}


def memory() -> dict[str, Any]:
    model = mlx_stream.load(MODEL, dtype="float32", keep_quantized=False)
    step = together(model, WINDOW, 8)
    for _ in range(4):
        step()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        step()
    beyond = mx.get_peak_memory() - before
    rings = 8 * model.new_cache(4, WINDOW, spare_rows(None)).nbytes
    del step, model
    mx.clear_cache()
    return {"step_beyond": beyond, "rings": rings, **planned(), "good": beyond <= STEP_BYTES}


def planned() -> dict[str, Any]:
    """Compare the peak of 8 sessions that read long questions at once with the plan."""
    asked = PlanRequest("float32", False, 4, WINDOW, streams=8)
    plan = make_plan(summarize_model(MODEL, lambda _: None), devices.here(), asked)
    with engine_of() as engine:
        prompts = [text_of(engine, 900, 200 * at) for at in range(8)]
        chats = [session(engine) for _ in prompts]
        replies = [chat.reply(text, 20) for chat, text in zip(chats, prompts, strict=True)]
        mx.reset_peak_memory()
        threads = [on_thread(lambda reply=reply: list(reply)) for reply in replies]
        for thread in threads:
            thread.join(600)
        peak = mx.get_peak_memory()
    return {"peak": peak, "plan": plan.total, "off": plan.total / peak - 1}


def equal() -> dict[str, Any]:
    """Compare 4 streams that read chunks and tokens in shared steps with each alone."""
    model = mlx_stream.load(MODEL, dtype="float32", keep_quantized=False)
    words, largest, off, ties, tokens = model.tokenizer.encode(WORDS), 0.0, 0.0, 0, 0
    kinds = ((4, 512), (0, 200), (64, 300), (1, 128))
    streams = [
        [TokenStream(model, model.new_cache(*kind, spare_rows(None))) for kind in kinds]
        for _ in range(2)
    ]
    places = [300 * at for at in range(len(kinds))]
    counts = [*[90] * 6, *[1] * 60, 40, *[1] * 20]
    for at, count in enumerate(counts):
        # One of them reads a chunk while the others read a token.
        each = [count if (at + one) % 4 == 0 or count == 90 else 1 for one in range(len(kinds))]
        ids = [words[place : place + n] for place, n in zip(places, each, strict=True)]
        found = [
            [ReadRequest(stream, part, Want.LOGITS) for stream, part in zip(side, ids, strict=True)]
            for side in streams
        ]
        for one, ours in enumerate(run_together(found[0])):
            alone = found[1][one].stream.run(found[1][one])
            assert isinstance(ours, ReadResult) and ours.count == alone.count
            places[one] += ours.count
            if ours.logits is None or alone.logits is None:  # the step ended at a full window
                continue
            a, b = np.array(ours.logits), np.array(alone.logits)
            largest = max(largest, float(np.abs(b).max()))
            off = max(off, float(np.abs(a - b).max()))
            tokens, ties = tokens + 1, ties + int(a.argmax() != b.argmax())
    share = off / largest
    figures = {"logits": tokens, "largest": largest, "off": off, "share": share, "ties": ties}
    return {**figures, "good": share <= LARGEST_SHARE}


MEASURES: dict[str, Callable[[], dict[str, Any]]] = {
    "gaps": gaps,
    "busy": lambda: gaps(others=2),
    "first": first,
    "heads": heads,
    "memory": memory,
    "equal": equal,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(MEASURES))
    found = MEASURES[parser.parse_args().what]()
    print(json.dumps(found))
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
