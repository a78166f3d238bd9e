"""How many tokens are worth guessing: what was right before, and what several rows cost here.

Nothing about a machine is assumed for long: seconds are measured as the stream goes. That one row
costs nearly as much as several is the rule where weights are read for both; how nearly depends on
the chip, the bits and the window.
"""

import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# How many ids before a guess agreed: guesses are judged apart by it.
MATCHES = (2, 3, 4, 6, 9, 16)
FIRST_CHANCES = (0.2, 0.25, 0.4, 0.6, 0.75, 0.85, 0.9)
FIRST_WEIGHT = 4.0
FORGETTING = 0.97  # of each judgement, at the next: the last 30 or so count

MEASURED = 9  # steps of each length
FIRST_MEASURED = 2  # before these, and the first of all, a length has no median
ASSUMED = 0.04  # what a row adds to a step of one, until it was measured
GAIN = 1.03  # tokens per second against one at a time, to be worth it
LOOK_AGAIN = 256  # steps of one token


@dataclass
class AcceptanceRate:
    """How often guesses of a kind were right, old ones forgotten."""

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
        self._skipped: set[int] = set()
        self._plain = 0  # steps of one token since several were last read

    def chance(self, matched: int) -> float:
        """Return how likely a guess is right, of which `matched` ids before agree."""
        return self._chances[bisect_right(MATCHES, matched)].share

    def judge(self, matched: int, guessed: Sequence[int], chosen: Sequence[int]) -> None:
        """Learn from what was chosen, whether or not the guess was verified."""
        for ahead, (guess, choice) in enumerate(zip(guessed, chosen, strict=False)):
            self._chances[bisect_right(MATCHES, matched + ahead)].add(guess == choice)
            if guess != choice:
                return

    def record_step(self, rows: int, seconds: float) -> None:
        """Learn what a step of `rows` tokens took."""
        self._plain = self._plain + 1 if rows == 1 else 0
        if rows not in self._skipped:  # the first of a kind makes what later ones reuse
            self._skipped.add(rows)
            return
        self._seconds.setdefault(rows, deque(maxlen=MEASURED)).append(seconds)

    def cost(self, rows: int) -> float:
        """Return the seconds a step of `rows` tokens takes, in steps of one token.

        What was not measured is taken from the next shorter step that was.
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
        """Return seconds in steps of one token."""
        return seconds / (self._median(1) or max(seconds, 1e-9))

    def choose(self, chances: Sequence[float], each: float = 0.0) -> int:
        """Return how many of the guesses to verify, 0 if it would not pay.

        Args:
            chances: of each guess to be right if those before it are.
            each: what making one guess costs, in steps of one token.
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
        # Costs change (heat, other programs), and so does what is not tried.
        return choice if self._plain >= LOOK_AGAIN else 0

    def _median(self, rows: int) -> float | None:
        seconds = self._seconds.get(rows, ())
        return statistics.median(seconds) if len(seconds) >= FIRST_MEASURED else None
