"""Single-token steps, from one id to the next, traced once by `mx.compile` and reused.

Everything that changes between steps is an array argument, so no step is traced twice. The weights
are captured. Traces belong to a model: they keep its weights alive, and all its streams share them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_stream.cache import Step
from mlx_stream.cache.steps.batch import BatchStep
from mlx_stream.cache.steps.decode import DecodeKind, DecodeStep
from mlx_stream.models.layers import CausalLM
from mlx_stream.sampling import PenalizedIds, Sampler, SamplingMode, choose_token

# How many traces a model keeps: enough for a few step sizes, windows and sampling modes.
MOST_TRACES = 64
# The set of streams that share a step changes as replies start and end, so a set is traced only
# after it has occurred this many times, and fewer traces are kept.
TRACED_AFTER = 16
MOST_SHARED_TRACES = 16


# What steps of one kind have in common: the kind, the sampling mode, and whether they have a mask.
Traced = tuple[DecodeKind, SamplingMode | None, bool]


@dataclass(frozen=True)
class DecodeOutput:
    """The result of a single-token step; nothing has been evaluated yet.

    Attributes:
        hidden: (1, 1, hidden size), normalized.
        logits: (vocabulary,) after the token.
        token: the next token, a scalar; None without a sampler.
        key: the next random key; None without a sampler.
    """

    hidden: mx.array
    logits: mx.array
    token: mx.array | None = None
    key: mx.array | None = None


class CompiledSteps:
    """The traced steps of one model.

    Attributes:
        count: the number of traces made.
    """

    def __init__(self, network: CausalLM):
        self.network = network
        self.count = 0
        self._kept: dict[Traced, Callable[..., Any]] = {}
        self._shared: dict[tuple[Traced, ...], Callable[..., Any]] = {}  # most recently used last
        self._seen: Counter[tuple[Traced, ...]] = Counter()

    def decode(
        self,
        step: Step,
        tokens: mx.array,
        tracing: tuple[bool, bool],
        sampler: Sampler | None = None,
        key: mx.array | None = None,
        penalized: PenalizedIds | None = None,
    ) -> DecodeOutput:
        """Compute a single-token step, traced if a step of its kind will recur.

        Args:
            tokens: the token's id, (1, 1) uint32.
            tracing: whether to trace kinds that recur a few times, and kinds that recur
                indefinitely; see `backend.tracing`.
            sampler, key: the sampler that chooses the next token, and its random key.
            penalized: the ids that the sampler's penalty applies to, if it has one.
        """
        mode, numbers = (sampler.mode, sampler.numbers) if sampler else (None, {})
        ids = [] if penalized is None else [penalized.ids, penalized.attended]
        if isinstance(step, DecodeStep) and not step.is_sink and tracing[step.kind.steady]:
            fixed = (step.kind, mode, "mask" in step.arrays)
            traced = self._kept.get(fixed) or self._trace(fixed)
            *found, keys, values = traced(tokens, step.arrays, numbers, key, ids)
            step.finish(keys, values)
        else:
            found = decode_token(self.network, step, tokens, mode, numbers, key, ids)
        hidden, logits, chosen = found
        return DecodeOutput(hidden, logits, *chosen)

    def decode_together(
        self,
        steps: Sequence[DecodeStep],
        tokens: mx.array,
        samplers: Sequence[Sampler],
        penalized: Sequence[PenalizedIds | None],
    ) -> list[tuple[mx.array, mx.array]]:
        """Compute one token for each of several streams; return each stream's next token and key.

        The step is traced once such a set of streams has occurred a few times.

        Args:
            steps: one per stream; their windows are full, so the same kinds of step recur.
            tokens: their ids, (1, T) int32.
            samplers, penalized: one per stream, as in `decode`.
        """
        fixed = tuple(
            (step.kind, sampler.mode, "mask" in step.arrays)
            for step, sampler in zip(steps, samplers, strict=True)
        )
        choices = [
            (sampler.numbers, sampler.random.key, [] if some is None else [some.ids, some.attended])
            for sampler, some in zip(samplers, penalized, strict=True)
        ]
        compute = self._shared_function(fixed)
        chosen, keys, values = compute(tokens, [step.arrays for step in steps], choices)
        for step, *rows in zip(steps, keys, values, strict=True):
            step.finish(*rows)
        return chosen

    def _trace(self, fixed: Traced) -> Callable[..., Any]:
        while len(self._kept) >= MOST_TRACES:
            del self._kept[next(iter(self._kept))]
        traced = self._kept[fixed] = mx.compile(self._function(*fixed[:2]))
        return traced

    def _function(self, kind: DecodeKind, mode: SamplingMode | None) -> Callable[..., Any]:
        def run(tokens: mx.array, arrays: dict[str, Any], *choice: Any) -> tuple[Any, ...]:
            self.count += 1
            step = DecodeStep(kind, arrays)
            found = decode_token(self.network, step, tokens, mode, *choice)
            return *found, step.keys, step.values

        return run

    def _shared_function(self, fixed: tuple[Traced, ...]) -> Callable[..., Any]:
        if fixed in self._shared:
            self._shared[fixed] = traced = self._shared.pop(fixed)
            return traced

        def run(tokens: mx.array, arrays: list[Any], choices: list[Any]) -> tuple[Any, ...]:
            steps = [DecodeStep(one[0], each) for one, each in zip(fixed, arrays, strict=True)]
            logits = self.network.logits(self.network(tokens, BatchStep(steps))[0])
            chosen = [
                choose_token(mode, numbers, row, key, PenalizedIds.of(ids))
                for (_, mode, _), row, (numbers, key, ids) in zip(
                    fixed, logits, choices, strict=True
                )
                if mode
            ]
            return chosen, [step.keys for step in steps], [step.values for step in steps]

        def trace(*arrays: Any) -> tuple[Any, ...]:
            self.count += 1
            return run(*arrays)

        self._seen[fixed] += 1
        if self._seen[fixed] <= TRACED_AFTER:
            return run
        while len(self._shared) >= MOST_SHARED_TRACES:
            dropped = next(iter(self._shared))
            del self._shared[dropped], self._seen[dropped]
        self._shared[fixed] = traced = mx.compile(trace)
        return traced


def decode_token(
    network: CausalLM,
    step: Step,
    tokens: mx.array,
    mode: SamplingMode | None,
    numbers: dict[str, mx.array],
    key: mx.array | None,
    ids: list[mx.array],
) -> tuple[mx.array, mx.array, tuple[mx.array, ...]]:
    """Compute a single-token step and, given a mode and a key, choose the next token and key."""
    hidden = network(tokens, step)
    logits = network.logits(hidden[:, -1])[0]
    chosen: tuple[mx.array, ...] = ()
    if mode is not None and key is not None:
        chosen = choose_token(mode, numbers, logits, key, PenalizedIds.of(ids))
    return hidden, logits, chosen
