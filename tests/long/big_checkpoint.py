"""Writes a random bfloat16 checkpoint of Llama-3.2-1B's shape: 2.5 GB, shard by shard.

    python -m tests.long.big_checkpoint OUT
    mlx_stream convert OUT OUT-4bit --bits 4

Its weights are random: it is for measuring memory and time.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx

from mlx_stream.checkpoint.json_files import write_json
from mlx_stream.checkpoint.shards import write_shards
from mlx_stream.config import read_config
from mlx_stream.models.layers import Projection
from mlx_stream.models.layout import layout_of
from tests.fakes.tiny import CHAT_TEMPLATE, LLAMA3, SPECIALS, tiny_tokenizer

# Llama-3.2-1B's, except for the ids that end a text: the tokenizer is the tests' own.
GROUP_SIZE = 64
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


def tensors(raw: dict, bits: int) -> Iterator[tuple[str, mx.array]]:
    for seed, part in enumerate(layout_of(read_config(raw)).parts):
        if not isinstance(part, Projection):
            yield f"{part.path}.weight", mx.ones(part.size, mx.bfloat16)
            continue
        shape, scale = (part.outputs, part.inputs), part.inputs**-0.5
        weight = mx.random.normal(shape, mx.bfloat16, scale=scale, key=mx.random.key(seed))
        parts = [weight] if bits == 16 else mx.quantize(weight, GROUP_SIZE, bits)
        mx.eval(parts)
        for kind, array in zip(("weight", "scales", "biases"), parts, strict=False):
            yield f"{part.path}.{kind}", array


def write_big(out: Path, bits: int = 16, **changes: object) -> Path:
    """Write a model of that shape, with `changes`, in bfloat16 or fewer bits; return its folder."""
    out.mkdir(parents=True, exist_ok=True)
    raw = {**SHAPE, **changes}
    if bits != 16:
        raw["quantization"] = {"group_size": GROUP_SIZE, "bits": bits}
    write_json(raw, out / "config.json")
    tiny_tokenizer().save(str(out / "tokenizer.json"))
    named = {"eos_token": SPECIALS[2], "chat_template": CHAT_TEMPLATE}
    write_json(named, out / "tokenizer_config.json")
    write_shards(tensors(raw, bits), out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a 1B model's shape.")
    parser.add_argument("out", type=Path, metavar="OUT", help="A new folder; takes 2.5 GB.")
    write_big(parser.parse_args().out)
