"""Reads the next tokens of several streams in one step of their model; schedules nothing.

The rows of all streams go through each product together, which costs little more than the rows of
one stream, because the weights are read only once. Attention runs separately for each stream. The
results are what each stream would compute alone, up to the rounding of products with more rows.
"""

import time
from collections.abc import Sequence
from dataclasses import astuple
from itertools import accumulate

import mlx.core as mx

from mlx_stream import backend
from mlx_stream.cache.steps.batch import BatchStep
from mlx_stream.cache.steps.decode import DecodeStep
from mlx_stream.errors import WeightsError
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.token_stream import NOT_A_NUMBER, PlannedRead
from mlx_stream.sampling import as_int, choose_token

# A step with chunks is padded to a multiple of this many rows, so that there are few shapes.
ROWS_MULTIPLE = 4


def run_together(requests: Sequence[ReadRequest]) -> list[ReadResult | Exception]:
    """Read the ids of several requests in one step; return each one's result or error.

    The streams are distinct and share one model. An error in planning affects only its own stream.
    After an error in the step itself, the rows of all its streams are released, because they may
    hold anything.
    """
    started = time.perf_counter()
    found: dict[int, ReadResult | Exception] = {}
    planned: dict[int, PlannedRead] = {}
    for at, request in enumerate(requests):
        try:
            planned[at] = request.stream.plan(request)
        except Exception as error:  # the others do not depend on it
            found[at] = error
    try:
        if planned:
            results = compute([*planned.values()])
            found |= zip(planned, results, strict=True)
    except Exception as error:  # after any error, the rows may hold anything
        for read in planned.values():
            read.stream.fail()
        found |= dict.fromkeys(planned, error)
    seconds, shared = time.perf_counter() - started, len(planned) > 1
    for result in found.values():
        if isinstance(result, ReadResult):
            result.seconds, result.shared = seconds, shared
    return [found[at] for at in range(len(requests))]


def compute(planned: list[PlannedRead]) -> list[ReadResult | Exception]:
    """Compute and commit one step for several streams."""
    if backend.tracing()[True] and all(comes_again(read) for read in planned):
        return compute_traced(planned)
    tokens, padding = [id for read in planned for id in read.ids], 0
    if any(len(read.ids) > 1 for read in planned):
        padding = -len(tokens) % ROWS_MULTIPLE
    # Padded with an id of the step, so that the padding cannot introduce a new NaN.
    rows = mx.array([tokens + tokens[-1:] * padding], mx.int32)
    counts: list[int] = []  # how many of each read's last rows need logits
    asked: list[int] = []
    for read, end in zip(planned, accumulate(len(read.ids) for read in planned), strict=True):
        count = {Want.NOTHING: 0, Want.ROWS: len(read.ids)}.get(read.request.want, 1)
        counts.append(count if read.whole else 0)
        asked += range(end - counts[-1], end)
    network, steps = planned[0].stream.network, [read.step for read in planned]
    if asked:
        some = None if len(asked) == rows.size else mx.array(asked, mx.int32)
        hidden = network(rows, BatchStep(steps, padding), some)[0]
        parts = iter(mx.split(network.logits(hidden), [*accumulate(filter(None, counts))][:-1]))
        logits = [next(parts) if count else None for count in counts]
    else:
        hidden, logits = network.prefill(rows, BatchStep(steps, padding)), [None] * len(planned)
    del steps  # they hold references to the buffers
    chosen = [choose(read, part) for read, part in zip(planned, logits, strict=True)]
    commit(planned)
    # A chunk attends to the buffers as they were before its own rows were written. If the chunk
    # and the update were evaluated together, the buffers would be copied on Metal.
    mx.eval(hidden, logits, chosen)
    mx.eval([read.stream.cache.arrays() for read in planned])
    return [result_of(*each) for each in zip(planned, logits, chosen, strict=True)]


def compute_traced(planned: list[PlannedRead]) -> list[ReadResult | Exception]:
    """Compute and commit a traced step with one token per stream."""
    # Sort by kind, so that the same streams share a trace regardless of which one asked first.
    order = sorted(range(len(planned)), key=lambda at: kind_of(planned[at]))
    reads = [planned[at] for at in order]
    samplers = [read.request.sampler for read in reads if read.request.sampler]
    chosen = reads[0].stream.compiled_steps.decode_together(
        [read.step for read in reads],
        mx.array([[read.ids[0] for read in reads]], mx.int32),
        samplers,
        [read.penalized for read in reads],
    )
    commit(reads)
    mx.eval(chosen)
    results = dict(zip(order, map(result_of, reads, [None] * len(reads), chosen), strict=True))
    return [results[at] for at in range(len(planned))]


def comes_again(read: PlannedRead) -> bool:
    """Return whether a read is of one token with a full window, so the next is of the same kind.

    False if it also wants the logits: a traced step of several streams does not return them.
    """
    step, sampler = read.step, read.request.sampler
    if read.request.want is not Want.TOKEN or sampler is None or sampler.logprobs is not None:
        return False
    return isinstance(step, DecodeStep) and step.kind.steady


def kind_of(read: PlannedRead) -> tuple[object, ...]:
    """Return everything that a trace depends on, apart from the model, as a sortable key."""
    kind, sampler = read.step.kind, read.request.sampler
    mode = astuple(sampler.mode) if sampler else ()
    return kind.prefix_rows, kind.sinks, kind.spare, "mask" in read.step.arrays, mode


def choose(read: PlannedRead, logits: mx.array | None) -> tuple[mx.array, mx.array] | None:
    """Choose the next token after a read, if it asks for one, without evaluating it."""
    sampler = read.request.sampler
    if read.request.want is not Want.TOKEN or logits is None or sampler is None:
        return None
    return choose_token(
        sampler.mode, sampler.numbers, logits[0], sampler.random.key, read.penalized
    )


def commit(planned: list[PlannedRead]) -> None:
    """Commit every stream's step.

    Steps that read sinks come last: committing them computes the step, and a buffer is updated in
    place only if its own step no longer holds it.
    """
    for read in sorted(planned, key=lambda read: len(read.step.new_sinks)):
        read.commit()


def result_of(
    read: PlannedRead, logits: mx.array | None, chosen: tuple[mx.array, mx.array] | None
) -> ReadResult | Exception:
    """Return what a request asked for, taken from an evaluated step."""
    count, want = len(read.ids), read.request.want
    sampler = read.request.sampler
    if chosen is not None and sampler:
        sampler.random.key = chosen[1]
        row = logits[0] if logits is not None and sampler.logprobs is not None else None
        return ReadResult(count, logits=row, token=as_int(chosen[0]))
    if logits is None or want is Want.ROWS:
        return ReadResult(count, logits=logits)
    if not mx.isfinite(logits).all().item():
        read.stream.fail()
        return WeightsError(NOT_A_NUMBER)
    return ReadResult(count, logits=logits[0])
