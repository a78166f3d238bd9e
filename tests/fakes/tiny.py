"""Tiny random models for tests, as dicts and as Hugging Face folders; independent of MLX.

The weights are scaled so that attention is far from uniform and logits have a scale of about 2:
a wrong position shows.
"""

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in the starter
# 41 merges fill a vocabulary of 300: 3 specials, 256 bytes, 41 longer tokens.
MERGES = """
Ġ+t h+e i+n e+r a+n r+e o+n Ġ+a Ġt+he Ġ+s o+u e+n Ġ+w a+t i+t e+s o+r n+d i+s Ġ+o Ġ+b Ġ+m Ġ+c Ġ+f
e+d in+g l+l Ġ+h Ġa+nd Ġt+o Ġ+in a+r Ġ+p Ġ+d o+m Ġo+f Ġ+l h+a l+e s+t v+e
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Changes to `tiny_config`: other ways to set the frequencies, and other families.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MISTRAL = {"model_type": "mistral"}
MINISTRAL3 = {
    "model_type": "ministral3",
    "rope_parameters": {
        **YARN,
        "rope_theta": 1e6,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
QWEN2 = {"model_type": "qwen2"}
QWEN3 = {"model_type": "qwen3"}
PHI3 = {"model_type": "phi3"}
LONGROPE = {
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
        "long_factor": [2.0, 2.2, 2.6, 3.2, 4.0, 5.0],
    },
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 128,
}
SMOLLM3 = {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}
# One model of each family, in which each of the family's features affects the result.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": MISTRAL,
    "ministral3": MINISTRAL3,
    "qwen2": QWEN2,
    "qwen3": {**QWEN3, "rope_scaling": YARN},
    "phi3": {**PHI3, **LONGROPE},
    "smollm3": {**SMOLLM3, "rope_scaling": YARN},
}


def tiny_config(**overrides) -> dict:
    """Return the `config.json` of a tiny Llama, or of the family `model_type` names, as a dict.

    `rope_parameters` takes the place of `rope_theta`, as transformers 5 writes it.
    """
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if overrides.get("model_type") == "mistral":
        del config["attention_bias"], config["mlp_bias"]
        config["sliding_window"] = None
    if "rope_parameters" in overrides:
        del config["rope_theta"]
    config |= overrides
    return {"architectures": [f"{config['model_type'].capitalize()}ForCausalLM"], **config}


def tiny_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random float32 weights with Hugging Face names for a config."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    weights: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        weights[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, rows: int, columns: int, *, scale: float, bias: bool = False) -> None:
        """Add a linear layer whose outputs have about this scale for inputs of scale 1."""
        normal(f"{name}.weight", rows, columns, scale=scale * columns**-0.5)
        if bias:
            normal(f"{name}.bias", rows, scale=0.3)

    linear("model.embed_tokens", vocab, hidden, scale=2.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        biased = bool(config.get("attention_bias"))
        qkv_biased = biased or config["model_type"] == "qwen2"
        for part, rows, scale in (
            ("q", heads * head_dim, 1.3),
            ("k", kv_heads * head_dim, 1.3),
            ("v", kv_heads * head_dim, 1.0),
        ):
            linear(f"{layer}.self_attn.{part}_proj", rows, hidden, scale=scale, bias=qkv_biased)
        if config["model_type"] == "phi3":
            _fuse(weights, f"{layer}.self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        linear(f"{layer}.self_attn.o_proj", hidden, heads * head_dim, scale=2.0, bias=biased)
        for part in "qk" if config["model_type"] == "qwen3" else "":
            normal(f"{layer}.self_attn.{part}_norm.weight", head_dim, scale=0.3, mean=1.0)
        biased = bool(config.get("mlp_bias"))
        linear(f"{layer}.mlp.gate_proj", inner, hidden, scale=1.0, bias=biased)
        linear(f"{layer}.mlp.up_proj", inner, hidden, scale=1.0, bias=biased)
        if config["model_type"] == "phi3":
            _fuse(weights, f"{layer}.mlp", ("gate_proj", "up_proj"), "gate_up_proj")
        linear(f"{layer}.mlp.down_proj", hidden, inner, scale=1.0, bias=biased)
        normal(f"{layer}.input_layernorm.weight", hidden, scale=0.1, mean=1.0)
        normal(f"{layer}.post_attention_layernorm.weight", hidden, scale=0.1, mean=1.0)
    normal("model.norm.weight", hidden, scale=0.1, mean=1.0)
    if not config.get("tie_word_embeddings"):
        linear("lm_head", vocab, hidden, scale=2.0)
    return weights


def _fuse(weights: dict[str, np.ndarray], path: str, parts: tuple[str, ...], name: str) -> None:
    """Join matrices, as they are stored in a Phi-3's checkpoint."""
    matrices = [weights.pop(f"{path}.{part}.weight") for part in parts]
    weights[f"{path}.{name}.weight"] = np.concatenate(matrices)


