"""Score tiny models of every family against the slow reference, over a table of settings.

    python -m tests.long.families

Each family has three shapes, with sinks, chunks, and a stream whose age is near 2^62. Takes
minutes. Prints a line for each shape; exits with 1 if a logit is off by more than 1e-3, a token by
more than 2e-3 nats, or a bit of the old stream differs from the young one's.
"""

import json
import sys
from itertools import product

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import numpy as np

from mlx_stream.cache import StreamCache
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from tests.fakes.shapes import FAR
from tests.fakes.tiny import FAMILIES, tiny_config, tiny_weights
from tests.fakes.tiny_models import all_logits, make, some_ids, tensors_of
from tests.reference import SlowLlama

SHAPES = (
    {},
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "rms_norm_eps": 0.01},
)
SINKS, WINDOW, CHUNKS = (0, 1, 4), 20, (1, 7, 37, 128)
IDS = some_ids(300, seed=7)


def losses(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)[:-1]
    return np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(logits)), IDS[1:]]


def old_differs(model: Model, sinks: int) -> bool:
    """Return whether a stream that is 2^62 tokens older computes anything different."""
    young, old = (StreamCache(model.attention, sinks, WINDOW) for _ in range(2))
    streams = [TokenStream(model, cache) for cache in (young, old)]
    for _ in streams[0].steps(IDS[:100]):
        pass
    shift = FAR // young.geometry.ring * young.geometry.ring
    state = young.state()
    moved = {name: state[name] + shift for name in ("length", "floor")}
    old.restore(state | moved)
    for token in IDS[100:]:
        one, other = (np.array(stream.read([token])) for stream in streams)
        if not np.array_equal(one, other):
            return True
    return False


def main() -> int:
    failed = False
    for (family, changes), shape in product(FAMILIES.items(), SHAPES):
        raw = tiny_config(**{**changes, **shape})
        model, logit, nats = make(raw, tensors_of(raw)), 0.0, 0.0
        for sinks in SINKS:
            expected = SlowLlama(raw, tiny_weights(raw), sinks, WINDOW).logits(IDS)
            for chunk in CHUNKS:
                cache = StreamCache(model.attention, sinks, WINDOW, clock_limit=0)
                found = all_logits(model, cache, IDS, chunk)
                logit = max(logit, float(np.abs(found - expected).max()))
                nats = max(nats, float(np.abs(losses(found) - losses(expected)).max()))
        same = not any(old_differs(model, sinks) for sinks in SINKS)
        failed = failed or logit > 1e-3 or nats > 2e-3 or not same
        row = {"family": family, "shape": shape, "logit": logit, "nats": nats, "old_is_same": same}
        print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
