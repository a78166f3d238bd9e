"""Run a tiny model over a very long stream, and check that memory stays as it was near the start.

    python -m tests.long.memory [--tokens 200000]

Prints one line of JSON; exits with 1 if memory grew. Takes minutes; a test does a short run.
"""

import argparse
import gc
import json
import sys
import time

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx
import numpy as np

from mlx_stream.backend import resident_bytes
from mlx_stream.generate.token_stream import TokenStream
from tests.fakes.tiny import tiny_config
from tests.fakes.tiny_models import make, tensors_of

SINKS, WINDOW = 4, 60
CACHE_LIMIT = 4 * 2**20
RESIDENT_GROWTH = 5_000_000
LONGEST_READ = 150
# A chunk moves K and V, and buffers from the allocator's cache may be a bit too large.
ROUNDING = 16_384


def run(tokens: int, limit: int = CACHE_LIMIT) -> dict[str, int | float | bool]:
    """Read `tokens` ids, half in chunks and half one at a time; return the measurements."""
    mx.clear_cache()
    before = mx.set_cache_limit(limit)
    raw = tiny_config()
    model = make(raw, tensors_of(raw))
    cache = model.new_cache(SINKS, WINDOW)
    stream = TokenStream(model, cache)
    random = np.random.default_rng(0)
    most_cached, most_active = 0, 0

    def read(count: int, chunk: int) -> None:
        nonlocal most_cached, most_active
        logits = stream.read(random.integers(0, 300, count).tolist(), chunk)
        assert np.isfinite(np.array(logits)).all()
        most_cached = max(most_cached, mx.get_cache_memory())
        most_active = max(most_active, mx.get_active_memory() - logits.nbytes)

    def settled() -> int:
        gc.collect()
        return mx.get_active_memory()

    started = time.perf_counter()
    read(2 * (SINKS + WINDOW) - 1, 37)
    read(1, 1)  # a stream holds the hidden states of its last step: one token, here and at the end
    active_start = settled()
    # Python and the allocator have seen each kind of step before resident memory is measured.
    warm_up = min(tokens // 10, 4_000)
    while cache.length < warm_up:
        read_mixed(read, random)
    resident_start, nbytes = resident_bytes(), cache.nbytes
    most_active = 0
    while cache.length < tokens:
        read_mixed(read, random)
    read(1, 1)
    active_end, resident_end = settled(), resident_bytes()
    mx.set_cache_limit(before)
    return {
        "tokens": cache.length,
        "seconds": round(time.perf_counter() - started, 1),
        "kv_bytes": nbytes,
        "active_after_two_windows": active_start,
        "active_at_end": active_end,
        "most_active": most_active,
        "most_cached": most_cached,
        "resident_after_warm_up": resident_start,
        "resident_at_end": resident_end,
        "flat": (
            cache.nbytes == nbytes
            and abs(active_end - active_start) <= ROUNDING
            and most_active - active_start <= ROUNDING + LONGEST_READ * 64 * 4
            and most_cached <= limit
            and resident_end - resident_start < RESIDENT_GROWTH
        ),
    }


def read_mixed(read, random: np.random.Generator) -> None:
    """Read about a thousand tokens: some alone, some in chunks of odd lengths."""
    read(400, 1)
    for chunk in random.integers(2, 200, 4):
        read(LONGEST_READ, int(chunk))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    measured = run(parser.parse_args().tokens)
    print(json.dumps(measured))
    return 0 if measured["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
