"""Models that think: tiny ones that mostly write a script, whatever they are asked."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer

from tests.fakes.shell import edit
from tests.fakes.tiny import tiny_config, tiny_tokenizer, tiny_weights, write_tiny

# Names of special tokens in a template's source.
BAR = "\uff5c"
NAMES = re.compile(
    rf"<\|[^|<>]+\|>|<\|\w+>|<\w+\|>|<{BAR}[^<>]+{BAR}>|\[/?[A-Z_]{{2,}}\]|</?think>|</?s>"
)
VOCABULARY = 400
SHARPNESS = 12.0
CONFIG = tiny_config(num_hidden_layers=1, vocab_size=VOCABULARY, hidden_size=VOCABULARY)


def thinker_tokenizer(source: str) -> Tokenizer:
    """Return a byte-level tokenizer with the special tokens that a template names.

    Words fill the vocabulary, so the model writes no id that has no text.
    """
    backend = tiny_tokenizer()
    names = dict.fromkeys(NAMES.findall(source))
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    size = backend.get_vocab_size()
    assert size <= VOCABULARY
    backend.add_tokens([f"word{id}" for id in range(size, VOCABULARY)])
    return backend


def thinker_weights(backend: Tokenizer, script: Sequence[str]) -> dict[str, np.ndarray]:
    """Return weights of a model that writes each token of a script after the one before.

    The first token stands for the generation prompt. What was read before changes the logits a
    little. At a temperature of 1, a few tokens differ.
    """
    ids = [backend.token_to_id(token) for token in script]
    assert None not in ids and len(set(ids[:-1])) == len(ids) - 1, "each token has one successor"
    weights = tiny_weights(CONFIG)
    weights["model.embed_tokens.weight"] = 3 * np.eye(VOCABULARY, dtype=np.float32)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"] *= 0.1
    weights["model.norm.weight"] = np.ones(VOCABULARY, np.float32)
    head = 0.01 * weights["lm_head.weight"]
    for before, after in pairwise(ids):
        head[after, before] += SHARPNESS / np.sqrt(VOCABULARY)
    return weights | {"lm_head.weight": head}


def write_random(
    folder: Path, source: str, eos: str, positions: int = 2_048
) -> tuple[Path, dict, dict]:
    """Write a model that has a chat template and writes random text.

    Returns:
        Its folder, its config and its weights.
    """
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": positions}
    config = tiny_config(num_hidden_layers=1, **sizes)
    weights = tiny_weights(config)
    return write(folder, source, eos, config, weights), config, weights


def write_thinker(folder: Path, source: str, script: Sequence[str], eos: str) -> Path:
    """Write a model that has a chat template and mostly writes a script; return its folder."""
    weights = thinker_weights(thinker_tokenizer(source), script)
    return write(folder, source, eos, CONFIG, weights)


def write(folder: Path, source: str, eos: str, config: dict, weights: dict) -> Path:
    backend, path = thinker_tokenizer(source), write_tiny(folder, config, weights)
    backend.save(str(path / "tokenizer.json"))
    edit(path / "tokenizer_config.json", chat_template=source, eos_token=eos)
    for name in ("config.json", "generation_config.json"):
        edit(path / name, eos_token_id=backend.token_to_id(eos))
    return path
