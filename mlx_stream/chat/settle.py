"""Makes a stream match the template's rendering; handles ids and turns, not text.

Every operation (the end of a reply, retry, undo, edit, clear, resume) does this in the same way: it
rolls the stream back to the common prefix of the ids it holds and the ids it must hold, and reads
the rest. If part of that prefix has left the ring, the ring is emptied and the newest turns that
fit are reread.
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
        left: how many of the last wanted ids must be reread in any case.

    Returns:
        False, with nothing changed, if part of the common prefix has left the ring, although the
        wanted ids fit in the window or must be reread.
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
    """Return the newest turns that fit in a window (at least one), moved to start at `first`."""
    fitting: list[PlacedTurn] = []
    for turn in reversed(turns):
        closing = fitting[-1].exchange.closing_ids if fitting else ()
        window -= len(turn.exchange.ids) + len(closing)
        if window < 0 and fitting:
            break
        fitting.append(turn)
    return place_turns(fitting[::-1], first)
