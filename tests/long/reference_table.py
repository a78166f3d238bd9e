"""Score a text on a real model against the slow reference, over a whole table of settings.

Run by hand (an hour on one core):

    python -m tests.long.reference_table TEXT --log table.jsonl

Each setting adds a line to the log, and one already there is not run again. Exits 1 if any
token differs by more than 2e-3 nats.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np

import mlx_stream
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.evaluate.score import losses_of
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.hub.resolve import resolve
from tests.reference import stream_nll

SINKS = (0, 1, 4, 32)
# Windows, and tokens of text that take each well past its wrap.
WINDOWS = {60: 400, 252: 700, 508: 900, 1020: 1300}
CHUNKS = (1, 7, 37, 128, 500)
TOLERANCE = 2e-3


def plain_weights(model: Model) -> dict[str, np.ndarray]:
    """Return the model's float32 weights under their checkpoint names."""
    return {name: np.array(tensor) for name, tensor in model.network.named_tensors()}


def differences(
    model: Model, raw: dict, weights: dict, ids: list[int], sinks: int, window: int, chunks
) -> dict[str, float]:
    """Return the largest difference per token, in nats, for each chunk length."""
    expected = stream_nll(raw, weights, ids, sinks, window)
    found = {}
    for chunk in chunks:
        stream = TokenStream(model, model.new_cache(sinks, window))
        found[str(chunk)] = float(np.abs(np.array(losses_of(stream, ids, chunk)) - expected).max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    model = mlx_stream.load("starter", dtype="float32", keep_quantized=False)
    raw = read_folder(resolve("starter", print)).config
    weights = plain_weights(model)
    ids = model.tokenizer.encode(options.text.read_text("utf-8"))
    lines = options.log.read_text().splitlines() if options.log.exists() else []
    done = {(row["sinks"], row["window"]): row for row in map(json.loads, lines)}
    for sinks, window in product(SINKS, WINDOWS):
        if (sinks, window) in done:
            continue
        text = ids[: WINDOWS[window]]
        worst = differences(model, raw, weights, text, sinks, window, CHUNKS)
        row = {"sinks": sinks, "window": window, "tokens": len(text), "worst": worst}
        done[sinks, window] = row
        with options.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    highest = max(value for row in done.values() for value in row["worst"].values())
    print(f"largest difference {highest:.1e} nats over {len(done)} settings")
    raise SystemExit(highest > TOLERANCE)


if __name__ == "__main__":
    main()
