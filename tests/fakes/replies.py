"""Replies whose text is their ids: what is written can be compared id by id."""

from collections.abc import Collection, Generator, Sequence
from typing import cast

from mlx_stream.generate.draft_length import DraftLengthController
from mlx_stream.generate.draft_model import DraftModel
from mlx_stream.generate.model import Model
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import Coroutine, drive
from mlx_stream.generate.speculative import Speculator, Writer
from mlx_stream.generate.stats import Stats
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import Sampler
from mlx_stream.text.pieces import Piece, ReplyDecoder
from mlx_stream.text.tokenizer import StreamDecoder

FIRST = 0x4E00  # no id decodes to a character below this


class Eager(DraftLengthController):
    """A controller that chooses to verify every guess."""

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
    """Read a prompt and yield the ids written after it, as they are produced."""
    stats = Stats() if stats is None else stats
    for piece in write(write_reply(writer, prompt, sampler, limit, ends, reply_of_ids(), stats)):
        yield from ids_of(piece.text)


def writer_of(
    model: Model, guesses: bool = True, window: int = 120, draft: Model | None = None
) -> Writer:
    """Return a writer on a new stream; every guess, by n-grams or a draft model, is verified."""
    cache = model.new_cache(4, window, 7)
    if not guesses:
        return Writer(TokenStream(model, cache), cache)
    drafter = DraftModel(draft, cache, lambda: 0.0) if draft else None
    speculator = Speculator(Eager(), drafter)
    return Writer(TokenStream(model, cache, speculator.observers), cache, speculator)


def write(reply: Coroutine[Piece, Piece]) -> Generator[Piece, None, None]:
    """Drive a reply; yield its pieces, including the last."""
    yield (yield from drive(reply))
