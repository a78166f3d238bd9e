"""Rebuilds tokenizer.json and its config from a GGUF header's keys; reads no tensors.

For a byte-level tokenizer, GGUF stores the vocabulary and merges, but only the name of the
pre-tokenizer. The original models' pipelines are listed here under that name.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_stream.checkpoint.gguf_header import GGUFHeader
from mlx_stream.checkpoint.gguf_sentencepiece import sentencepiece
from mlx_stream.config import Keys, shorten
from mlx_stream.errors import TokenizerError

# GGUF's token types (llama.cpp's llama_token_type).
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
KINDS = range(1, 7)

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# Uppercase, then lowercase letters: the first pattern needs a lowercase letter, the second an
# uppercase one.
CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_WORDS = "|".join(CASED_WORDS) + r"|\p{N}" + REST
GPT4O_WORDS = "|".join(word + ENDING for word in CASED_WORDS) + r"|\p{N}{1,3}" + REST


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def named_list(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [split | {"invert": False}, byte_level(use_regex=False)]


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of a named pre-tokenizer; a file may override `add_bos`."""

    steps: list[dict[str, Any]]
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: dict[str, Any] | None = None


LLAMA3 = Pipeline(named_list(LLAMA3_WORDS), ignore_merges=True, add_bos=True)
QWEN2 = Pipeline(named_list(QWEN2_WORDS), normalizer={"type": "NFC"})
PIPELINES = {
    "smollm": Pipeline([{"type": "Digits", "individual_digits": True}, byte_level(True)]),
    "llama-bpe": LLAMA3,
    # Two names that llama.cpp also treats as llama-bpe.
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "tekken": Pipeline(named_list(TEKKEN_WORDS), ignore_merges=True, add_bos=True),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "gpt-4o": Pipeline(named_list(GPT4O_WORDS)),
    "dbrx": Pipeline(named_list(LLAMA3_WORDS)),  # Phi-4's
    "gpt-2": Pipeline([byte_level(True)]),
}


def gguf_tokenizer(header: GGUFHeader, vocab_size: int) -> tuple[str, dict[str, Any]]:
    """Return the text of tokenizer.json and the content of tokenizer_config.json.

    Args:
        vocab_size: the number of embedding rows, which limits the token ids.

    Raises:
        TokenizerError: the kind of tokenizer is not supported, or its tables are inconsistent.
    """
    keys = replace(header.metadata, error=TokenizerError)
    kind = keys.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.model {shorten(kind)} is not supported (supported: "
            "gpt2, a byte-level BPE; llama, a SentencePiece BPE); use the model's Hugging Face "
            "folder"
        )
    tokens = strings(keys, "tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= vocab_size:
        raise TokenizerError(
            f"{keys.where}: there are {len(tokens)} tokens, but the embedding has {vocab_size} rows"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(t for index, t in enumerate(tokens) if vocabulary[t] != index)
        raise TokenizerError(f"{keys.where}: the token {shorten(twice)} occurs twice")
    named = {
        role: read_id(keys, f"tokenizer.ggml.{key}_token_id", len(tokens))
        for role, key in NAMED.items()
    }
    kinds = token_kinds(keys, len(tokens))
    if kind == "gpt2":
        pipeline = read_pipeline(keys)
        add_bos, parts = pipeline.add_bos, byte_level_bpe(keys, pipeline, vocabulary)
    else:
        add_bos, parts = True, sentencepiece(keys, tokens, kinds)
    template = bos_and_eos(keys, add_bos, named)
    special = {index for index in named.values() if index is not None}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added_tokens(keys, tokens, kinds, special),
        "post_processor": post_processor(tokens, *template),
        **parts,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": keys.count(f"{keys.text('general.architecture')}.context_length"),
        "add_bos_token": template[0] is not None,
        "add_eos_token": template[1] is not None,
    }
    for role in ("bos", "eos", "unk", "pad"):
        index = named[role]
        if index is not None:
            config[f"{role}_token"] = tokens[index]
    if "tokenizer.chat_template" in keys.raw:
        config["chat_template"] = keys.text("tokenizer.chat_template")
    return json.dumps(tokenizer, ensure_ascii=False), config


# transformers' name for a token's role, and GGUF's.
NAMED = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}


