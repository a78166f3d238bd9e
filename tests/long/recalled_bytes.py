"""Compare the memory of a long saved conversation with recall and without, early and late.

    python -m tests.long.recalled_bytes [--turns 10000]

Each conversation runs in a process of its own, with a tiny model and the same questions: facts, and
questions about facts that left long ago. At turn 10 and at the end, the ring must take as many
bytes with recall as without it, and so must all of MLX's arrays, apart from the constants of the
last traces. Prints one line of JSON; exits with 1 if they are not. Takes minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx

from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.load import load
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import said
from tests.fakes.shell import SMALL
from tests.fakes.tiny import tiny_config, write_letters
from tests.long.conversation import ACTIVE_GROWTH, CACHE_LIMIT, LOOK, look

EARLY = 10
NAMES = ("Ada", "Ben", "Clara", "Dora", "Erik", "Fiona", "Gus", "Hanna")
THINGS = ("dog", "boat", "house", "garden", "piano", "violin", "bicycle", "kite")


def question_at(turn: int, random: Random) -> str:
    """Return a fact, or every third turn a question about an earlier one."""
    number = random.randrange(max(1, turn)) if turn % 3 == 2 else turn
    name, thing = NAMES[number % 8], THINGS[number // 8 % 8]
    about = f"{name}'s {thing} number {number}"
    return f"What is {about}?" if turn % 3 == 2 else f"{about} is green."


def converse(home: Path, turns: int, recall: int) -> None:
    """Hold a conversation; print its memory use after turn `EARLY` and at the end."""
    os.environ["MLX_STREAM_HOME"] = str(home)
    config = tiny_config(**SMALL, max_position_embeddings=4_096)
    model = load(write_letters(home / "letters", config), dtype="float32")
    mx.set_cache_limit(CACHE_LIMIT)
    options = SessionOptions(
        "Be brief.", 600, sampling=Sampling(0), max_tokens=7, recall_tokens=recall
    )
    saved, random, quoted = open_session("long", model, options), Random(1), 0
    chat, looks = saved.chat, {}
    for turn in range(1, turns + 1):
        said(chat.reply(question_at(turn, random)))
        quoted += bool(chat.recalled)
        if turn in (EARLY, turns):
            found = dict(zip(LOOK, look(chat), strict=True))
            looks[turn] = {"ring": chat.cache.nbytes, **found}
    size = saved.paths.index.stat().st_size if saved.paths.index.exists() else 0
    print(json.dumps({"looks": looks, "turns_with_quotation": quoted, "index_bytes": size}))
    saved.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--recall", type=int, default=200, help="tokens kept free")
    options = parser.parse_args()
    if options.home:
        converse(options.home, options.turns, options.recall)
        return
    found = {}
    for recall in (options.recall, 0):
        with tempfile.TemporaryDirectory() as home:
            command = [sys.executable, "-m", "tests.long.recalled_bytes", "--home", home]
            command += ["--turns", str(options.turns), "--recall", str(recall)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[recall] = json.loads(run.stdout)
    print(json.dumps(found))
    looks = [one for each in found.values() for one in each["looks"].values()]
    rings, active = {one["ring"] for one in looks}, [one["active"] for one in looks]
    quoted, first, last = found[options.recall]["turns_with_quotation"], active[::2], active[1::2]
    steady = max(last) <= min(first) + ACTIVE_GROWTH
    alike = all(max(pair) - min(pair) <= ACTIVE_GROWTH for pair in (first, last))
    if len(rings) != 1 or not (quoted and steady and alike):
        raise SystemExit(f"the bytes differ: {rings} in the ring, {active} in arrays")


if __name__ == "__main__":
    main()
