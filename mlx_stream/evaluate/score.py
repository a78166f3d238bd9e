"""How likely a text is to a model that reads it as a stream; knows no command line."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx

from mlx_stream.errors import TextError, ValueRefused, WeightsError
from mlx_stream.evaluate.report import finite, perplexity
from mlx_stream.generate.token_stream import TokenStream

# Logits of this many rows are in memory at once: 50 MB for a vocabulary of 50,000 in float32.
HEAD_ROWS = 128
Head = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Score:
    """The result of scoring a text.

    Attributes:
        tokens: predictions made, one fewer than tokens read.
        nll: negative log-likelihood of each predicted token, natural log.
        evicted: tokens that had left attention at the end.
        seconds: time of reading and scoring.
        active_bytes, peak_bytes: MLX's memory at the end, and its peak.
    """

    tokens: int
    nll: list[float]
    evicted: int
    seconds: float
    active_bytes: int
    peak_bytes: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.nll)

    def as_json(self) -> dict[str, object]:
        return finite({"perplexity": self.perplexity, **asdict(self)})


def score(
    stream: TokenStream,
    ids: Sequence[int],
    chunk: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Read token ids as a stream and return how likely each was, given what it attended to.

    Args:
        chunk: tokens read per step; 1 decodes token by token. The figures do not depend on it.
        progress: called with predictions made and to make.

    Raises:
        ValueRefused: `chunk` below 1.
        TextError: fewer than two tokens: nothing to predict.
        WeightsError: the model's output is not a number.
    """
    if chunk < 1:
        raise ValueRefused(f"--chunk must be at least 1, not {chunk}")
    if len(ids) < 2:
        found = "1 token" if len(ids) == 1 else "no tokens"
        raise TextError(f"the text has {found}: at least two are needed to predict one")
    mx.reset_peak_memory()
    started = time.perf_counter()
    nll: list[float] = []
    for losses in losses_of(stream, ids, chunk):
        nll.extend(losses)
        if progress:
            progress(len(nll), len(ids) - 1)
    return Score(
        tokens=len(nll),
        nll=nll,
        evicted=stream.cache.evicted,
        seconds=time.perf_counter() - started,
        active_bytes=mx.get_active_memory(),
        peak_bytes=mx.get_peak_memory(),
    )


def losses_of(stream: TokenStream, ids: Sequence[int], chunk: int) -> Iterator[list[float]]:
    """Yield the negative log-likelihoods of `ids[1:]`, step by step; the last id is not read."""
    read = 0
    for hidden in stream.steps(ids[:-1], chunk):
        count = hidden.shape[1]
        yield losses(stream.network.logits, hidden[0], ids[read + 1 : read + 1 + count])
        read += count


def losses(head: Head, hidden: mx.array, targets: Sequence[int]) -> list[float]:
    """Return -log p of each target given hidden states (T, hidden size) and the model's head.

    Raises:
        WeightsError: the model's output is not a number.
    """
    values: list[float] = []
    for start in range(0, len(targets), HEAD_ROWS):
        logits = head(hidden[start : start + HEAD_ROWS]).astype(mx.float32)
        chosen = mx.array([*targets[start : start + HEAD_ROWS]], mx.int32)[:, None]
        loss = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, chosen, axis=-1)[:, 0]
        values.extend(loss.tolist())  # type: ignore[arg-type]
    refuse_infinite(values)
    return values


def refuse_infinite(values: Sequence[float]) -> None:
    """Raise WeightsError if a figure of a model is not a number."""
    if not all(map(math.isfinite, values)):
        raise WeightsError(
            "the model's output is not a number: its weights are damaged, or overflow in this "
            "dtype (try --dtype float32)"
        )