def read_pipeline(keys: Keys) -> Pipeline:
    # Files from early 2024 have none, or "default": llama.cpp guesses.
    name = keys.text("tokenizer.ggml.pre", "")
    if name in ("", "default"):
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.pre {shorten(name)} does not say how text is split: use "
            "a file made with a current llama.cpp, or the model's Hugging Face folder"
        )
    if name not in PIPELINES:
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.pre {shorten(name)} is not supported (supported: "
            f"{', '.join(PIPELINES)}); use the model's Hugging Face folder"
        )
    return PIPELINES[name]


def byte_level_bpe(keys: Keys, pipeline: Pipeline, vocabulary: dict[str, int]) -> dict[str, Any]:
    """Return the parts of tokenizer.json that encode and decode text."""
    return {
        "normalizer": pipeline.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pipeline.steps},
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "ignore_merges": pipeline.ignore_merges,
            "vocab": vocabulary,
            "merges": read_merges(keys, vocabulary),
        },
    }


def strings(keys: Keys, key: str) -> list[str]:
    value = keys.value(key)
    # An empty array of another type is accepted as an empty list of strings.
    if not isinstance(value, list):
        raise keys.wrong(key, "an array of strings")
    return value


def read_id(keys: Keys, key: str, token_count: int) -> int | None:
    if key not in keys.raw:
        return None
    index = keys.count(key, least=0)
    if index >= token_count:
        raise TokenizerError(f"{keys.where}: {key} {index} is not one of the {token_count} tokens")
    return index


def token_kinds(keys: Keys, count: int) -> np.ndarray:
    kinds = keys.value("tokenizer.ggml.token_type")
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu":
        raise keys.wrong("tokenizer.ggml.token_type", "an array of whole numbers")
    if len(kinds) != count:
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.token_type has {len(kinds)} entries for {count} tokens"
        )
    unknown = np.flatnonzero(~np.isin(kinds, KINDS))
    if unknown.size:
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.token_type has the unknown kind {kinds[unknown[0]]}"
        )
    return kinds


def added_tokens(
    keys: Keys, tokens: list[str], kinds: np.ndarray, special: set[int]
) -> list[dict[str, Any]]:
    """Return the entries for tokens that are matched before the text is split into words.

    They also stay in the vocabulary, which preserves their ids.
    """
    special = special | set(np.flatnonzero(np.isin(kinds, (UNKNOWN, CONTROL))).tolist())
    entries = []
    for index in sorted(special | set(np.flatnonzero(kinds == USER_DEFINED).tolist())):
        if not tokens[index]:
            raise TokenizerError(f"{keys.where}: token {index} is special but empty")
        entry = {"id": index, "content": tokens[index], "special": index in special}
        entries.append(
            entry | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        )
    return entries


def read_merges(keys: Keys, vocabulary: dict[str, int]) -> list[list[str]]:
    merges = []
    for merge in strings(keys, "tokenizer.ggml.merges"):
        # A byte-level vocabulary represents a space as a letter, so a space separates two tokens.
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(
                f"{keys.where}: the merge {shorten(merge)} does not join two tokens"
            )
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise TokenizerError(
                    f"{keys.where}: the merge {shorten(merge)} needs the token "
                    f"{shorten(token)}, which is not in the vocabulary"
                )
        merges.append([left, right])
    return merges


def bos_and_eos(
    keys: Keys, add_bos: bool, named: dict[str, int | None]
) -> tuple[int | None, int | None]:
    """Return the ids of the tokens before and after every text; None for no token."""
    found: list[int | None] = []
    for role, default in (("bos", add_bos), ("eos", False)):
        wanted = keys.flag(f"tokenizer.ggml.add_{role}_token", default)
        if wanted and named[role] is None:
            raise TokenizerError(
                f"{keys.where}: texts begin or end with {role}, but there is no "
                f"tokenizer.ggml.{role}_token_id: the file is incomplete"
            )
        found.append(named[role] if wanted else None)
    return found[0], found[1]


def post_processor(tokens: list[str], bos: int | None, eos: int | None) -> dict[str, Any] | None:
    if bos is None and eos is None:
        return None

    def special(index: int | None, segment: int) -> list[dict[str, Any]]:
        if index is None:
            return []
        return [{"SpecialToken": {"id": tokens[index], "type_id": segment}}]

    def wrapped(sequence: str, segment: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": sequence, "type_id": segment}}
        return [*special(bos, segment), text, *special(eos, segment)]

    return {
        "type": "TemplateProcessing",
        "single": wrapped("A", 0),
        "pair": wrapped("A", 0) + wrapped("B", 1),
        "special_tokens": {
            tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]}
            for index in sorted({index for index in (bos, eos) if index is not None})
        },
    }
