"""Tiny GGUF files for tests: whole models through llama.cpp's own writer, and forged headers."""

import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.errors import MlxStreamError

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3"]
# `hello` is not a product of the merges: only a model that ignores them for whole words finds it.
TOKENS = [
    *CONTROL,
    *sorted(ByteLevel.alphabet()),
    "th",
    "the",
    "Ġthe",
    "12",
    "123",
    "hello",
    "<tool>",
]
TYPES = [3] * 3 + [1] * (len(TOKENS) - 4) + [4]
VOCAB = len(TOKENS) + 10

MODULES = {
    "attn_q": ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
    "attn_k": ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": ("mlp.gate_proj", INNER, HIDDEN),
    "ffn_up": ("mlp.up_proj", INNER, HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN, INNER),
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEADS_OF = {"attn_q": HEADS, "attn_k": KV_HEADS}

KEYS: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 512,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50_000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}

# A SentencePiece vocabulary whose scores are in a different order from its pieces.
SCORED = {"e": 0, "t": 0, "h": 0, "▁": 0, "th": -3, "▁the": -5, "the": -4, "he": -1, "▁t": -2}
SCORED |= {"▁▁": -9, "▁▁▁": -10}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>", *SCORED]
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 260 + [float(score) for score in SCORED.values()],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [4] + [1] * len(SCORED),
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.unknown_token_id": 0,
}


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """Permute rows as `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py does."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def llama3_factors(factor: float, low: float = 1.0) -> np.ndarray:
    """Follow `LlamaModel.generate_extra_tensors` in llama.cpp's convert_hf_to_gguf.py."""
    factors = []
    for frequency in 50_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - low) / (4.0 - low)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def write_tiny(
    path: Path,
    kind: str = "Q4_0",
    keys: dict[str, Any] | None = None,
    kinds: dict[str, str] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    tied: bool = True,
    biases: bool = False,
    architecture: str = "llama",
) -> dict[str, np.ndarray]:
    """Write a random Llama and return its weights as float32, by Hugging Face name.

    `keys` and `tensors` override the defaults (None leaves one out); `kinds` gives some
    matrices, by GGUF name, a type other than `kind`.
    """
    random = np.random.default_rng(3)
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        for key, value in {**KEYS, **(keys or {})}.items():
            if value is not None:
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        expected: dict[str, np.ndarray] = {}
        written: dict[str, tuple[np.ndarray, str]] = {}

        def add(name: str, hf_name: str, shape: tuple[int, ...]) -> None:
            values = random.standard_normal(shape).astype(np.float32)
            use = (kinds or {}).get(name, kind) if len(shape) == 2 else "F32"
            quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType[use])
            expected[hf_name] = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType[use])
            heads = HEADS_OF.get(name.split(".")[-2], 0)
            written[name] = (permute(quantized, heads) if heads else quantized, use)

        add("token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN))
        add("output_norm.weight", "model.norm.weight", (HIDDEN,))
        if not tied:
            add("output.weight", "lm_head.weight", (VOCAB, HIDDEN))
        for layer in range(LAYERS):
            gguf_block, hf_block = f"blk.{layer}", f"model.layers.{layer}"
            for name, (module, rows, columns) in MODULES.items():
                add(f"{gguf_block}.{name}.weight", f"{hf_block}.{module}.weight", (rows, columns))
                if biases:
                    add(f"{gguf_block}.{name}.bias", f"{hf_block}.{module}.bias", (rows,))
            for name, module in NORMS.items():
                add(f"{gguf_block}.{name}.weight", f"{hf_block}.{module}.weight", (HIDDEN,))
        for name, values in (tensors or {}).items():
            written.pop(name, None)
            if values is not None:
                written[name] = (values, "F32")
        for name, (values, use) in written.items():
            writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[use])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return expected


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """Return one entry of the table of tensors; `shape` is in GGUF's order."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def forged(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """Return a file of these entries, valid or not; the counts may be wrong."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys + tensors)
    return header + bytes(-len(header) % 32) + data


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(content)


def refused(path: Path, kind: type[MlxStreamError] = MlxStreamError) -> str:
    """Read all of a file that must be refused, and return the one line it is refused with."""
    with pytest.raises(kind) as caught:
        read_all(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and path.name in message and len(message) < 400
    return message


def read_all(path: Path) -> None:
    checkpoint = read_gguf(path)
    for name in checkpoint.tensors:
        mx.eval(checkpoint.tensors[name])
    Tokenizer.from_str(checkpoint.tokenizer)
