"""Rebuilds a GGUF file's SentencePiece BPE as tokenizer.json's model; reads no files.

GGUF stores the pieces and their scores; tokenizer.json needs merges. They are derived as in
transformers' `LlamaConverter`: a piece may be merged from any two others, highest scores first.
Bytes that do not occur in any piece become byte tokens, such as `<0x0A>`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_stream.config import Keys
from mlx_stream.errors import TokenizerError

SPACE = "\u2581"
NORMAL, BYTE = 1, 6
# The maximum number of characters in all pieces together; each may end the first half of a merge.
# The largest known vocabulary, Gemma's, has 1.9 million, and none of its pieces is longer than 93.
MOST_CHARACTERS = 2**22
LONGEST_PIECE = 128


def sentencepiece(keys: Keys, tokens: Sequence[str], kinds: np.ndarray) -> dict[str, Any]:
    """Return the parts of tokenizer.json that encode and decode text.

    Args:
        kinds: the kind of each token, in GGUF's numbering.

    Raises:
        TokenizerError: the scores do not fit, byte tokens are missing, or the pieces are too long.
    """
    if keys.flag("tokenizer.ggml.remove_extra_whitespaces"):
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.remove_extra_whitespaces is not supported"
        )
    prefix = keys.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}, spaces] if prefix else [spaces]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.tokens lacks byte tokens, <0x00> to <0xFF>"
        )
    unknown = keys.count("tokenizer.ggml.unknown_token_id", 0, least=0, most=len(tokens) - 1)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": make_merges(keys, tokens, vocabulary, kinds),
        },
    }


def make_merges(
    keys: Keys, tokens: Sequence[str], vocabulary: dict[str, int], kinds: np.ndarray
) -> list[list[str]]:
    """Return every way to make a piece from two others, highest-scoring pieces first."""
    scores = keys.value("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f":
        raise keys.wrong("tokenizer.ggml.scores", "an array of numbers")
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.scores must hold a finite number for each of the "
            f"{len(tokens)} tokens; it has {len(scores)} entries"
        )
    pieces = [
        (tokens[index], float(scores[index])) for index in np.flatnonzero(kinds == NORMAL).tolist()
    ]
    longest = max((len(piece) for piece, _ in pieces), default=0)
    if longest > LONGEST_PIECE or sum(len(piece) for piece, _ in pieces) > MOST_CHARACTERS:
        raise TokenizerError(
            f"{keys.where}: tokenizer.ggml.tokens has pieces of {longest} characters, or more than "
            f"{MOST_CHARACTERS} in all"
        )
    normal = {piece for piece, _ in pieces}
    merges: list[tuple[float, str, str]] = []
    for piece, score in pieces:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        made = [pair for pair in halves if pair[0] in normal and pair[1] in normal]
        made.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(score, left, right) for left, right in made]
    merges.sort(key=lambda merge: -merge[0])  # equal scores stay in vocabulary order
    return [[left, right] for _, left, right in merges]
