"""Makes a stream hold what the template renders; handles ids and turns, not text.

Every operation (the end of a reply, retry, undo, edit, clear, resume) does this in the same way: it
takes the stream back to the common prefix of the ids it holds and the ids it must hold, and reads
the rest. If that prefix is no longer whole in the ring, the ring is emptied and the newest turns
that fit are read again.
"""

from collections.abc import Sequence

from mlx_stream.chat.exchange import PlacedTurn, place_turns
from mlx_stream.generate.speculative import Writer


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def take_back(writer: Writer, start: int, wanted: Sequence[int], left: int = 0) -> bool:
    """Roll a stream back to the common prefix of its ids from `start` on and the `wanted` ids.

    A call after an interrupt finishes the work; nothing is done twice.

    Args:
        left: how many of the last wanted ids must be read again in any case.

    Returns:
        False, with nothing changed, if the common prefix is not whole in the ring although the
        wanted ids fit the window or must be read again.
    """
    tokens, cache = writer.tokens, writer.cache
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


def empty_ring(writer: Writer) -> None:
    """Evict the whole ring, and make the observers forget it."""
    cache = writer.cache
    cache.evict(max(0, cache.length - cache.oldest))
    writer.tokens.ids.restart_observers()


def place_again(turns: Sequence[PlacedTurn], first: int, window: int) -> tuple[PlacedTurn, ...]:
    """Return the newest turns that fit a window (at least one), repositioned from `first` on."""
    fitting: list[PlacedTurn] = []
    for turn in reversed(turns):
        closing = fitting[-1].exchange.closing_ids if fitting else ()
        window -= len(turn.exchange.ids) + len(closing)
        if window < 0 and fitting:
            break
        fitting.append(turn)
    return place_turns(fitting[::-1], first)
