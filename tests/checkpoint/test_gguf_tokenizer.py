"""A GGUF's tokenizer is the original's: same words, same ids, same text back."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.errors import TokenizerError
from tests.fakes.gguf_files import (
    CONTROL,
    MERGES,
    PIECES,
    SENTENCEPIECE,
    TEMPLATE,
    TOKENS,
    refused,
    write_tiny,
)

TEXT = "The  theory: in the year 1234, 'they'll hello hello-hello\n\nhello"
TEXT += "\n\n\tÉté, 東京 🙂 <|im_end|><tool>12"
LLAMA3_SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def reference(pre: str) -> Tokenizer:
    """Build the same tokenizer with the library's own classes and the original's settings."""
    pairs: list[tuple[str, str]] = [(a, b) for a, b in (merge.split(" ") for merge in MERGES)]
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    whole = pre == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole))
    steps = {
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "qwen2": [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps[pre])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2", "qwen2"])
def test_tokenizer_splits_as_the_original(path: Path, pre: str):
    write_tiny(path, keys={"tokenizer.ggml.pre": pre})
    tokenizer = Tokenizer.from_str(read_gguf(path).tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert ids == reference(pre).encode(TEXT, add_special_tokens=False).ids
    composed = [
        t.encode("e\u0301", add_special_tokens=False).ids for t in (tokenizer, reference(pre))
    ]
    assert composed[0] == composed[1]
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.decode(ids) == TEXT.replace("<|im_end|>", "")
    assert [tokenizer.id_to_token(index) for index in range(len(TOKENS))] == TOKENS
    assert (TOKENS.index("12") in ids) == (pre not in ("smollm", "qwen2"))
    assert (TOKENS.index("123") in ids) == (pre not in ("smollm", "qwen2"))
    assert (TOKENS.index("hello") in ids) == (pre == "llama-bpe")
    assert ids.count(2) == 1 and ids.count(TOKENS.index("<tool>")) == 1


def test_beginning_and_end_of_a_text(path: Path):
    def ids(**keys: Any) -> list[int]:
        write_tiny(path, keys={f"tokenizer.ggml.{name}": value for name, value in keys.items()})
        return Tokenizer.from_str(read_gguf(path).tokenizer).encode("th").ids

    th = TOKENS.index("th")
    assert ids(pre="smollm") == [th]
    assert ids(pre="smollm", add_bos_token=True) == [1, th]
    assert ids(pre="llama-bpe") == [1, th]
    assert ids(pre="llama-bpe", add_bos_token=False) == [th]
    assert ids(pre="llama-bpe", add_eos_token=True) == [1, th, 2]


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_transformers_loads_it_with_the_same_ids(path: Path, pre: str):
    transformers = pytest.importorskip("transformers")
    write_tiny(path, keys={"tokenizer.ggml.pre": pre})
    checkpoint = read_gguf(path)
    file = path.with_name("tokenizer.json")
    file.write_text(checkpoint.tokenizer, encoding="utf-8")
    config = dict(checkpoint.tokenizer_config)
    theirs = getattr(transformers, config.pop("tokenizer_class"))(
        tokenizer_file=str(file), **config
    )
    assert theirs(TEXT).input_ids == Tokenizer.from_str(checkpoint.tokenizer).encode(TEXT).ids
    assert theirs.eos_token_id == 2 and theirs.bos_token_id == 1
    turn = [{"role": "user", "content": "the"}]
    assert theirs.apply_chat_template(turn, tokenize=False) == "<|im_start|>the<|im_end|>"


def test_tokenizer_config(path: Path):
    keys = {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2}
    write_tiny(path, keys=keys)
    assert read_gguf(path).tokenizer_config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }


# --- SentencePiece ---


def sentencepiece_reference(prefix: bool) -> Tokenizer:
    """Build a tokenizer from these pieces with the library's classes, as `LlamaConverter` does."""
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    # In score order: `he` before `th`, regardless of the pieces' ids.
    merges = [("h", "e"), ("▁", "t"), ("t", "h"), ("th", "e"), ("t", "he"), ("▁t", "he")]
    merges += [("▁", "the"), ("▁", "▁"), ("▁", "▁▁"), ("▁▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    first = [normalizers.Prepend("▁")] if prefix else []
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])  # pyright: ignore
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


SAMPLES = [
    "the",
    " the",
    "  the  e",
    "",
    "the</s>the <tool> the",
    "Été\n🙂\0",
    "<0x0A>",
    "t h e the",
]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_encodes_as_the_original(path: Path, prefix: bool):
    write_tiny(path, keys={**SENTENCEPIECE, "tokenizer.ggml.add_space_prefix": prefix})
    tokenizer = Tokenizer.from_str(read_gguf(path).tokenizer)
    reference = sentencepiece_reference(prefix)
    for text in SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False).ids, text
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert decoded == reference.decode(ids, skip_special_tokens=False), text
        assert tokenizer.encode(text).ids == [1, *ids]
    the, bare = PIECES.index("▁the"), PIECES.index("the")
    assert tokenizer.encode("the").ids == [1, the if prefix else bare]
    assert PIECES.index("<0xC3>") in tokenizer.encode("É").ids
    assert read_gguf(path).tokenizer_config["add_bos_token"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"scores": None}, "scores is missing"),
    ({"scores": [0.0]}, "has 1 entries"),
    ({"scores": [float("nan")] * len(PIECES)}, "a finite number for each"),
    ({"scores": PIECES}, "scores must be an array of numbers"),
    ({"tokens": [*PIECES[:-1], "x" * 129]}, "pieces of 129 characters"),
    ({"tokens": [*PIECES[:3], "x", *PIECES[4:]]}, "lacks byte tokens"),
    ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is not supported"),
    ({"unknown_token_id": len(PIECES)}, "unknown_token_id"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG, ids=[message for _, message in WRONG])
def test_pieces_that_do_not_fit_are_refused(path: Path, keys: dict[str, Any], message: str):
    changes = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    write_tiny(path, keys=SENTENCEPIECE | changes)
    assert message in refused(path, TokenizerError)
