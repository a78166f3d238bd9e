"""Ask questions of 20 tokens late in a conversation and early in another, in turn, and time both.

    python -m tests.measure.turn_latency [--turns 5000] [--rounds 100]

Two saved conversations on a tiny model, both with a full window: one around turn 50, one around
turn 5,000. The script times the first token, starting at the question, and separately what
follows the last token: committing the exchange to disk. Prints one line of JSON; exits with 1 if
the late medians are more than 10 % away from the early ones. Run it on an otherwise idle machine.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import numpy as np

from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.session import ChatSession
from mlx_stream.generate.model import Model
from mlx_stream.sampling import Sampling
from tests.fakes.tiny import tiny_config, write_letters

WINDOW, QUESTION_TOKENS, REPLY_TOKENS = 480, 20, 6
EARLY = 50
ALLOWED = 0.1
OPTIONS = SessionOptions(
    system="You are brief.",
    window=WINDOW,
    sampling=Sampling(0.0),
    max_tokens=REPLY_TOKENS,
)


class Turn(NamedTuple):
    """Milliseconds to the first token, and from the last one until everything is on disk."""

    first: float
    saving: float


def question(model: Model, number: int) -> str:
    """Return a question of 20 tokens, a different one for each number."""
    digits = f"{number:06d}"
    text = digits + "?" * (QUESTION_TOKENS - len(digits))
    assert len(model.tokenizer.encode(text, special=False)) == QUESTION_TOKENS
    return text


def ask(chat: ChatSession, number: int) -> Turn:
    text, started = question(chat.model, number), time.perf_counter()
    pieces = chat.reply(text)
    next(pieces)
    first = last = time.perf_counter()
    for _ in pieces:
        last = time.perf_counter()
    return Turn(1e3 * (first - started), 1e3 * (time.perf_counter() - last))


def begun(model: Model, name: str, turns: int) -> SavedSession:
    """Return a saved conversation of this many turns, with a full window."""
    saved = open_session(name, model, OPTIONS)
    for number in range(turns):
        ask(saved.chat, number)
    assert saved.chat.stats.evicted_exchanges > 0
    return saved


def measure(model: Model, turns: int, rounds: int) -> dict:
    """Take `rounds` turns in each conversation, alternately."""
    sessions = {"early": begun(model, "early", EARLY), "late": begun(model, "late", turns)}
    conversations = {name: saved.chat for name, saved in sessions.items()}
    read = {name: one.stats.prompt_tokens for name, one in conversations.items()}
    timed: dict[str, list[Turn]] = {"early": [], "late": []}
    for number in range(rounds):
        for name in ("early", "late") if number % 2 else ("late", "early"):
            timed[name].append(ask(conversations[name], number))
    tokens = {one.stats.prompt_tokens - read[name] for name, one in conversations.items()}
    assert len(tokens) == 1, "both read as much"
    for saved in sessions.values():
        saved.close()
    return {
        "turns": [EARLY, turns],
        "rounds": rounds,
        "tokens_read": tokens.pop() / rounds,
        **compared(timed, "first"),
        **compared(timed, "saving"),
    }


def compared(timed: dict[str, list[Turn]], what: str) -> dict:
    """Return quartiles in milliseconds, and the late median over the early one."""
    values = {name: [getattr(turn, what) for turn in turns] for name, turns in timed.items()}
    quartiles = {name: np.percentile(value, (25, 50, 75)) for name, value in values.items()}
    found = {f"{what}_{name}": [round(q, 3) for q in three] for name, three in quartiles.items()}
    return {**found, f"{what}_ratio": round(quartiles["late"][1] / quartiles["early"][1], 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_STREAM_HOME"] = folder
        path = write_letters(Path(folder) / "model", tiny_config(max_position_embeddings=512))
        model = mlx_stream.load(path, dtype="float32", keep_quantized=False)
        found = measure(model, options.turns, options.rounds)
    found["flat"] = bool(abs(found["first_ratio"] - 1) <= ALLOWED)
    print(json.dumps(found))
    return 0 if found["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
