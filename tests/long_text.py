"""Read a long text on the starter through one window; print each segment's figures.

Run by hand (a few minutes):

    python tests/long_text.py TEXT [--tokens 20000] [--window 1020]

Exits 1 if a segment's perplexity is 40 % off the first's, if the last segment's tokens/s are 10 %
off the second's, or if active memory grew.
"""

import argparse
import math
import time
from itertools import islice
from pathlib import Path

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx

from mlx_stream.evaluate.score import losses_of
from mlx_stream.generate import TokenStream

SEGMENT = 2_048


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=1_020)
    options = parser.parse_args()
    model = mlx_stream.load("starter", dtype="float32", keep_quantized=False)
    ids = model.tokenizer.encode(options.text.read_text("utf-8"))[: options.tokens + 1]
    stream = TokenStream(model, model.new_cache(window=options.window))
    steps = losses_of(stream, ids, 128)
    rows = []
    print("tokens  perplexity  tok/s  active MB  evicted")
    # Whole steps of 128 make whole segments; what is left at the end is no segment.
    while len(rows) < (len(ids) - 1) // SEGMENT:
        started = time.perf_counter()
        nll = [loss for step in islice(steps, SEGMENT // 128) for loss in step]
        seconds = time.perf_counter() - started
        row = (math.exp(sum(nll) / len(nll)), len(nll) / seconds, mx.get_active_memory())
        rows.append(row)
        print(
            f"{stream.length:6,}  {row[0]:10.2f}  {row[1]:5.1f}  {row[2] / 1e6:9.3f}  "
            f"{stream.cache.evicted:7,}",
            flush=True,
        )
    perplexities, speeds, active = zip(*rows, strict=True)
    flat = all(abs(x / perplexities[0] - 1) <= 0.4 for x in perplexities)
    steady = abs(speeds[-1] / speeds[1] - 1) <= 0.1
    print(f"perplexity flat: {flat}; speed steady: {steady}; memory equal: {len(set(active)) == 1}")
    raise SystemExit(not (flat and steady and len(set(active)) == 1))


if __name__ == "__main__":
    main()
