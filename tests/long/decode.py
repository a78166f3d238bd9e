"""Decode 100,000 tokens with a tiny model and check that no token takes longer than at the start.

    python -m tests.long.decode [--tokens 100000] [--window 252]

Greedy decoding through `generate`, as in a program, starting at a full window. Tokens are
timed alternately with those of a stream that starts afresh at each tenth: their ratio does not
depend on what else the machine does. Prints a line of JSON for each tenth; exits with 1 if p50 or
p99, relative to the new streams', changes by more than 10 % from one half to the other, or if the
relative tokens per second change by more than 5 % from the second tenth to the last.
(`tests.long.memory` measures memory.) Not collected by pytest.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import numpy as np

from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.sampling import Sampler, Sampling
from tests.fakes.tiny import tiny_config
from tests.fakes.tiny_models import make, some_ids, tensors_of

PARTS = 10
PERCENTILES = {"p50": 50, "p99": 99}
OF_HALVES, OF_TENTHS = 0.10, 0.05


def measure(tokens: int, window: int) -> np.ndarray:
    """Return the seconds of every token, (tenths, old and new, tokens)."""
    raw = tiny_config()
    model = make(raw, tensors_of(raw))
    old = begun(model, window, tokens)
    seconds = np.empty((PARTS, 2, tokens // PARTS))
    for part in seconds:
        streams = old, begun(model, window, part.shape[1])
        for token in range(part.shape[1]):
            for which in (0, 1) if token % 2 else (1, 0):
                started = time.perf_counter()
                next(streams[which])
                part[which, token] = time.perf_counter() - started
    return seconds


def begun(model: Model, window: int, tokens: int) -> Iterator[int]:
    """Return the ids of a stream whose window is full."""
    stream = TokenStream(model, model.new_cache(4, window))
    ids = generate(stream, some_ids(2 * window), Sampler(Sampling(temperature=0)), tokens + 1)
    next(ids)
    return ids


def row(part: np.ndarray) -> dict[str, float]:
    seconds, new = part
    return {
        "tokens_per_second": len(seconds) / seconds.sum(),
        "of_a_new_stream": new.sum() / seconds.sum(),
        **{f"{name}_ms": 1e3 * np.percentile(seconds, at) for name, at in PERCENTILES.items()},
    }


def changes(seconds: np.ndarray) -> dict[str, tuple[float, float]]:
    """Return how far each figure moved, and how far it may."""
    found = {}
    for name, at in PERCENTILES.items():
        halves = (np.percentile(half, at, axis=(0, 2)) for half in np.split(seconds, 2))
        first, second = (old / new for old, new in halves)
        found[f"{name}_ms"] = float(second / first - 1), OF_HALVES
    speeds = [row(part)["of_a_new_stream"] for part in seconds]
    return {**found, "of_a_new_stream": (speeds[-1] / speeds[1] - 1, OF_TENTHS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=252)
    given = parser.parse_args()
    if given.tokens < 100 * PARTS or given.window < 1:
        parser.error(f"at least {100 * PARTS} tokens and a window of 1")
    seconds = measure(given.tokens, given.window)
    for part in seconds:
        print(json.dumps(row(part)))
    found = changes(seconds)
    for what, (change, allowed) in found.items():
        print(f"{what}: {change:+.1%}, of {allowed:.0%} allowed")
    return 0 if all(abs(change) <= allowed for change, allowed in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