def stored_as(weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Return the float32 values that a folder written with this dtype holds."""
    if dtype == "bfloat16":
        bits = {name: _bfloat16_bits(w).astype(np.uint32) << 16 for name, w in weights.items()}
        return {name: b.view(np.float32) for name, b in bits.items()}
    return {name: w.astype(dtype).astype(np.float32) for name, w in weights.items()}


def write_tiny(
    folder: Path,
    config: dict,
    weights: dict[str, np.ndarray],
    dtype: str = "float32",
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """Write a Hugging Face folder, in float32, float16 or bfloat16; return it.

    Without a tokenizer there is no `tokenizer.json` and no `tokenizer_config.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", {**config, "torch_dtype": dtype})
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
    _write_weights(folder, weights, dtype, shards)
    if tokenizer:
        tiny_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
        named = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "unk_token": SPECIALS[0]}
        _write_json(
            folder / "tokenizer_config.json",
            {
                **named,
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
                "model_max_length": config["max_position_embeddings"],
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
        )
    return folder


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a tiny model with `tiny_config` and these changes; return its folder."""
    config = tiny_config(**changes)
    return write_tiny(folder, config, tiny_weights(config))


def write_letters(folder: Path, config: dict) -> Path:
    """Write a model that, when greedy, writes nothing but letters forever; return its folder."""
    config = {key: value for key, value in config.items() if key != "eos_token_id"}
    weights = tiny_weights(config)
    head = weights["lm_head.weight"]
    vocabulary = tiny_tokenizer(config["vocab_size"]).get_vocab()
    ids = [vocabulary[letter] for letter in ascii_lowercase]
    rows = np.zeros_like(head)
    # Whatever was read, a row or its negation scores above the zeros of all other tokens.
    rows[ids[0::2]], rows[ids[1::2]] = head[ids[0::2]], -head[ids[0::2]]
    write_tiny(folder, config, weights | {"lm_head.weight": rows})
    path = Path(folder) / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text(encoding="utf-8"))
    del tokenizer_config["eos_token"]
    _write_json(path, tokenizer_config)
    return Path(folder)


def tiny_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `vocab_size` tokens, made without training."""
    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(tokens):
        raise ValueError(f"a byte-level vocabulary has at least {len(tokens)} tokens")
    pairs = [merge.split("+") for merge in MERGES.split()]
    merges = [(first, second) for first, second in pairs[: vocab_size - len(tokens)]]
    vocab = {token: i for i, token in enumerate([*tokens, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return tokenizer


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, weights: dict[str, np.ndarray], dtype: str, shards: int) -> None:
    names = list(weights)
    files = {}
    for i, part in enumerate(np.array_split(np.arange(len(names)), shards), start=1):
        single = shards == 1
        file = "model.safetensors" if single else f"model-{i:05}-of-{shards:05}.safetensors"
        chosen = [names[j] for j in part]
        _save({name: weights[name] for name in chosen}, folder / file, dtype)
        files |= dict.fromkeys(chosen, file)
    if shards > 1:
        size = sum(w.size for w in weights.values()) * (4 if dtype == "float32" else 2)
        index = {"metadata": {"total_size": size}, "weight_map": files}
        _write_json(folder / "model.safetensors.index.json", index)


def _save(weights: dict[str, np.ndarray], path: Path, dtype: str) -> None:
    """Write one shard with the lower-level call, because numpy has no bfloat16."""
    data = {
        name: np.ascontiguousarray(_bfloat16_bits(w) if dtype == "bfloat16" else w.astype(dtype))
        for name, w in weights.items()
    }
    specs = {
        name: TensorSpec(dtype=dtype, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
        for name, a in data.items()
    }
    serialize_file(specs, path, metadata={"format": "pt"})


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Return the upper halves of float32 numbers, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
