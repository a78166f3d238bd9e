"""Compare `plan` with what a running chat really takes at its peak, once it is loaded.

    python -m tests.measure.plan_memory [starter | 1b | FAMILY] [--window 1020] [--bits 16 | 4]
        [--dtype TYPE] [--kv-bits 8 | 4] [--filled]

`1b` is a model of Llama-3.2-1B's shape with random weights, written in bfloat16 or 4 bits to a
temporary folder. FAMILY is a random 143 MB model of one of the families. The chat has one turn,
longer than the window by more than a chunk. Reading it takes minutes in float32, and hours in
bfloat16 or 4 bits on the CPU backend: with `--filled` the stream begins with a window that is full
of zeros, and the turn is one chunk and a little more. Prints one line of JSON; exits with 1 if the
plan is off by more than 5 %. Not collected by pytest.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.cache.steps.verify import spare_rows
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.hub.starter import STARTER
from mlx_stream.load import load
from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.plan import devices
from mlx_stream.plan.inspect import summarize_model
from mlx_stream.plan.planner import PlanRequest, make_plan
from mlx_stream.sampling import Sampler, Sampling
from tests.checkpoint.test_text_model import wrap
from tests.fakes.tiny import FAMILIES, LONGROPE, MINISTRAL3, tiny_config, tiny_weights, write_tiny
from tests.long.big_checkpoint import write_big

ALLOWED = 0.05
TRAINED = {"original_max_position_embeddings": 4_096}
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1_536,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4_096,
    "max_position_embeddings": 4_096,
}
# Changes to the tests' tiny models of some families, so that they fit SHAPE.
CHANGES: dict[str, dict[str, Any]] = {
    "ministral3": {"rope_parameters": MINISTRAL3["rope_parameters"] | {"factor": 1.0, **TRAINED}},
    "phi3": {
        **TRAINED,
        "rope_scaling": {
            kind: value * 4 if isinstance(value, list) else value
            for kind, value in LONGROPE["rope_scaling"].items()
        },
    },
    "smollm3": {"no_rope_layers": [1, 0] * 5},
}
OVER = PREFILL_CHUNK + 60  # how many tokens longer than the window the turn is
REPLY = 4

Talk = tuple[int, int]  # the sinks of the stream, and the bytes of its keys and values


def chat(model: Model, window: int, kv_bits: int | None, text: str) -> Talk:
    """Ask one question that is longer than the window."""
    # If it were pinned, the system turn that a template may open with would take more sinks than
    # the default, and the starter's trained context has no room for them beside a window of 8,188.
    session = mlx_stream.ChatSession(
        model,
        window=window,
        max_tokens=REPLY,
        sampling=mlx_stream.Sampling(temperature=0),
        pin=False,
        kv_bits=kv_bits,
    )
    for _ in session.reply(text):
        pass
    assert session.stats.evicted > 0
    return session.stats.sinks, session.stats.cache_bytes


def chat_filled(model: Model, window: int, kv_bits: int | None, text: str) -> Talk:
    """Read a turn into a stream that is full already."""
    cache = model.new_cache(window=window, spare=spare_rows(kv_bits), kv_bits=kv_bits)
    length = cache.geometry.rows
    cache.restore(cache.state() | {"length": length, "clock": length, "sinks_at": -1})
    state = cache.state()
    stream = TokenStream(model, cache)
    stream.restore(state | {"ids": mx.zeros(length, mx.uint32)})
    del state
    mx.reset_peak_memory()  # restoring holds the ring twice; a chat from its beginning never does
    ids = model.tokenizer.encode(text)[: PREFILL_CHUNK + 2]
    for _ in generate(stream, ids, Sampler(Sampling(temperature=0)), REPLY):
        pass
    assert cache.evicted > 0
    return cache.geometry.sinks, cache.nbytes


def write_family(folder: Path, family: str) -> Path:
    """Write a random model of SHAPE; return its folder."""
    if family == "mistral3":
        return wrap(write_family(folder, "ministral3"), "newer")
    raw = tiny_config(**FAMILIES[family] | SHAPE | CHANGES.get(family, {}))
    return write_tiny(folder, raw, tiny_weights(raw))


def turn_of(model: Model, length: int) -> str:
    """Return a text of at least this many tokens, and not many more."""
    words = "the man and the sea were on the hill, "
    return words * (length // len(model.tokenizer.encode(words)) + 1)


def measure(
    source: str, asked: PlanRequest, talk: Callable[[Model, int, int | None, str], Talk]
) -> dict[str, Any]:
    assert asked.window is not None
    backend.set_cache_limit()
    mx.reset_peak_memory()
    model = load(source, asked.dtype, asked.keep)
    loading = mx.get_peak_memory()
    turn = turn_of(model, 4 + asked.window + OVER)
    mx.clear_cache()
    mx.reset_peak_memory()
    sinks, ring = talk(model, asked.window, asked.kv_bits, turn)
    peak = mx.get_peak_memory()
    plan = make_plan(summarize_model(source, print), devices.here(), replace(asked, sinks=sinks))
    weights = model.weight_bytes
    assert (plan.weights, plan.ring) == (weights, ring), "weights and ring are exact"
    return {
        "recipe": plan.recipe.name,
        "dtype": plan.dtype,
        "sinks": plan.sinks,
        "window": plan.window,
        "kv_bits": asked.kv_bits,
        "weights": weights,
        "ring": ring,
        "workspace": plan.workspace,
        "measured_workspace": peak - weights - ring,
        "total": plan.total,
        "measured": peak,
        "off_by": round(plan.total / peak - 1, 4),
        "loading": plan.loading,
        "measured_loading": loading,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    models = STARTER, "1b", *FAMILIES, "mistral3"
    parser.add_argument("model", nargs="?", default=STARTER, choices=models)
    parser.add_argument("--window", type=int, default=1_020)
    parser.add_argument("--bits", type=int, default=16, choices=(16, 4))
    parser.add_argument("--dtype")
    parser.add_argument("--keep-quantized", action="store_true", default=None)
    parser.add_argument("--kv-bits", type=int, choices=(8, 4))
    parser.add_argument("--filled", action="store_true")
    options = parser.parse_args()
    asked = PlanRequest(
        options.dtype, options.keep_quantized, window=options.window, kv_bits=options.kv_bits
    )
    talk = chat_filled if options.filled else chat
    with tempfile.TemporaryDirectory() as temporary:
        source = options.model
        if source == "1b":
            source = str(write_big(Path(temporary), options.bits))
        elif source != STARTER:
            source = str(write_family(Path(temporary), source))
        mx.clear_cache()
        result = {"model": options.model, "filled": options.filled} | measure(source, asked, talk)
    print(json.dumps(result))
    sys.exit(abs(result["off_by"]) > ALLOWED)


if __name__ == "__main__":
    main()
