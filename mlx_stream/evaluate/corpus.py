"""Texts to measure on, as token ids; knows no experiment."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_stream.errors import TextError
from mlx_stream.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """Texts one after another, as ids: int32, four bytes a token however long they are."""

    names: list[str]
    ids: np.ndarray

    @property
    def digest(self) -> str:
        """What tells these tokens from others: 16 hexadecimal digits."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()[:16]

    def first(self, count: int) -> list[int]:
        return self.ids[:count].tolist()

    def around(self, start: int, stop: int) -> list[int]:
        """Return tokens `start` to `stop - 1` of the texts read over and over again.

        With ids 7, 8, 9, tokens 2 to 5 are 9, 7, 8, 9.
        """
        return self.ids[np.arange(start, stop) % len(self.ids)].tolist()


def encode(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> Corpus:
    """Encode (name, text) pairs as they are: no template, nothing between them."""
    encoded = [np.array(tokenizer.encode(text), np.int32) for _, text in texts]
    return Corpus([name for name, _ in texts], np.concatenate(encoded))


def segments_of(text: Corpus, tokens: int, segment: int) -> int:
    """Return how many whole segments the first `tokens` tokens make.

    Raises:
        TextError: not one: its last token must have a next one to predict.
    """
    found = len(text.ids)
    count = min(tokens, found - 1) // segment
    if tokens < segment:
        raise TextError(
            f"{tokens:,} tokens do not make a segment of {segment:,}: read more of the text "
            "(--tokens, or tokens= of a cache), or choose a smaller --segment"
        )
    if count < 1:
        raise TextError(
            f"{', '.join(text.names)}: {found:,} tokens do not make a segment of {segment:,} and "
            "one to predict: give a longer text, or a smaller --segment"
        )
    return count
