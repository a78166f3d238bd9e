"""Makes hostile files of tiny models, by seed: bytes, JSON, headers, tokenizers, templates.

Each mutation changes one or two files of a copy and says what it did. The package
itself knows nothing about these mutations.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_stream.checkpoint.gguf_config import ARCHITECTURES
from tests.fakes import gguf_files
from tests.fakes.gguf_families import WIDE, write_family
from tests.fakes.other_quantizers import awq, fp8, gptq, write_quantized
from tests.fakes.tiny import (
    CHAT_TEMPLATE,
    LONGROPE,
    MINISTRAL3,
    PHI3,
    QWEN3,
    tiny_config,
    tiny_weights,
    write_tiny,
)
from tests.fuzz.files import (
    BYTES,
    FLOATS,
    INSTEAD,
    NUMBERS,
    WORDS,
    Change,
    change_json,
    cut,
    dumps,
    forge_tensors,
    header_of,
    nothing,
    scramble,
)
from tests.fuzz.texts import HOSTILE_STEPS, HOSTILE_TEMPLATES, some_template

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
GGUF_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Q4_K", QWEN3),
    "phi3": ("Q2_K", {**PHI3, **LONGROPE}),
    "ministral3": ("BF16", MINISTRAL3),
}
# Only the converter reads these.
OTHERS: dict[str, tuple[dict[str, Any], Any]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, partial(awq, group=32)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, partial(gptq, group=32)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 40]}, partial(fp8, block=(48, 40))),
}
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
INDEX = "model.safetensors.index.json"
Way = Callable[[Path, random.Random], str]
# Keys that files of other models have: some change the computation.
KEYS = (
    *("rope_scaling", "rope_parameters", "sliding_window", "layer_types", "quantization"),
    *("quantization_config", "head_dim", "num_key_value_heads", "auto_map", "eos_token_id"),
    *("partial_rotary_factor", "attention_bias", "original_max_position_embeddings"),
)


def write_originals(folder: Path) -> list[Path]:
    """Write one valid model of each layout; return their paths."""
    config = tiny_config(**SMALL)
    weights = tiny_weights(config)
    mistral = tiny_config(**SMALL, model_type="mistral")
    single = write_tiny(folder / "single", config, weights)
    sharded = write_tiny(folder / "sharded", mistral, tiny_weights(mistral), "bfloat16", shards=3)
    quantized = write_tiny(folder / "quantized", config, weights, "float16")
    quantize(quantized)
    files = []
    for kind in ("Q4_0", "Q8_0", "F16"):
        files.append(folder / f"{kind}.gguf")
        gguf_files.write_tiny(files[-1], kind, {"tokenizer.chat_template": CHAT_TEMPLATE})
    files.append(folder / "pieces.gguf")
    template = {"tokenizer.chat_template": CHAT_TEMPLATE}
    gguf_files.write_tiny(files[-1], "Q5_0", gguf_files.SENTENCEPIECE | template)
    for name, (kind, changes) in GGUF_FAMILIES.items():
        files.append(folder / f"{name}.gguf")
        raw = tiny_config(**SMALL | WIDE | changes)
        write_family(files[-1], raw, tiny_weights(raw), kind, {"lm_head.weight": "Q6_K"})
    for name, (entry, quantize_matrix) in OTHERS.items():
        write_quantized(folder / name, entry, {}, quantize_matrix)
    return [single, sharded, quantized, *files, *(folder / name for name in OTHERS)]


def quantize(folder: Path) -> None:
    """Rewrite a folder in mlx-lm's layout: 4 bits, the head in 8, norms unchanged."""
    path = folder / "model.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    kept = {}
    for name, array in tensors.items():
        if array.ndim != 2:
            kept[name] = array
            continue
        module, bits = name.removesuffix(".weight"), 8 if name.startswith("lm_head") else 4
        parts = mx.quantize(array, group_size=32, bits=bits)
        kept |= dict(zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True))
    mx.save_safetensors(str(path), kept, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4, "lm_head": {"group_size": 32, "bits": 8}}
    (folder / "config.json").write_text(json.dumps(config))


def mutate(original: Path, copy: Path, draw: random.Random) -> tuple[str, Path]:
    """Make a hostile copy of a model; return what was done, and the copy's path."""
    if original.is_file():
        target = copy.with_suffix(".gguf")
        shutil.copyfile(original, target)
        gguf: list[Way] = [
            gguf_bytes,
            gguf_header,
            gguf_data,
            lambda path, draw: did(cut, path, draw),
        ]
        what = draw.choices(gguf, (4, 6, 2, 1))[0]
        return f"{original.name}: {what(target, draw)}", target
    shutil.copytree(original, copy)
    kinds: dict[Way, int] = {
        **{any_json: 8, tokenizer_steps: 4, template: 5, safetensors_header: 8},
        **{any_bytes: 8, strange_file: 2, index: 4, tensor_data: 3, deep: 1},
    }
    what = draw.choices(tuple(kinds), tuple(kinds.values()))[0]
    return f"{original.name}: {what(copy, draw)}", copy


# --- files ---


def did(change: Change, path: Path, draw: random.Random) -> str:
    change(path, draw)
    return f"{change.__name__} {path.name}"


def some_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def some_shard(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.glob("*.safetensors")))


