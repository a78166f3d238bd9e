"""Time recall's index: adding exchanges, its size, and questions over many exchanges.

    python -m tests.measure.recall_index TEXT... [--turns 10000] [--exchanges 1000000]

An exchange is three sentences from the texts. Each exchange of a saved conversation of `--turns` is
added to its index as if it had left the window, alternating with bare inserts of the same text into
full-text tables with the same settings and nothing else. Questions of up to 20 words are then asked
over these exchanges, compared with the time to the first token of a tiny model that recalls
nothing, and over `--exchanges` exchanges. All times are CPU time. Prints one line
of JSON. Takes minutes.
"""

import argparse
import json
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import numpy as np

from mlx_stream.chat.exchange import Exchange
from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.saving import SavedSession
from mlx_stream.chat.session import ChatSession
from mlx_stream.chat.transcript_recall import TranscriptRecall, indexed
from mlx_stream.generate.model import Model
from mlx_stream.program.sqlite import LONGEST_ROW, bytes_on_disk, connect
from mlx_stream.recall.find import find_hits
from mlx_stream.recall.index import TABLES, WordIndex
from mlx_stream.sampling import Sampling
from tests.fakes.tiny import tiny_config, write_letters

WITH_POSITIONS = "CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='porter')"
INSERT = "INSERT INTO words (rowid, text) VALUES (?, ?)"
QUESTIONS, AT_A_TIME = 200, 1_000
OPTIONS = SessionOptions(window=480, sampling=Sampling(0), recall_tokens=0)
SENTENCE = re.compile(r"(?<=[.!?])\s+")


def sentences(paths: Sequence[Path]) -> list[str]:
    text = " ".join(path.read_text(encoding="utf-8") for path in paths)
    return [" ".join(one.split()) for one in SENTENCE.split(text)]


def exchange(known: Sequence[str], random: Random) -> Exchange:
    asked, *replied = random.choices(known, k=3)
    return Exchange(asked, " ".join(replied), (), (), ())


def question(known: Sequence[str], random: Random, words: int = 20) -> str:
    """Return the first words of some consecutive sentences."""
    at = random.randrange(len(known))
    return " ".join(" ".join(known[at : at + 20]).split()[:words])


def seconds(action: Callable[..., object], *given: object) -> float:
    """Return the processor time that an action takes."""
    started = time.process_time()
    action(*given)
    return time.process_time() - started


def bare_table(folder: Path, statement: str) -> sqlite3.Connection:
    """Return a full-text table with the settings of the index."""
    path = Path(tempfile.mkstemp(dir=folder)[1])
    connection = connect(path, LONGEST_ROW)
    connection.set_progress_handler(None, 0)
    for setting in ("journal_mode = WAL", "synchronous = NORMAL"):
        connection.execute(f"PRAGMA {setting}").fetchall()
    connection.execute(statement)
    return connection


def conversation(model: Model, told: Sequence[Exchange]) -> SavedSession:
    """Return a saved conversation whose turns have all left the window."""
    saved = open_session("long", model, OPTIONS)
    for number, exchange in enumerate(told, 1):
        sampler = saved.chat.sampler.state()
        change = Change(
            ChangeKind.ANSWER, number, {number: exchange}, number + 1, sampler, None, 480
        )
        saved.store.write(change)
    return saved


def adding(folder: Path, recall: TranscriptRecall, told: Sequence[Exchange]) -> dict[str, float]:
    """Add each exchange to a transcript's index and to bare tables, in turn."""
    bare, positions = (bare_table(folder, table) for table in (TABLES[0], WITH_POSITIONS))
    times = np.zeros(3)
    for number, exchange in enumerate(told, 1):
        question, reply = exchange.question, exchange.reply
        row = number, indexed(question, reply)
        actions: list[Callable[..., object]] = [recall.leave, bare.execute, positions.execute]
        given = (number, question, reply), (INSERT, row), (INSERT, row)
        for at in sorted(range(3), key=lambda at: (at + number) % 3):
            times[at] += seconds(actions[at], *given[at])
    ours, same, with_positions = times
    return {
        "added": len(told),
        "microseconds_each": round(1e6 * ours / len(told), 1),
        "over_bare_insert": round(ours / same, 2),
        "over_insert_with_positions": round(ours / with_positions, 2),
    }


def first_tokens(chat: ChatSession, known: Sequence[str], random: Random) -> float:
    """Return the milliseconds until a tiny model's first token, once its window is full."""
    times = []
    for _ in range(QUESTIONS):
        pieces = chat.reply(question(known, random), 6)
        times.append(seconds(next, pieces))
        list(pieces)
    return 1e3 * float(np.median(times[QUESTIONS // 4 :]))


def built(path: Path, known: Sequence[str], count: int, random: Random) -> tuple[WordIndex, int]:
    """Return an index of `count` exchanges, and the bytes of their texts."""
    index, size = WordIndex.create(path, ""), 0
    for first in range(1, count + 1, AT_A_TIME):
        numbers = range(first, min(first + AT_A_TIME, count + 1))
        told = (exchange(known, random) for _ in numbers)
        texts = [indexed(one.question, one.reply) for one in told]
        size += sum(len(text.encode()) for text in texts)
        index.add(zip(numbers, texts, strict=True), numbers[-1], "")
    return index, size


def asking(find: Callable[..., object], known: Sequence[str], random: Random) -> dict[str, float]:
    """Return the processor time of questions, in milliseconds."""
    times = [1e3 * seconds(find, question(known, random)) for _ in range(QUESTIONS)]
    median, high = np.percentile(times, (50, 90))
    return {"median_ms": round(median, 2), "p90_ms": round(high, 2)}


def measure(folder: Path, known: Sequence[str], turns: int, count: int) -> dict:
    random = Random(1)
    path = write_letters(folder / "model", tiny_config(max_position_embeddings=512))
    model = mlx_stream.load(path, dtype="float32", keep_quantized=False)
    told = [exchange(known, random) for _ in range(turns)]
    saved = conversation(model, told)
    recall = TranscriptRecall(saved.paths.index)
    recall.attach(saved.store, 1)
    found: dict = {"adding": adding(folder, recall, told)}
    asked = asking(lambda text: recall.find(text, "", 1, turns + 1), known, random)
    recall.close()
    saved.close()
    other = open_session("other", model, OPTIONS)
    first = first_tokens(other.chat, known, random)
    other.close()
    share = {"share_of_first_token": round(asked["median_ms"] / first, 3)}
    found["late"] = {"exchanges": turns, **asked, "first_token_ms": round(first, 2), **share}
    index, size = built(folder / "many.recall", known, count, random)
    asked = asking(lambda text: find_hits(index, text, "", 1, count + 1), known, random)
    index.close()
    share = {"size": round(bytes_on_disk(index.path) / size, 3)}
    return {**found, "many": {"exchanges": count, **asked, **share}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--exchanges", type=int, default=1_000_000)
    options = parser.parse_args()
    known = sentences(options.texts)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_STREAM_HOME"] = folder
        print(json.dumps(measure(Path(folder), known, options.turns, options.exchanges)))


if __name__ == "__main__":
    main()
