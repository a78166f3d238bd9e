"""One token's step, from its id to the next one, traced once by `mx.compile` and used for ever.

What changes from step to step enters as arrays, so that no step is traced twice; the weights are
captured. Traces belong to a model: they keep its weights alive, and all its streams share them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_stream.cache import Step
from mlx_stream.cache.steps.decode import DecodeKind, DecodeStep
from mlx_stream.models.layers import CausalLM
from mlx_stream.sampling import PenalizedIds, Sampler, SamplingMode, choose_token

# Kinds of steps a model keeps traced: a window's few sizes, for a few windows and samplings.
MOST_TRACES = 64


@dataclass(frozen=True)
class DecodeOutput:
    """What a step of one token gives; nothing is evaluated yet.

    Attributes:
        hidden: (1, 1, hidden size), normalized.
        logits: (vocabulary,) after the token.
        token: the next one, without axes, if a sampler was given...
        key: ...and its next random key.
    """

    hidden: mx.array
    logits: mx.array
    token: mx.array | None = None
    key: mx.array | None = None


class CompiledSteps:
    """The traced steps of one model, by what is fixed in each.

    Attributes:
        count: how many traces were made.
    """

    def __init__(self, network: CausalLM):
        self.network = network
        self.count = 0
        self._kept: dict[tuple[DecodeKind, SamplingMode | None, bool], Callable[..., Any]] = {}

    def decode(
        self,
        step: Step,
        tokens: mx.array,
        tracing: tuple[bool, bool],
        sampler: Sampler | None = None,
        key: mx.array | None = None,
        penalized: PenalizedIds | None = None,
    ) -> DecodeOutput:
        """Compute a step of one token, traced if it is of a kind that comes again.

        Args:
            tokens: its id, (1, 1) uint32.
            tracing: as `backend` says, for kinds that come a few times, and for ever.
            sampler, key: choose the next token with this random key.
            penalized: what the sampler's penalty is for, if it has one.
        """
        if isinstance(step, DecodeStep) and not step.is_sink and tracing[step.kind.steady]:
            return self._traced(step, tokens, sampler, key, penalized)
        return decode_eagerly(self.network, step, tokens, sampler, key, penalized)

    def _traced(
        self,
        step: DecodeStep,
        tokens: mx.array,
        sampler: Sampler | None,
        key: mx.array | None,
        penalized: PenalizedIds | None,
    ) -> DecodeOutput:
        mode = sampler.mode if sampler else None
        fixed = (step.kind, mode, "mask" in step.arrays)
        traced = self._kept.get(fixed)
        if traced is None:
            while len(self._kept) >= MOST_TRACES:
                del self._kept[next(iter(self._kept))]
            traced = self._kept[fixed] = mx.compile(self._function(step.kind, mode))
        numbers = sampler.numbers if sampler else {}
        ids = [] if penalized is None else [penalized.ids, penalized.attended]
        hidden, logits, chosen, keys, values = traced(tokens, step.arrays, numbers, key, ids)
        step.finish(keys, values)
        return DecodeOutput(hidden, logits, *chosen)

    def _function(self, kind: DecodeKind, mode: SamplingMode | None) -> Callable[..., Any]:
        def run(
            tokens: mx.array,
            arrays: dict[str, Any],
            numbers: dict[str, mx.array],
            key: mx.array | None,
            ids: list[mx.array],
        ) -> tuple[Any, ...]:
            self.count += 1
            step = DecodeStep(kind, arrays)
            hidden = self.network(tokens, step)
            logits = self.network.logits(hidden[:, -1])[0]
            chosen: tuple[mx.array, ...] = ()
            if mode is not None and key is not None:
                chosen = choose_token(mode, numbers, logits, key, PenalizedIds.of(ids))
            return hidden, logits, chosen, step.keys, step.values

        return run


def decode_eagerly(
    network: CausalLM,
    step: Step,
    tokens: mx.array,
    sampler: Sampler | None = None,
    key: mx.array | None = None,
    penalized: PenalizedIds | None = None,
) -> DecodeOutput:
    """Compute a step of one token without a trace; arguments as of `CompiledSteps.decode`."""
    hidden = network(tokens, step)
    logits = network.logits(hidden[:, -1])[0]
    if sampler is None or key is None:
        return DecodeOutput(hidden, logits)
    chosen = choose_token(sampler.mode, sampler.numbers, logits, key, penalized)
    return DecodeOutput(hidden, logits, *chosen)
