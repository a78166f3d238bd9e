"""A GGUF's tokenizer is the original's: same words, same ids, same text back."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.errors import TokenizerError
from tests.fakes.gguf_files import CONTROL, MERGES, TEMPLATE, TOKENS, TYPES, refused, write_tiny

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
    """The same tokenizer through the library's own classes, with the original's settings."""
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
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps[pre])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
def test_tokenizer_splits_as_the_original(path: Path, pre: str):
    write_tiny(path, keys={"tokenizer.ggml.pre": pre})
    tokenizer = Tokenizer.from_str(read_gguf(path).tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert ids == reference(pre).encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.decode(ids) == TEXT.replace("<|im_end|>", "")
    assert [tokenizer.id_to_token(index) for index in range(len(TOKENS))] == TOKENS
    assert (TOKENS.index("12") in ids) == (pre != "smollm")
    assert (TOKENS.index("123") in ids) == (pre != "smollm")
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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model 'llama' is not supported (supported: 'gpt2'"),
        ({"pre": "qwen2"}, "'qwen2' is not supported (supported: smollm, llama-bpe"),
        ({"pre": None}, "tokenizer.ggml.pre '' is not supported"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "tokens must be an array of strings"),
        ({"tokens": [*TOKENS, "a", "b"]}, "for an embedding of"),
        ({"tokens": [*TOKENS[:-1], "the"]}, "'the' occurs twice"),
        ({"token_type": None}, "no tokenizer.ggml.token_type"),
        ({"token_type": TYPES[:-1]}, "token_type has"),
        ({"token_type": TOKENS}, "token_type must be"),
        ({"token_type": [0, *TYPES[1:]]}, "unknown kind 0"),
        ({"merges": ["th"]}, "'th' is not two tokens"),
        ({"merges": ["t h e"]}, "'t h e' is not two tokens"),
        ({"merges": ["t nothing"]}, "'nothing', which is not in the vocabulary"),
        ({"merges": ["e h"]}, "'eh', which is not in the vocabulary"),
        ({"merges": 3}, "merges must be an array of strings"),
        ({"bos_token_id": len(TOKENS)}, "is not one of the"),
        ({"add_bos_token": True, "bos_token_id": None}, "no tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false"),
        ({"tokens": ["", *TOKENS[1:]]}, "token 0 is special and empty"),
    ],
)
def test_bad_tokenizers_are_refused(path: Path, keys: dict[str, Any], message: str):
    write_tiny(path, keys={f"tokenizer.ggml.{name}": value for name, value in keys.items()})
    assert message in refused(path, TokenizerError)


def test_a_chat_template_that_is_no_text_is_refused(path: Path):
    write_tiny(path, keys={"tokenizer.chat_template": 3})
    assert "tokenizer.chat_template must be text" in refused(path, TokenizerError)
