"""Replies whose text is their ids: what is written can be compared id by id."""

from collections.abc import Collection, Generator, Sequence
from typing import cast

from mlx_stream.generate.draft_length import DraftLengthController
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import Coroutine, drive
from mlx_stream.generate.speculative import Writer
from mlx_stream.generate.stats import Stats
from mlx_stream.sampling import Sampler
from mlx_stream.text.pieces import Piece, ReplyDecoder
from mlx_stream.text.tokenizer import StreamDecoder

FIRST = 0x4E00  # no letter below it is any id's


class Eager(DraftLengthController):
    """Has whatever is guessed verified."""

    def choose(self, chances: Sequence[float], each: float = 0.0) -> int:
        return len(chances)


class IdDecoder:
    """Decode each id to one letter."""

    def add(self, token: int) -> str:
        return chr(FIRST + token)

    def flush(self) -> str:
        return ""


def letters_of(ids: Sequence[int]) -> str:
    return "".join(chr(FIRST + id) for id in ids)


def ids_of(text: str) -> list[int]:
    return [ord(letter) - FIRST for letter in text]


def reply_of_ids(stop: Sequence[str] = ()) -> ReplyDecoder:
    return ReplyDecoder(cast(StreamDecoder, IdDecoder()), stop)


def write_ids(
    writer: Writer,
    prompt: Sequence[int],
    sampler: Sampler,
    limit: int,
    ends: Collection[int] = (),
    stats: Stats | None = None,
) -> Generator[int, None, None]:
    """Read a prompt and yield the ids written after it, as they are given."""
    stats = Stats() if stats is None else stats
    for piece in write(write_reply(writer, prompt, sampler, limit, ends, reply_of_ids(), stats)):
        yield from ids_of(piece.text)


def write(reply: Coroutine[Piece, Piece]) -> Generator[Piece, None, None]:
    """Drive a reply; yield its pieces, the last one too."""
    yield (yield from drive(reply))
