"""Decides which reads share the next step; handles requests, not threads or sessions.

Every step includes the tokens of replies. Its other rows are divided among prompts and settling
streams. While replies are in progress, those rows are limited, so that a step takes about `LONGEST`
times as long as one without them.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.shared_step import ROWS_MULTIPLE, run_together
from mlx_stream.models.window import PREFILL_CHUNK, SHARED_ROWS

LONGEST = 2.85
FEWEST_ROWS = 8  # for prompts in each step, however long they take
SETTLING_SHARE = 16  # settling streams, with no caller waiting, get one row in this many
MEASURED = 25  # how many of the latest steps of a kind count
LEAST_MEASURED = 3  # the minimum; the first step of a kind may compile, so it never counts
PROBE_EVERY = 256  # rounds between measurements of whether sharing pays off

Results = list[ReadResult | Exception]


class StepTimes:
    """The measured durations of steps on this machine, in seconds."""

    def __init__(self) -> None:
        self._tokens: dict[int, deque[float]] = {}
        self._row: deque[float] = deque(maxlen=MEASURED)
        self._rounds: dict[int, int] = {}

    def record(self, replies: int, rows: int, seconds: float) -> None:
        """Learn from a step with one token from each of `replies` streams and `rows` other rows."""
        if not rows:
            if replies in self._tokens:
                self._tokens[replies].append(seconds)
            else:
                self._tokens[replies] = deque(maxlen=MEASURED)
            return
        base = self.of_tokens(replies) if replies else 0.0
        if base is not None:
            self._row.append(max(0.0, seconds - base) / rows)

    def of_tokens(self, replies: int) -> float | None:
        """Return how long a step with one token per reply takes, if that has been measured."""
        found = self._tokens.get(replies, ())
        return median(found) if len(found) >= LEAST_MEASURED else None

    def sharing_pays(self, replies: int, probe: bool) -> bool:
        """Return whether one step for all replies is faster than a separate step for each.

        Both are tried at first, and again from time to time, but only in rounds that may be used as
        a `probe`: those without prompts, which would make a round of separate steps take longest.
        """
        together, alone = self.of_tokens(replies), self.of_tokens(1)
        at = self._rounds.get(replies, 0) if probe else 0
        if probe:
            self._rounds[replies] = (at + 1) % PROBE_EVERY
        if alone is None or at == PROBE_EVERY - 1:
            return False
        if together is None or at == PROBE_EVERY // 2:
            return True
        return together < replies * alone

    def most_rows(self, replies: int) -> int:
        """Return how many prompt rows a step with tokens from `replies` streams may have.

        Together with the tokens, they are rounded to the nearest multiple of `ROWS_MULTIPLE`, to
        which steps are padded.
        """
        if not replies:
            return SHARED_ROWS
        base, row = self.of_tokens(replies), median(self._row) if self._row else 0.0
        most = (LONGEST - 1) * base / row if base and row else PREFILL_CHUNK // 4
        padded = round((most + replies) / ROWS_MULTIPLE) * ROWS_MULTIPLE
        return min(SHARED_ROWS, max(FEWEST_ROWS, padded - replies))


class Scheduler:
    """Form the steps of a round, and run them.

    Args:
        run, clock: replaced in tests.
    """

    def __init__(
        self,
        run: Callable[[Sequence[ReadRequest]], Results] = run_together,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._run, self._clock, self.times = run, clock, StepTimes()

    def schedule(self, requests: Sequence[ReadRequest]) -> list[list[int]]:
        """Return the steps of the next round, each as the indices of its requests.

        Each prompt's chunk is reduced to its share of a step's rows.
        """
        replies = [at for at, request in enumerate(requests) if is_token(request)]
        prompts = [at for at in range(len(requests)) if at not in replies]
        guessed = sum(len(requests[at].ids) - 1 for at in replies)
        rows = max(FEWEST_ROWS, self.times.most_rows(len(replies)) - guessed)
        divide(rows, [requests[at] for at in prompts])
        if len(replies) > 1 and not self.times.sharing_pays(len(replies), probe=not prompts):
            return [[at] for at in (*replies, *prompts)]
        return [[*replies, *prompts]] if requests else []

    def run(self, requests: Sequence[ReadRequest], measure: bool = True) -> Results:
        """Run a step; return the result or the error of each request.

        Args:
            measure: whether to learn from its duration.
        """
        started = self._clock()
        if len(requests) == 1:
            found: Results = [run_alone(requests[0])]
        else:
            found = self._run(requests)
        seconds = self._clock() - started
        read = [result.count for result in found if isinstance(result, ReadResult)]
        if (
            measure
            and len(read) == len(requests)
            and not any(r.want is Want.ROWS for r in requests)
        ):
            replies = sum(map(is_token, requests))
            self.times.record(replies, sum(read) - replies, seconds)
        return found


def run_alone(request: ReadRequest) -> ReadResult | Exception:
    try:
        return request.stream.run(request)
    except Exception as error:  # raised where the result is used
        return error


def is_token(request: ReadRequest) -> bool:
    """Return whether a reply is waiting for a request's next tokens."""
    return request.want in (Want.TOKEN, Want.ROWS)


def divide(rows: int, requests: Sequence[ReadRequest]) -> None:
    """Divide a step's rows among prompts; longer ones get the rows that short ones do not need.

    With 64 rows, prompts of 10, 100 and 200 ids get 10, 27 and 27.
    """
    settling = [request for request in requests if request.settling]
    prompts = [request for request in requests if not request.settling]
    kept = rows // SETTLING_SHARE if settling and prompts else 0
    rows = share_rows(rows - kept, prompts)
    share_rows(rows + kept, settling)


def share_rows(rows: int, requests: Sequence[ReadRequest]) -> int:
    """Reduce requests' chunks to equal shares of at least one row; return the rows left over."""
    waiting = sorted(requests, key=lambda request: len(request.ids))
    for at, request in enumerate(waiting):
        share = max(1, rows // (len(waiting) - at))
        request.chunk = min(request.chunk, share, len(request.ids))
        rows = max(0, rows - request.chunk)
    return rows
