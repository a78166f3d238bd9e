"""How a stream comes to hold what the template renders; knows ids and turns, no text.

Every operation (the end of a reply, retry, undo, edit, clear, resume) leads from what the stream
holds to what it must hold in one way: take back to the ids both begin with, and read the rest. If
these are no longer whole in the ring, it is emptied and the newest turns that fit are read again.
"""

from collections.abc import Sequence
from dataclasses import replace

from mlx_stream.cache import StreamCache
from mlx_stream.chat.exchange import PlacedTurn
from mlx_stream.generate.token_stream import TokenStream


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def take_back(
    tokens: TokenStream, cache: StreamCache, start: int, wanted: Sequence[int], left: int = 0
) -> bool:
    """Take a stream back to what it has in common with the ids it must hold from `start` on.

    An interrupt in here is made good by the next call: nothing is done twice.

    Args:
        left: how many of the last of `wanted` must be read again anyhow.

    Returns:
        False if what they have in common is no longer whole, though all of `wanted` fits the
        window or has to be read from; then nothing has changed.
    """
    lowest = start
    if cache.position.floor > max(start, cache.geometry.sinks):
        lowest = cache.position.floor
        if left or len(wanted) <= cache.geometry.window:
            return False
    held, wanted = tokens.ids.since(lowest), wanted[lowest - start : len(wanted) - left]
    count = len(held) - common_prefix(held, wanted)
    if count > cache.rewindable:
        return False
    tokens.rewind(count)
    return True


def empty_ring(tokens: TokenStream, cache: StreamCache) -> None:
    """Evict all of the ring for good: neither a state nor a guess may hold it any more."""
    cache.evict(max(0, cache.length - cache.oldest))
    tokens.ids.restart_observers()


def place_again(
    tokens: TokenStream, cache: StreamCache, turns: Sequence[PlacedTurn], pinned: int
) -> tuple[PlacedTurn, ...]:
    """Empty the ring; return the newest of some turns that fit it, where they are to be read.

    The last one is among them, even if it does not fit.

    Args:
        pinned: how many ids come before any turn.
    """
    empty_ring(tokens, cache)
    first, room, chosen = max(cache.length, pinned), cache.geometry.window, len(turns)
    for at in range(len(turns) - 1, -1, -1):
        closing = turns[at + 1].exchange.closing_ids if chosen < len(turns) else ()
        room -= len(turns[at].exchange.ids) + len(closing)
        if room < 0 and chosen < len(turns):
            break
        chosen = at
    placed: list[PlacedTurn] = []
    for turn in turns[chosen:]:
        start = placed[-1].end + len(turn.exchange.closing_ids) if placed else first
        placed.append(replace(turn, start=start))
    return tuple(placed)
