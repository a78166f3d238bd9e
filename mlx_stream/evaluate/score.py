"""Measures how likely a text is under a model that streams it; independent of the command line."""

import math
import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_stream.errors import TextError, ValueRefused, WeightsError
from mlx_stream.evaluate.report import Progress, Row, no_progress, perplexity
from mlx_stream.generate.token_stream import TokenStream

# Logits of this many rows are in memory at once: 50 MB for a vocabulary of 50,000 in float32.
HEAD_ROWS = 128
Head = Callable[[mx.array], mx.array]


def score(
    stream: TokenStream, ids: Sequence[int], chunk: int = 128, progress: Progress = no_progress
) -> Row:
    """Read token ids as a stream and return how likely each was, given what it attended to.

    Returns `perplexity`; `tokens`, the number predicted, one less than the number read; `nll`, the
    negative log-likelihood of each, in nats; `evicted`, the number of tokens evicted; `seconds`;
    and MLX's memory at the end and at its peak, `active_bytes` and `peak_bytes`. The likelihoods do
    not depend on `chunk`, the number of tokens read per step. Raises ValueRefused, TextError or
    WeightsError.
    """
    if chunk < 1:
        raise ValueRefused(f"--chunk must be at least 1, not {chunk}")
    if len(ids) < 2:
        found = "1 token" if len(ids) == 1 else "no tokens"
        raise TextError(f"the text has {found}: at least two are needed to predict one")
    mx.reset_peak_memory()
    started = time.perf_counter()
    nll = losses_of(stream, ids, chunk, progress)
    return {
        "perplexity": perplexity(nll),
        "tokens": len(nll),
        "nll": nll,
        "evicted": stream.cache.evicted,
        "seconds": time.perf_counter() - started,
        "active_bytes": mx.get_active_memory(),
        "peak_bytes": mx.get_peak_memory(),
    }


def losses_of(
    stream: TokenStream, ids: Sequence[int], chunk: int, progress: Progress = no_progress
) -> list[float]:
    """Read all ids but the last; return the negative log-likelihoods of `ids[1:]`."""
    nll: list[float] = []
    for hidden in stream.steps(ids[:-1], chunk):
        read = len(nll)
        targets = ids[read + 1 : read + 1 + hidden.shape[1]]
        nll += losses(stream.network.logits, hidden[0], targets)
        progress(len(nll), len(ids) - 1)
    return nll


def losses(head: Head, hidden: mx.array, targets: Sequence[int]) -> list[float]:
    """Return -log p of each target given hidden states (T, hidden size) and the model's head."""
    values: list[float] = []
    for start in range(0, len(targets), HEAD_ROWS):
        logits = head(hidden[start : start + HEAD_ROWS]).astype(mx.float32)
        chosen = mx.array([*targets[start : start + HEAD_ROWS]], mx.int32)[:, None]
        loss = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, chosen, axis=-1)[:, 0]
        values.extend(loss.tolist())  # type: ignore[arg-type]
    refuse_infinite(values)
    return values


def refuse_infinite(values: Sequence[float]) -> None:
    """Raise WeightsError if any of a model's results are infinite or NaN."""
    if not all(map(math.isfinite, values)):
        raise WeightsError(
            "the model's output is not finite: its weights are damaged, or overflow in this "
            "dtype (try --dtype float32)"
        )
