"""Hostile GGUF files: refused in one line, without allocating the sizes they claim."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_stream.checkpoint.gguf_header import read_header
from mlx_stream.errors import (
    CheckpointError,
    ConfigError,
    MlxStreamError,
    TokenizerError,
    WeightsError,
)
from tests.fakes.gguf_files import (
    KEYS,
    TOKENS,
    TYPES,
    array,
    forged,
    key,
    llama3_factors,
    overwrite,
    refused,
    tensor,
    text,
    write_tiny,
)

LLAMA = key("general.architecture", 8, text("llama"))
FOUR = bytes(64)
U64 = 2**64 - 1


FORGED = [
    (b"", "too small"),
    (b"GGUF" + bytes(8), "too small"),
    (b"GGML" + bytes(40), "not a GGUF file"),
    (forged(version=1) + FOUR, "GGUF version 1 is not supported"),
    (forged(version=3 << 24) + FOUR, "big-endian GGUF"),
    (forged(key_count=U64) + FOUR, f"claims {U64} keys"),
    (forged(tensor_count=U64) + FOUR, f"claims {U64} tensors"),
    (forged((LLAMA,), key_count=99), "claims 99 keys"),
    (forged((LLAMA, LLAMA)), "occurs twice"),
    (forged((key(b"\xff\xfe", 4, bytes(4)),)), "not UTF-8"),
    (forged((key("a", 8, text(b"\xc3")),)), "not UTF-8"),
    (forged((key("a", 13, bytes(8)),)), "unknown type 13"),
    (forged((key("a", 7, b"\x02"),)) + FOUR, "neither true nor false"),
    (forged((key("a", 9, array(9, 1, array(4, 1, bytes(4)))),)), "array of arrays"),
    (forged((key("a", 9, array(99, 1)),)), "array of unknown type 99"),
    (forged((key("a", 9, array(4, 2**62)),)), "truncated"),
    (forged((key("a", 9, array(0, U64)),)), "truncated"),
    (forged((key("a", 9, array(8, 2**61)),)), f"claims {2**61} strings"),
    (forged((key("a", 9, array(8, U64)),)), f"claims {U64} strings"),
    (forged((key("a", 9, array(8, 1, b"\xff" * 8)),)), "truncated"),
    (forged((key("a" * 70_000, 4, bytes(4)),)), "general.architecture is missing"),
    (forged((LLAMA,), (tensor("w", (4,)),) * 2, FOUR), "'w' occurs twice"),
    (forged((LLAMA,), (tensor("w", ()),), FOUR), "0 dimensions"),
    (forged((LLAMA,), (tensor("w", (1,) * 5),), FOUR), "5 dimensions"),
    (forged((LLAMA,), (tensor("w", (4,), kind=77),), FOUR), "unknown type 77"),
    (forged((LLAMA,), (tensor("w", (0, 4)),), FOUR), "has shape (4, 0)"),
    (forged((LLAMA,), (tensor("w", (2**32,) * 4),), FOUR), "has shape"),
    (forged((LLAMA,), (tensor("w", (U64,) * 4),), FOUR), "has shape"),
    (forged((LLAMA,), (tensor("w", (33,), kind=2),), FOUR), "type Q4_0 has shape (33,)"),
    (forged((LLAMA,), (tensor("w", (2**40,)),), FOUR), "truncated"),
    (forged((LLAMA,), (tensor("w", (4,), offset=2**63),), FOUR), "truncated"),
    (forged((LLAMA,), (tensor("w", (4,), offset=U64),), FOUR), "not aligned"),
    (forged((LLAMA,), (tensor("w", (4,), offset=8),), FOUR), "not aligned"),
    (forged((LLAMA,), (tensor("v", (4,)), tensor("w", (4,))), FOUR), "overlaps"),
    (forged((LLAMA,), (tensor("v", (9,)), tensor("w", (4,), offset=32)), FOUR), "overlaps"),
    (forged((LLAMA,), (tensor("a\nb\u2028", (4,), kind=12),), FOUR), "'a\\nb\\u2028'"),
    (forged((key("general.architecture", 8, text("x\n" * 999)),)), "'x\\nx\\n"),
    (forged((key("general.alignment", 4, b"\0\0\0\0"),)) + FOUR, "general.alignment"),
    (forged((key("general.name", 8, text("x")),)), "general.architecture is missing"),
]


SCALING = "llama.rope.scaling."
NUMBERS = ("block_count", "context_length", "embedding_length", "feed_forward_length")
NUMBERS += ("attention.head_count", "attention.layer_norm_rms_epsilon")
YARN = {f"{SCALING}type": "yarn", f"{SCALING}factor": 2.0}


def keys(prefix: str, **values: Any) -> dict[str, Any]:
    return {"keys": {f"{prefix}{name}": value for name, value in values.items()}}


def words(**values: Any) -> dict[str, Any]:
    return keys("tokenizer.ggml.", **values)


def floats(name: str, *shape: int) -> dict[str, Any]:
    return {"tensors": {name: np.zeros(shape, np.float32) if shape else None}}


def factors(values: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"tensors": {"rope_freqs.weight": values.astype(np.float32)}, **more}


def renamed(architecture: str, **values: Any) -> dict[str, Any]:
    """Return the changes that give a file a different architecture and extra keys."""
    own = {key.replace("llama.", f"{architecture}."): value for key, value in KEYS.items()}
    more = {f"{architecture}.{name}": value for name, value in values.items()}
    return {"architecture": architecture, "keys": own | more}


MISTRAL_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}

# Changes to a file, and the text of its refusal.
WRITTEN: list[tuple[dict[str, Any], type[MlxStreamError], str]] = [
    (floats("blk.1.attn_v.weight"), WeightsError, "blk.1.attn_v.weight is missing"),
    (floats("token_embd.weight"), WeightsError, "token_embd.weight is missing"),
    (floats("blk.0.attn_rot.weight", 4), WeightsError, "attn_rot.weight' is not part of"),
    (floats("blk.2.attn_norm.weight", 64), WeightsError, "is not part of a llama model"),
    (floats("blk.0.attn_q.weight", 32, 64), WeightsError, "expected (64, 64)"),
    (floats("output_norm.weight", 8, 8), WeightsError, "expected (64,)"),
    (floats("blk.0.attn_q.bias", 64), WeightsError, "blk.0.attn_k.bias is missing"),
    (keys("llama.", block_count=3), WeightsError, "blk.2.attn_norm.weight is missing"),
    (keys("llama.", block_count=9_999), WeightsError, "9999 layers in 20 tensors"),
    (keys("llama.", block_count=2**31 - 1), ConfigError, "num_hidden_layers must be"),
    *(
        ({"keys": {f"llama.{name}": value}}, ConfigError, f"llama.{name}")
        for name in NUMBERS
        for value in (None, "text", -1, 0, True, [1, 2], float("nan"))
    ),
    (keys("llama.", expert_count=8), CheckpointError, "llama.expert_count = 8"),
    (keys("llama.attention.", sliding_window=64), CheckpointError, "sliding_window = 64"),
    (keys("llama.", logit_scale=[1.0]), CheckpointError, "llama.logit_scale"),
    (keys(SCALING, type="longrope"), CheckpointError, "'longrope' is not supported"),
    (keys(SCALING, type=3), CheckpointError, f"{SCALING}type must be text"),
    (keys(SCALING, factor=[2.0]), CheckpointError, f"{SCALING}factor must be"),
    (
        {"keys": {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}},
        *(CheckpointError, "partial rotary"),
    ),
    (
        renamed("mistral3", **{"attention.temperature_scale": 0.1}),
        ConfigError,
        "mistral3.attention.temperature_scale needs yarn",
    ),
    (
        renamed("mistral3", **MISTRAL_YARN, **{"attention.temperature_scale": [1.0, 2.0]}),
        *(ConfigError, "mistral3.attention.temperature_scale must be a positive number"),
    ),
    (
        renamed("mistral3", **MISTRAL_YARN, **{"rope.scaling.yarn_log_multiplier": [1.0, 2.0]}),
        *(ConfigError, "mistral3.rope.scaling.yarn_log_multiplier must be a positive number"),
    ),
    (
        renamed("phi3", **{"attention.sliding_window": [1, 2]}),
        *(ConfigError, "phi3.attention.sliding_window must be a whole number"),
    ),
    (renamed("phi3", **{"rope.scaling.type": "yarn"}), ConfigError, "must be none or longrope"),
    (renamed("phi3"), WeightsError, "blk.0.attn_qkv.weight is missing"),
    (renamed("qwen2"), WeightsError, "blk.0.attn_q.bias is missing"),
    (keys("llama.attention.", key_length=2**16 + 1), ConfigError, "from 1 to 65536"),
    (keys("llama.attention.", value_length=8), CheckpointError, "llama.attention.value_length"),
    (keys("llama.attention.", head_count_kv=3), ConfigError, "num_key_value_heads 3"),
    (keys("general.", type="adapter"), CheckpointError, "general.type must be 'model'"),
    (keys("general.", alignment=24), CheckpointError, "alignment 24 is not a power of two"),
    (keys("split.", count=3), CheckpointError, "one part of 3"),
    ({"architecture": "gemma"}, ConfigError, "'gemma' is not supported (supported: llama, mistral"),
    ({"architecture": "qwen2"}, ConfigError, "qwen2.embedding_length is missing"),
    (factors(llama3_factors(8.0, low=2.0)), ConfigError, "rope_freqs.weight"),
    (factors(np.full(8, np.nan)), ConfigError, "rope_freqs.weight"),
    (factors(np.full(8, np.inf)), ConfigError, "rope_freqs.weight"),
    (factors(np.ones(4)), ConfigError, "rope_freqs.weight"),
    (factors(llama3_factors(8.0), keys=YARN), ConfigError, "rope_freqs.weight"),
    (words(model="bert"), TokenizerError, "model 'bert' is not supported (supported: gpt2, a"),
    (words(model="llama"), TokenizerError, "tokenizer.ggml.tokens lacks byte tokens"),
    (words(pre="viking"), TokenizerError, "'viking' is not supported (supported: smollm, llama-b"),
    (words(pre=None), TokenizerError, "tokenizer.ggml.pre '' does not say how text is split"),
    (words(pre="default"), TokenizerError, "pre 'default' does not say how text is split: use a"),
    (words(tokens=None), TokenizerError, "tokenizer.ggml.tokens is missing"),
    (words(tokens=[1, 2]), TokenizerError, "tokens must be an array of strings"),
    (words(tokens=[*TOKENS, *["a"] * 11]), TokenizerError, "but the embedding has"),
    (words(tokens=[*TOKENS[:-1], "the"]), TokenizerError, "'the' occurs twice"),
    (words(tokens=["", *TOKENS[1:]]), TokenizerError, "token 0 is special but empty"),
    (words(token_type=None), TokenizerError, "tokenizer.ggml.token_type is missing"),
    (words(token_type=TYPES[:-1]), TokenizerError, "token_type has"),
    (words(token_type=TOKENS), TokenizerError, "token_type must be"),
    (words(token_type=[0, *TYPES[1:]]), TokenizerError, "unknown kind 0"),
    (words(merges=["th"]), TokenizerError, "'th' does not join two tokens"),
    (words(merges=["t h e"]), TokenizerError, "'t h e' does not join two tokens"),
    (words(merges=["t nothing"]), TokenizerError, "'nothing', which is not in the vocabulary"),
    (words(merges=["e h"]), TokenizerError, "'eh', which is not in the vocabulary"),
    (words(merges=3), TokenizerError, "merges must be an array of strings"),
    (words(bos_token_id=len(TOKENS)), TokenizerError, "is not one of the"),
    (words(add_bos_token=True, bos_token_id=None), TokenizerError, "no tokenizer.ggml.bos_token_i"),
    (words(add_bos_token=1), TokenizerError, "add_bos_token must be true or false"),
    (keys("tokenizer.", chat_template=3), TokenizerError, "tokenizer.chat_template must be text"),
]
SCALES = [("Q8_0", 512.0), ("Q4_0", 8192.0), ("Q4_1", np.inf), ("Q4_0", np.nan)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(("content", "message"), FORGED, ids=[message for _, message in FORGED])
def test_forged_headers_are_refused_without_allocating(path, content, message):
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert message in refused(path, CheckpointError)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("changes", "kind", "message"), WRITTEN)
def test_unsupported_files_are_refused_by_name(path, changes, kind, message):
    write_tiny(path, **changes)
    assert message in refused(path, kind)


def test_a_type_that_only_another_writer_makes_is_named(path):
    entry = tensor("blk.0.ffn_up.weight", (256, 2), kind=23)
    path.write_bytes(forged((LLAMA,), (entry,), bytes(288)))
    message = refused(path, CheckpointError)
    assert "blk.0.ffn_up.weight' has the type IQ4_XS" in message
    assert "(supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0" in message


@pytest.mark.parametrize(("kind", "scale"), SCALES)
def test_scales_that_do_not_fit_are_refused(path, kind, scale):
    write_tiny(path, kind)
    where = read_header(path).tensors["blk.1.ffn_up.weight"]
    overwrite(path, where.offset, np.float16(scale).tobytes())
    assert "blk.1.ffn_up.weight" in refused(path, WeightsError)


def test_a_missing_file_is_refused(path):
    assert "no such file" in refused(path, CheckpointError)
    path.mkdir()
    assert "no such file" in refused(path, CheckpointError)


def test_a_file_cut_anywhere_is_refused(path):
    write_tiny(path)
    content = path.read_bytes()
    size = len(content)
    for length in (*range(300), *range(300, size, 401), *range(size - 20, size)):
        path.write_bytes(content[:length])
        refused(path, CheckpointError)
