"""Measure how long a saved conversation of the starter with a full window takes to resume.

    python -m tests.measure.resume_time [--window 2048] [--rounds 5]

Fills the window, closes, and opens it again `rounds` times. Prints one line of JSON; exits with 1
if anything was read again. Takes a minute: not collected by pytest.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pydoc_data.topics import topics
from typing import Any

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX


from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.session_files import session_paths
from mlx_stream.generate.model import Model
from mlx_stream.sampling import Sampling

NAME = "measured"


def fill(chat: ChatSession, window: int) -> None:
    """Ask long questions with one-word answers until the window has wrapped."""
    for text in topics.values():
        list(chat.reply(text[:1200]))
        if chat.stats.evicted > window // 4:
            return


def measure(model: Model, window: int, rounds: int) -> dict[str, Any]:
    options = SessionOptions("You are brief.", window, sampling=Sampling(seed=1), max_tokens=8)
    going_on = SessionOptions(max_tokens=8, sampling=Sampling())
    saved = open_session(NAME, model, options)
    fill(saved.chat, window)
    seconds, notices = [], []
    for number in range(rounds):
        began = time.perf_counter()
        saved.close()
        closed = time.perf_counter()
        saved = open_session(NAME, model, going_on, notices.append)
        seconds.append((time.perf_counter() - closed, closed - began))
        list(saved.chat.reply(f"Say the number {number}."))
    attended = saved.chat.stats.attended
    saved.close()
    opening, closing = zip(*seconds, strict=True)
    return {
        "window": window,
        "attended": attended,
        "snapshot_bytes": session_paths(NAME).snapshot.stat().st_size,
        "seconds_to_open": statistics.median(opening),
        "longest_to_open": max(opening),
        "seconds_to_close": statistics.median(closing),
        "read_again": len([notice for notice in notices if "again" in notice]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    model = mlx_stream.load("starter", dtype="float32", keep_quantized=False)
    with tempfile.TemporaryDirectory() as home:
        os.environ["MLX_STREAM_HOME"] = home
        found = measure(model, given.window, given.rounds)
    print(json.dumps(found))
    sys.exit(found["read_again"] > 0)


if __name__ == "__main__":
    main()
