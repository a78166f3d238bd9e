"""Texts for measurements, as token ids; independent of experiments."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_stream.errors import TextError
from mlx_stream.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """Concatenated texts, as int32 ids: four bytes per token, however long the texts are."""

    names: list[str]
    ids: np.ndarray

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify these tokens."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()[:16]

    def first(self, count: int) -> list[int]:
        return self.ids[:count].tolist()

    def around(self, start: int, stop: int) -> list[int]:
        """Return tokens `start` to `stop - 1` of the texts repeated over and over.

        With ids 7, 8, 9, tokens 2 to 5 are 9, 7, 8, 9.
        """
        return self.ids[np.arange(start, stop) % len(self.ids)].tolist()

    def require(self, tokens: int, option: str) -> None:
        """Raise TextError unless there are this many tokens, and one more to predict."""
        if len(self.ids) <= tokens:
            raise TextError(
                f"{', '.join(self.names)}: {len(self.ids):,} tokens, but "
                f"{tokens + 1:,} are needed: use a longer text, or a smaller {option}"
            )


def encode(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> Corpus:
    """Encode (name, text) pairs as they are, with no template and nothing between them."""
    encoded = [np.array(tokenizer.encode(text), np.int32) for _, text in texts]
    return Corpus([name for name, _ in texts], np.concatenate(encoded))
