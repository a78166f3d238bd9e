"""Decides how many tokens are worth guessing, based on past accuracy and measured step costs.

A step of several rows usually costs little more than a step of one, because both read all the
weights. How much more depends on the chip, the bits and the window, so it is measured while the
stream runs.
"""

import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# Guesses are grouped by how many ids before them matched.
MATCHES = (2, 3, 4, 6, 9, 16)
FIRST_CHANCES = (0.2, 0.25, 0.4, 0.6, 0.75, 0.85, 0.9)
FIRST_WEIGHT = 4.0
FORGETTING = 0.97  # the decay per judgement: about the last 30 count

MEASURED = 9  # how many of the latest steps of each length are kept
FIRST_MEASURED = 2  # the minimum number for a median; the first step of a length is never counted
ASSUMED = 0.04  # cost of one more row, relative to a step of one token, until it is measured
GAIN = 1.03  # smallest speed-up over one token at a time that is worth guessing for
LOOK_AGAIN = 256  # number of one-token steps after which guessing is tried again


@dataclass
class AcceptanceRate:
    """The share of guesses that were right, with exponential decay."""

    right: float
    all: float

    def add(self, right: bool) -> None:
        self.right = self.right * FORGETTING + right
        self.all = self.all * FORGETTING + 1

    @property
    def share(self) -> float:
        return self.right / self.all


class DraftLengthController:
    """Choose how many tokens a step verifies."""

    def __init__(self) -> None:
        self._chances = [AcceptanceRate(FIRST_WEIGHT * p, FIRST_WEIGHT) for p in FIRST_CHANCES]
        self._seconds: dict[int, deque[float]] = {}
        self._plain = 0  # number of one-token steps since the last longer step

    def chance(self, matched: int) -> float:
        """Return the probability that a guess is right after `matched` matching ids."""
        return self._chances[bisect_right(MATCHES, matched)].share

    def judge(self, matched: int, guessed: Sequence[int], chosen: Sequence[int]) -> None:
        """Learn from the ids that were chosen, whether or not the guess was verified."""
        for ahead, (guess, choice) in enumerate(zip(guessed, chosen, strict=False)):
            self._chances[bisect_right(MATCHES, matched + ahead)].add(guess == choice)
            if guess != choice:
                return

    def record_step(self, rows: int, seconds: float) -> None:
        """Learn from the duration of a step of `rows` tokens."""
        self._plain = self._plain + 1 if rows == 1 else 0
        if rows in self._seconds:
            self._seconds[rows].append(seconds)
        else:  # the first step may compile, so it is not counted
            self._seconds[rows] = deque(maxlen=MEASURED)

    def cost(self, rows: int) -> float:
        """Return the cost of a step of `rows` tokens, relative to a step of one token.

        A length that has not been measured is estimated from the next shorter one that has.
        """
        one = self._median(1)
        if one is None:
            return 1.0 + ASSUMED * (rows - 1)
        cost = 1.0
        for count in range(2, rows + 1):
            median = self._median(count)
            cost = cost + ASSUMED if median is None else median / one
        return cost

    def in_steps(self, seconds: float) -> float:
        """Convert seconds to a number of one-token steps."""
        return seconds / (self._median(1) or max(seconds, 1e-9))

    def choose(self, chances: Sequence[float], each: float = 0.0) -> int:
        """Return how many of the guesses to verify; 0 if guessing does not pay off.

        Args:
            chances: the probability of each guess, given that those before it are right.
            each: the cost of making one guess, relative to a step of one token.
        """
        best, choice, expected, likely = 0.0, 0, 1.0, 1.0
        for count, chance in enumerate(chances, 1):
            likely *= chance
            expected += likely
            rate = expected / (self.cost(count + 1) + count * each)
            if rate > best:
                best, choice = rate, count
        if best >= GAIN:
            return choice
        # Costs vary with heat and other programs' load, so try again now and then.
        return choice if self._plain >= LOOK_AGAIN else 0

    def _median(self, rows: int) -> float | None:
        seconds = self._seconds.get(rows, ())
        return statistics.median(seconds) if len(seconds) >= FIRST_MEASURED else None
