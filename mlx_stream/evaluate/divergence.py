"""Measures how far one model's predictions on a text are from another's; independent of files."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_stream.evaluate.report import Progress, Row, no_progress, perplexity
from mlx_stream.evaluate.score import HEAD_ROWS, refuse_infinite
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.models.window import PREFILL_CHUNK


def log_probabilities(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergences(p: mx.array, q: mx.array) -> mx.array:
    """Return KL(p || q) in nats for each row; `p` and `q` are log-probabilities (T, vocabulary)."""
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def compare(
    source: TokenStream,
    other: TokenStream,
    ids: Sequence[int],
    chunk: int = PREFILL_CHUNK,
    progress: Progress = no_progress,
) -> Row:
    """Read token ids as one stream through two models and compare what they predict.

    Both streams are new and have the same sinks and window. Only a few rows' logits are in memory
    at a time, however long the text.

    Returns `tokens`, the number compared; `source_perplexity` and `perplexity`; `kl_mean` and
    `kl_p99`, the mean and the 99th percentile, in nats, of the Kullback-Leibler divergence from the
    source's prediction of a token to the other's; and `top1_agreement`, the share of tokens for
    which both predict the same likeliest token. All are rounded to 6 decimal places; further
    digits are noise.
    """
    found: list[np.ndarray] = []  # columns: source's and other's loss, divergence, same top token
    read, total = 0, len(ids) - 1
    steps = (stream.steps(ids[:-1], chunk) for stream in (source, other))
    for ours, theirs in zip(*steps, strict=True):
        for start in range(0, ours.shape[1], HEAD_ROWS):
            p = log_probabilities(source.network.logits(ours[0, start : start + HEAD_ROWS]))
            q = log_probabilities(other.network.logits(theirs[0, start : start + HEAD_ROWS]))
            targets = mx.array([*ids[read + 1 : read + 1 + len(p)]], mx.int32)[:, None]
            losses = (-mx.take_along_axis(one, targets, axis=-1)[:, 0] for one in (p, q))
            same = mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)
            found.append(np.array(mx.stack([*losses, divergences(p, q), same], axis=1)))
            read += len(p)
        progress(read, total)
    source_nll, nll, kl, agree = np.concatenate(found).astype(float).T.tolist()
    refuse_infinite([*source_nll, *nll, *kl])
    figures = {
        "source_perplexity": perplexity(source_nll),
        "perplexity": perplexity(nll),
        "kl_mean": math.fsum(kl) / total,
        "kl_p99": float(np.percentile(kl, 99)),
        "top1_agreement": sum(agree) / total,
    }
    return {"tokens": total, **{name: round(value, 6) for name, value in figures.items()}}
