"""Decode 100,000 tokens with a tiny model and look for anything that grows.

    python -m tests.long.decode [--tokens 100000] [--window 252]

Greedy decoding through `generate`, as a program does it, from a full window on. Each token is timed
in turn with one of a stream that is begun anew at each tenth: how much slower the old one is does
not hang on what else the machine does. Prints a line of JSON for each tenth; exits with 1 if memory
has grown, if p50 or p99 beside the new streams' is more than 10 % off from half to half, or tokens
per second beside theirs more than 5 % from the second tenth to the last. Not collected by pytest.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx
import numpy as np

from mlx_stream import backend
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.load import Model
from mlx_stream.sampling import Sampler, Sampling
from tests.fakes.tiny import tiny_config
from tests.fakes.tiny_models import make, some_ids, tensors_of

PARTS = 10
PERCENTILES = {"p50": 50, "p99": 99}
OF_HALVES, OF_TENTHS = 0.10, 0.05
RESIDENT = 5_000_000  # bytes that are not ours: the allocator of C, the interpreter


def measure(tokens: int, window: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return a row for each tenth, and the seconds of every token, old and new, (2, tokens)."""
    raw = tiny_config()
    model = make(raw, tensors_of(raw))
    old = begun(model, window, tokens)
    size = tokens // PARTS
    seconds = np.ones((2, PARTS * size))  # all of it now: written later, it would look like growth
    rows, peak = [], 0
    for part in range(PARTS):
        part_seconds = seconds[:, part * size : (part + 1) * size]
        new = begun(model, window, size)
        mx.reset_peak_memory()  # what reading the new stream's prompt took is not a step's
        in_turn(old, new, part_seconds)
        peak = max(peak, mx.get_peak_memory())
        rows.append(row(part, part_seconds, peak))
    return rows, seconds


def in_turn(old: Iterator[int], new: Iterator[int], seconds: np.ndarray) -> None:
    """Fill in the seconds of each token of two streams, (2, tokens)."""
    for token in range(seconds.shape[1]):
        turns = (0, old), (1, new)
        for which, ids in turns if token % 2 else reversed(turns):
            started = time.perf_counter()
            next(ids)
            seconds[which, token] = time.perf_counter() - started


def begun(model: Model, window: int, tokens: int) -> Iterator[int]:
    """Return the ids of a stream whose window is full."""
    stream = TokenStream(model, model.new_cache(4, window))
    prompt = some_ids(2 * window)
    ids = generate(stream, prompt, Sampler(Sampling(temperature=0)), tokens + 1)
    next(ids)
    return ids


def row(part: int, both: np.ndarray, peak: int) -> dict[str, Any]:
    seconds, new = both
    return {
        "tenth": part + 1,
        "tokens": len(seconds),
        "tokens_per_second": len(seconds) / seconds.sum(),
        "of_a_new_stream": new.sum() / seconds.sum(),
        **{f"{name}_ms": 1e3 * np.percentile(seconds, at) for name, at in PERCENTILES.items()},
        "active_bytes": mx.get_active_memory(),
        "peak_bytes": peak,
        "cached_bytes": mx.get_cache_memory(),
        "resident_bytes": backend.resident_bytes(),
    }


def judged(rows: Sequence[dict[str, Any]], seconds: np.ndarray) -> dict[str, tuple[bool, str]]:
    """Return what must hold, and whether it does."""
    found: dict[str, tuple[bool, str]] = {}
    # Of the first tenth is what is made once, a trace say.
    for what, allowed in (
        ("active_bytes", 0),
        ("peak_bytes", 0),
        ("resident_bytes", RESIDENT),
    ):
        grown = rows[-1][what] - rows[1][what]
        found[what] = (grown <= allowed, f"{grown:+,} from the second tenth to the last")
    for name, at in PERCENTILES.items():
        halves = (np.percentile(half, at, axis=1) for half in np.split(seconds, 2, axis=1))
        first, second = (old / new for old, new in halves)
        change = float(second / first - 1)
        found[f"{name}_ms"] = (abs(change) <= OF_HALVES, f"{change:+.1%} from half to half")
    speeds = [float(one["of_a_new_stream"]) for one in rows]
    change = speeds[-1] / speeds[1] - 1
    found["of_a_new_stream"] = (
        abs(change) <= OF_TENTHS,
        f"{change:+.1%} from the second tenth to the last",
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=252)
    given = parser.parse_args()
    if given.tokens < 100 * PARTS or given.window < 1:
        parser.error(f"at least {100 * PARTS} tokens and a window of 1")
    rows, seconds = measure(given.tokens, given.window)
    verdicts = judged(rows, seconds)
    for one in rows:
        print(json.dumps(one))
    for what, (holds, said) in verdicts.items():
        print(f"{what}: {said}: {'holds' if holds else 'DOES NOT HOLD'}")
    return 0 if all(holds for holds, _ in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
