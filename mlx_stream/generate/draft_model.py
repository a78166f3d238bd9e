"""Guesses with a second, smaller model that reads the same stream."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

import mlx.core as mx

from mlx_stream.cache import StreamCache
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.draft_length import AcceptanceRate
from mlx_stream.generate.model import Model, check_memory
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import as_int

MOST_WAITING = 512  # how many ids may be left unread until the next guess
FIRST_CHANCE = AcceptanceRate(right=2.4, all=4.0)
MEASURED = 9
SPARE = 8  # rows for ids that were read for guessing and may be rolled back


class DraftModel:
    """A model with its own stream, kept in step with another stream as its observer.

    Args:
        model: has the same vocabulary; see `check_draft`.
        followed: the cache of the stream to follow. The draft's window is the same size, or as
            large as its trained context allows.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        model: Model,
        followed: StreamCache,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.model, self.clock = model, clock
        trained = model.config.max_position_embeddings
        self._sinks = min(followed.geometry.sinks, trained // 2)
        self._window = min(followed.geometry.window, trained - self._sinks)
        self.stream = self._new_stream()
        self._chance = AcceptanceRate(FIRST_CHANCE.right, FIRST_CHANCE.all)
        self._seconds: deque[float] = deque(maxlen=MEASURED)
        self._waiting: list[int] = []  # ids that have not been read yet
        self._ahead: list[int] = []  # ids read for guessing, but not yet by the followed stream

    @property
    def chance(self) -> float:
        """The probability that a guess is right, given that those before it are."""
        return self._chance.share

    @property
    def seconds(self) -> float:
        """The time that one guess takes."""
        return median(self._seconds) if self._seconds else 0.0

    def read(self, ids: Sequence[int]) -> None:
        agreed = 0
        while agreed < min(len(ids), len(self._ahead)) and ids[agreed] == self._ahead[agreed]:
            agreed += 1
        del self._ahead[:agreed]
        if agreed < len(ids):
            self._roll_back()
            self._waiting.extend(ids[agreed:])
        if len(self._waiting) > MOST_WAITING:
            self.stream.read(self._waiting)
            self._waiting = []

    def rewind(self, count: int) -> None:
        self._roll_back()
        waiting = min(count, len(self._waiting))
        del self._waiting[len(self._waiting) - waiting :]
        self.stream.rewind(min(count - waiting, self.stream.cache.rewindable))

    def restart(self, ids: Sequence[int]) -> None:
        self.stream = self._new_stream()
        self._ahead, self._waiting = [], [*ids]

    def erase(self) -> None:
        self._roll_back()
        self.stream.erase()

    def draft(self, next: int, count: int) -> Sequence[int]:
        """Guess `count` ids after `next`, greedily; `next` has not been read yet."""
        self._roll_back()
        new, guessed = [*self._waiting, next], []
        self._waiting = []
        for _ in range(count):
            started = self.clock()
            guessed.append(as_int(mx.argmax(self.stream.read(new))))
            if len(new) == 1:
                self._seconds.append(self.clock() - started)
            self._ahead.append(new[-1])
            new = guessed[-1:]
        return guessed

    def judge(self, guessed: Sequence[int], chosen: Sequence[int]) -> None:
        """Learn from the ids that were chosen."""
        for guess, choice in zip(guessed, chosen, strict=False):
            self._chance.add(guess == choice)
            if guess != choice:
                return

    def _roll_back(self) -> None:
        self.stream.rewind(len(self._ahead))
        self._ahead = []

    def _new_stream(self) -> TokenStream:
        return TokenStream(self.model, self.model.new_cache(self._sinks, self._window, SPARE))


def check_draft(model: Model, draft: Model) -> None:
    """Check that one model can guess for another.

    Raises:
        ValueRefused: their vocabularies differ.
        MemoryRefused: the weights of both exceed the device's budget.
    """
    sizes = [m.config.vocab_size for m in (model, draft)]
    if sizes[0] != sizes[1] or model.tokenizer.vocabulary() != draft.tokenizer.vocabulary():
        raise ValueRefused(
            f"`draft` {draft.name} does not have the same vocabulary as {model.name} "
            f"({sizes[1]:,} and "
            f"{sizes[0]:,} tokens): use a smaller model of the same family"
        )
    if not model.force:
        check_memory(model.weight_bytes + draft.weight_bytes, 0)
