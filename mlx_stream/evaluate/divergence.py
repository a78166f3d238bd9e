"""How far one model's predictions are from another's, over one text; knows no files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream.evaluate.report import perplexity
from mlx_stream.evaluate.score import HEAD_ROWS, refuse_infinite
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.window import PREFILL_CHUNK


@dataclass(frozen=True)
class Divergence:
    """What a model lost against its source.

    Attributes:
        tokens: predictions compared.
        source_perplexity, perplexity: of the text, to each model.
        kl_mean, kl_p99: Kullback-Leibler divergence from the source's prediction of a token to the
            other's, in nats: mean, and 99th percentile.
        top1_agreement: fraction of tokens for which the likeliest one is the same.
    """

    tokens: int
    source_perplexity: float
    perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures, rounded to where they are more than noise."""
        found = asdict(self).items()
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in found}


@dataclass
class Figures:
    """Of each predicted token: losses of the source and the other, divergence, agreement."""

    source: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def add(self, source: mx.array, other: mx.array, targets: Sequence[int]) -> None:
        """Add logits (T, vocabulary) of both and the ids that came."""
        chosen = mx.array([*targets], mx.int32)[:, None]
        p, q = log_probabilities(source), log_probabilities(other)
        losses = (-mx.take_along_axis(one, chosen, axis=-1)[:, 0] for one in (p, q))
        same = mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)
        lists = (self.source, self.other, self.kl, self.same)
        for found, new in zip(lists, (*losses, divergences(p, q), same), strict=True):
            found.extend(new.tolist())  # type: ignore[arg-type]

    def result(self) -> Divergence:
        return Divergence(
            tokens=len(self.kl),
            source_perplexity=perplexity(self.source),
            perplexity=perplexity(self.other),
            kl_mean=math.fsum(self.kl) / len(self.kl),
            kl_p99=float(np.percentile(self.kl, 99)),
            top1_agreement=sum(self.same) / len(self.same),
        )


def log_probabilities(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergences(p: mx.array, q: mx.array) -> mx.array:
    """Return KL(p || q) of each row, of log-probabilities (T, vocabulary), in nats."""
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def compare(
    source: TokenStream,
    other: TokenStream,
    ids: Sequence[int],
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Divergence:
    """Read token ids as one stream through two models and compare what they predict.

    Both streams are new, and of the same sinks and window. Logits of no more than a few rows are
    in memory at once, however long the text.

    Raises:
        WeightsError: a model's output is not a number.
    """
    figures = Figures()
    steps = (stream.steps(ids[:-1], chunk) for stream in (source, other))
    for ours, theirs in zip(*steps, strict=True):
        for start in range(0, ours.shape[1], HEAD_ROWS):
            logits = source.network.logits(ours[0, start : start + HEAD_ROWS])
            others = other.network.logits(theirs[0, start : start + HEAD_ROWS])
            begin = len(figures.kl) + 1
            figures.add(logits, others, ids[begin : begin + len(logits)])
        progress(len(figures.kl), len(ids) - 1)
    refuse_infinite([*figures.source, *figures.other, *figures.kl])
    return figures.result()
