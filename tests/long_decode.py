"""Decode 100,000 tokens with a tiny model and look for anything that grows.

    python tests/long_decode.py [--tokens 100000] [--window 252]

Greedy decoding through `generate`, as a program does it, from a full window on. Prints a table of
the tenths; exits with 1 if memory has grown, if p50 or p99 of the second half is more than 10 % off
the first half's, or if the last tenth is more than 5 % off the second one in tokens per second.
Best on a machine that does nothing else; not collected by pytest.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx
import numpy as np
from tiny import tiny_config
from tiny_models import make, some_ids, tensors_of

from mlx_stream import backend
from mlx_stream.generate import Sampler, Sampling, TokenStream, generate

PARTS = 10
PERCENTILES = {"p50": 50, "p99": 99}
OF_HALVES, OF_TENTHS = 0.10, 0.05
RESIDENT = 5_000_000  # bytes that are not ours: the allocator of C, the interpreter


def measure(tokens: int, window: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return a row for each tenth, and the seconds of every token, (tokens,)."""
    raw = tiny_config()
    model = make(raw, tensors_of(raw))
    stream = TokenStream(model, model.new_cache(4, window))
    prompt = some_ids(2 * window)
    ids = generate(stream, prompt, Sampler(Sampling(temperature=0)), tokens + 1)
    next(ids)
    seconds = np.ones(tokens)  # all of it now: written later, it would look like growth
    mx.reset_peak_memory()
    rows, size = [], tokens // PARTS
    for part in range(PARTS):
        for token in range(part * size, (part + 1) * size):
            begun = time.perf_counter()
            next(ids)
            seconds[token] = time.perf_counter() - begun
        rows.append(row(part, seconds[part * size : (part + 1) * size]))
    return rows, seconds[: PARTS * size]


def row(part: int, seconds: np.ndarray) -> dict[str, Any]:
    return {
        "tenth": part + 1,
        "tokens": len(seconds),
        "tokens_per_second": len(seconds) / seconds.sum(),
        **{f"{name}_ms": 1e3 * np.percentile(seconds, at) for name, at in PERCENTILES.items()},
        "active_bytes": mx.get_active_memory(),
        "peak_bytes": mx.get_peak_memory(),
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
        first, second = (np.percentile(half, at) for half in np.split(seconds, 2))
        change = float(second / first - 1)
        found[f"{name}_ms"] = (abs(change) <= OF_HALVES, f"{change:+.1%} from half to half")
    speeds = [one["tokens_per_second"] for one in rows]
    change = speeds[-1] / speeds[1] - 1
    found["tokens_per_second"] = (
        abs(change) <= OF_TENTHS,
        f"{change:+.1%} from the second tenth to the last",
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=252)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.tokens < 100 * PARTS or given.window < 1:
        parser.error(f"at least {100 * PARTS} tokens and a window of 1")
    rows, seconds = measure(given.tokens, given.window)
    verdicts = judged(rows, seconds)
    if given.json:
        print(json.dumps({"rows": rows, "verdicts": verdicts}))
    else:
        print("tenth   tok/s   p50 ms   p99 ms      active        peak      cached    resident")
        for one in rows:
            print(
                f"{one['tenth']:>5}{one['tokens_per_second']:>8.0f}{one['p50_ms']:>9.3f}"
                f"{one['p99_ms']:>9.3f}{one['active_bytes']:>12,}{one['peak_bytes']:>12,}"
                f"{one['cached_bytes']:>12,}{one['resident_bytes']:>12,}"
            )
        for what, (holds, said) in verdicts.items():
            print(f"{what}: {said}: {'holds' if holds else 'DOES NOT HOLD'}")
    return 0 if all(holds for holds, _ in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