def any_bytes(folder: Path, draw: random.Random) -> str:
    path = some_file(folder, draw)
    if path.suffix == ".safetensors" and draw.random() < 0.7:
        scramble(path, draw, 0, len(path.read_bytes()) - len(header_of(path)[1]))
        return f"header of {path.name}"
    return did(draw.choice(BYTES), path, draw)


def tensor_data(folder: Path, draw: random.Random) -> str:
    path = some_shard(folder, draw)
    size = path.stat().st_size
    scramble(path, draw, size - len(header_of(path)[1]), size - 8)
    return f"only tensor data of {path.name}"


def strange_file(folder: Path, draw: random.Random) -> str:
    return did(draw.choice((*INSTEAD, nothing)), some_file(folder, draw), draw)


def safetensors_header(folder: Path, draw: random.Random) -> str:
    return did(forge_tensors, some_shard(folder, draw), draw)


# --- JSON ---


def any_json(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice(JSON_FILES)
    value = json.loads(path.read_text())
    done = [change_json(value, draw, KEYS) for _ in range(draw.choice((1, 1, 2, 4)))]
    path.write_text(dumps(value))
    return f"{path.name}: {', '.join(done)}"


def deep(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice((*JSON_FILES, INDEX))
    depth = draw.choice((100, 900, 5_000, 200_000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    whole = opening * depth + "1" + closing * depth
    path.write_text('{"a": ' + draw.choice((whole, opening * depth, "9" * depth)) + "}")
    return f"{path.name}: {depth} deep or long"


def index(folder: Path, draw: random.Random) -> str:
    path = folder / INDEX
    if not path.exists():
        path.write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    value = json.loads(path.read_text())
    table = value["weight_map"]
    outside = ("../x.safetensors", "/x.safetensors", "a/b.safetensors", "a\0.safetensors", ".")
    choice = draw.choice((*outside, 7, None, "model-00001-of-99999.safetensors", INDEX, "json"))
    if choice == "json":
        done = change_json(value, draw, KEYS)
    else:
        name = draw.choice([*table, "extra"])
        table[name], done = choice, f"{name} in {choice!r}"
    path.write_text(dumps(value))
    return f"{path.name}: {done}"


# --- tokenizers and templates ---


def tokenizer_steps(folder: Path, draw: random.Random) -> str:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    what = draw.choice(tuple(HOSTILE_STEPS))
    HOSTILE_STEPS[what](value, draw)
    path.write_text(dumps(value))
    return f"tokenizer.json: {what}"


def template(folder: Path, draw: random.Random) -> str:
    name = draw.choice((*HOSTILE_TEMPLATES, "generated", "generated", "generated"))
    text = HOSTILE_TEMPLATES.get(name) or some_template(draw)
    file = draw.choice(("chat_template.jinja", "chat_template.json", "tokenizer_config.json"))
    if file == "chat_template.jinja":
        (folder / file).write_text(text)
    else:
        path = folder / "tokenizer_config.json"
        value = json.loads(path.read_text())
        path.write_text(json.dumps(value | {"chat_template": None}))
        (folder / file).write_text(json.dumps(value | {"chat_template": text}))
    return f"template: {name}: {text[:60]!r}"


# --- GGUF ---


def gguf_bytes(path: Path, draw: random.Random) -> str:
    # This is close enough: data makes up the last 60 % of these files.
    end = draw.choice((32, 900, path.stat().st_size * 2 // 5))
    scramble(path, draw, 0, end)
    return f"bytes before {end}"


def gguf_data(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    scramble(path, draw, size * 3 // 4, size - 8)
    return "only tensor data"


OTHER_KEYS = (
    *("general.alignment", "split.count", "split.no", "llama.rope.scaling.type"),
    *("llama.rope.scaling.factor", "llama.attention.sliding_window", "llama.expert_count"),
    *("llama.attention.temperature_scale", "llama.rope.scaling.yarn_log_multiplier"),
    *("llama.rope.scaling.attn_factor", "llama.attention.key_length"),
)


def gguf_header(path: Path, draw: random.Random) -> str:
    """Rewrite the file with false keys, using llama.cpp's own writer."""
    keys: dict[str, Any] = {"tokenizer.chat_template": CHAT_TEMPLATE}
    keys |= draw.choice(({}, gguf_files.SENTENCEPIECE))
    sound = gguf_files.KEYS | keys
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice((*sound, *OTHER_KEYS))
        old = sound.get(name)
        values = {
            int: [n for n in NUMBERS if 0 <= n < 2**32],
            float: list(FLOATS),
            str: [*WORDS, *HOSTILE_TEMPLATES.values(), "llama-bpe", "tekken"],
            list: [[1, 2], ["a", "a"], [0.5], ["a b"] * 3_000, ["", "x" * 9_000]],
        }
        kind = type(old) if old is not None and draw.random() < 0.7 else draw.choice(list(values))
        keys[name] = draw.choice((*values[kind], None))
    path.unlink()
    name = draw.choice(("llama", *ARCHITECTURES))
    keys = {
        key.replace("llama.", f"{name}."): value for key, value in (gguf_files.KEYS | keys).items()
    }
    try:
        gguf_files.write_tiny(path, draw.choice(("Q4_0", "Q5_1", "BF16")), keys, architecture=name)
    except (ValueError, TypeError, struct.error, OverflowError) as error:  # it cannot be written
        path.write_bytes(b"GGUF" + str(error).encode())
    return f"keys {str(keys)[-100:]}"
