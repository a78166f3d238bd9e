"""Published tokenizers cut to a few kB: their steps and control tokens, and a small vocabulary.

The vocabularies are made here: bytes, letters, and merges of the kinds that depend on context (of
spaces, line ends, and a space with a word).
"""

import json
from dataclasses import dataclass, field
from typing import Any

from tokenizers import pre_tokenizers

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.text.tokenizer import Tokenizer
from tests.text.test_template import LLAMA_2, LLAMA_3

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
)
CASED += "|" + CASED.replace("]*[", "]+[").replace("]+(?i", "]*(?i")
UPPER_FIRST = r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
FALLBACK = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and "
    "not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant'"
    " else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
DEEPSEEK_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<\uff5cUser\uff5c>' + m.content }}"
    "{% else %}{{ '<\uff5cAssistant\uff5c>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"
)


@dataclass(frozen=True)
class Cut:
    """A published tokenizer's parts; added tokens that begin with ! are not special."""

    template: str
    control: str
    patterns: list[str] = field(default_factory=list)
    steps: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    normalized: bool = False


CUT = {
    "Llama 2": Cut(
        LLAMA_2,
        "<unk> <s> </s>",
        steps={
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES],
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [*FALLBACK, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
            },
        },
        tokens={"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "Llama 3.1": Cut(
        LLAMA_3,
        "<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|>",
        [WORDS + r"\p{N}{1,3}" + ENDS],
        tokens={"bos_token": "<|begin_of_text|>"},
    ),
    "Gemma 3": Cut(
        GEMMA,
        "<unk> <bos> <start_of_turn> <end_of_turn> !\n\n !▁▁",
        steps={
            "normalizer": SPACES,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            "decoder": {"type": "Sequence", "decoders": FALLBACK},
        },
        tokens={"bos_token": "<bos>"},
    ),
    "Qwen3": Cut(
        CHATML,
        "<|endoftext|> <|im_start|> <|im_end|> !<think> !</think> !<tool_call>",
        [WORDS + r"\p{N}" + ENDS],
        steps={"normalizer": {"type": "NFC"}},
    ),
    "gpt-oss": Cut(
        HARMONY, "<|start|> <|message|> <|end|> <|channel|> <|return|>", [CASED + UPPER_FIRST]
    ),
    "DeepSeek V3": Cut(
        DEEPSEEK_TURNS,
        "<\uff5cbegin\u2581of\u2581sentence\uff5c> <\uff5cend\u2581of\u2581sentence\uff5c>"
        " !<\uff5cUser\uff5c> !<\uff5cAssistant\uff5c>",
        DEEPSEEK,
        steps={"normalizer": {"type": "Sequence", "normalizers": []}},
        tokens={
            "bos_token": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
            "eos_token": "<\uff5cend\u2581of\u2581sentence\uff5c>",
        },
        normalized=True,
    ),
}


def cut_tokenizer(name: str) -> Tokenizer:
    cut = CUT[name]
    control = cut.control.split(" ")
    names = [token.removeprefix("!") for token in control]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    value = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": text, "special": token == text, **flags}
            | {"normalized": cut.normalized and token != text}
            for id, (token, text) in enumerate(zip(control, names, strict=True))
        ],
        "pre_tokenizer": pre_tokenizer(cut.patterns) if cut.patterns else None,
        "decoder": BYTES,
        **cut.steps,
        "model": byte_level_model(names) if cut.patterns else sentence_piece_model(names),
    }
    config = {"chat_template": cut.template, **cut.tokens}
    return Tokenizer.from_checkpoint(Checkpoint({}, {}, json.dumps(value), config))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def pre_tokenizer(patterns: list[str]) -> dict[str, Any]:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [split | {"pattern": {"Regex": pattern}} for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*steps, BYTES]}


def model(names: list[str], letters: list[str], merges: str, **options: Any) -> dict[str, Any]:
    pairs = [merge.split("+") for merge in merges.split()]
    tokens = dict.fromkeys([*names, *letters, *map("".join, pairs)])
    vocabulary = {token: id for id, token in enumerate(tokens)}
    return {"type": "BPE", "vocab": vocabulary, "merges": pairs, **options}


def byte_level_model(names: list[str]) -> dict[str, Any]:
    merges = "Ċ+Ċ Ġ+Ġ Ġ+t Ġt+h Ġth+e .+Ċ .+ĊĊ t+h th+e a+n Ġ+an Ġan+d >+Ċ 1+2"
    return model(names, sorted(pre_tokenizers.ByteLevel.alphabet()), merges)


def sentence_piece_model(names: list[str]) -> dict[str, Any]:
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    letters += ["▁", *map(chr, range(33, 127)), "\u4f60", "\u00e9"]
    merges = "▁+▁ ▁+t ▁t+h ▁th+e t+h th+e a+n ▁+an ▁an+d ▁+."
    return model(names, letters, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
