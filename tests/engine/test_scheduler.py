"""The steps of a round: who shares one, how prompts divide its rows, and when sharing pays."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.engine.scheduler import (
    FEWEST_ROWS,
    LONGEST,
    PROBE_EVERY,
    Scheduler,
    divide,
    is_token,
)
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.shared_step import ROWS_MULTIPLE
from mlx_stream.models.window import SHARED_ROWS


class Machine:
    """A machine with a clock of its own: a step takes `fixed` and some time for each row."""

    def __init__(self, fixed: float, row: float, prompt_row: float = 0.0):
        self.now, self.fixed, self.row, self.prompt_row = 0.0, fixed, row, prompt_row
        self.scheduler = Scheduler(self.run_together, lambda: self.now)

    def run_together(self, requests: Sequence[ReadRequest]) -> list[ReadResult | Exception]:
        self.now += self.fixed
        return [self.read(request) for request in requests]

    def run(self, request: ReadRequest) -> ReadResult:
        self.now += self.fixed
        return self.read(request)

    def read(self, request: ReadRequest) -> ReadResult:
        count = min(len(request.ids), request.chunk)
        self.now += self.row if is_token(request) else count * self.prompt_row
        return ReadResult(count)

    def round(self, requests: list[ReadRequest]) -> tuple[int, float]:
        """Run a round; return the number of its steps, and how long it took."""
        started, steps = self.now, self.scheduler.schedule(requests)
        assert sorted(chain(*steps)) == [*range(len(requests))]
        for step in steps:
            self.scheduler.run([requests[at] for at in step])
        return len(steps), self.now - started

    def token(self) -> ReadRequest:
        return ReadRequest(cast(Any, self), (1,), Want.TOKEN)

    def prompt(self, count: int, settling: bool = False) -> ReadRequest:
        return ReadRequest(cast(Any, self), range(count), Want.LOGITS, settling=settling)


@pytest.mark.parametrize(("extra", "shared"), [(0.0, True), (2.5, True), (3.5, False)])
def test_steps_are_shared_where_that_is_faster(extra, shared):
    """A shared step of 4 saves 3 times the fixed time, and costs `extra`."""

    class Slower(Machine):
        def run_together(self, requests):
            self.now += extra
            return super().run_together(requests)

    machine = Slower(fixed=1, row=0.1)
    rounds = [machine.round([machine.token() for _ in range(4)])[0] for _ in range(PROBE_EVERY)]
    assert rounds.count(1 if shared else 4) >= PROBE_EVERY - 6
    assert {*rounds} == {1, 4}, "both were tried"


@given(st.floats(0.01, 2), st.floats(0, 0.5), st.floats(0.0005, 0.2), st.integers(1, 8))
def test_prompts_make_steps_as_long_as_a_few_of_tokens(fixed, row, prompt_row, replies):
    machine = Machine(fixed, row, prompt_row)
    tokens = [machine.token() for _ in range(replies)]
    plain = [machine.round([*tokens])[1] for _ in range(8)][-1]
    rounds = [[*tokens, machine.prompt(5_000), machine.prompt(300)] for _ in range(8)]
    steps, took = [machine.round(requests) for requests in rounds][-1]
    if steps == 1:
        rounded = ROWS_MULTIPLE / 2 * prompt_row
        longest = LONGEST * (fixed + replies * row) + rounded
        assert took <= max(longest, plain + FEWEST_ROWS * prompt_row) * 1.01
        assert took >= min(longest - 2 * rounded, plain + SHARED_ROWS * prompt_row) * 0.99


def test_nothing_is_tried_beside_prompts():
    machine = Machine(fixed=1, row=0.1, prompt_row=0.01)
    tokens = [machine.token() for _ in range(4)]
    for _ in range(8):
        machine.round(tokens)
    rounds = [machine.round([*tokens, machine.prompt(40)])[0] for _ in range(2 * PROBE_EVERY)]
    assert {*rounds} == {1}


@given(
    st.lists(st.tuples(st.integers(1, 400), st.booleans()), min_size=1, max_size=12),
    st.integers(8, SHARED_ROWS),
)
def test_rows_are_divided_among_prompts(prompts, rows):
    machine = Machine(1, 1)
    requests = [machine.prompt(*each) for each in prompts]
    divide(rows, requests)
    chunks, most = [r.chunk for r in requests], [min(128, len(r.ids)) for r in requests]
    assert all(1 <= chunk <= limit for chunk, limit in zip(chunks, most, strict=True))
    assert sum(chunks) <= rows + len(requests)  # each has at least one row
    for settling in (False, True):
        same = [r.chunk for r in requests if r.settling is settling]
        cut = [
            r.chunk for r in requests if r.settling is settling and r.chunk < min(128, len(r.ids))
        ]
        assert not cut or max(same) - min(cut) <= 1, "others have no more rows than one that is cut"
    if len({r.settling for r in requests}) == 1:
        assert sum(chunks) >= min(rows, sum(most)), "no row is left while one waits"


def test_the_example_in_the_docstring():
    machine = Machine(1, 1)
    requests = [machine.prompt(count) for count in (200, 10, 100)]
    divide(64, requests)
    assert [request.chunk for request in requests] == [27, 10, 27]


def test_settling_waits_for_prompts_and_does_not_starve():
    machine = Machine(1, 1)
    requests = [machine.prompt(1_000), machine.prompt(1_000, settling=True)]
    divide(64, requests)
    assert [request.chunk for request in requests] == [60, 4]


def test_an_error_of_a_stream_alone_is_its_result():
    class Broken(Machine):
        def run(self, request):
            raise RuntimeError("no memory")

    machine = Broken(1, 1)
    (found,) = machine.scheduler.run([machine.token()])
    assert str(found) == "no memory"
