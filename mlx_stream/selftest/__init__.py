"""Checks that this device computes what a stream needs; prints nothing.

Positions, masks, kernels and buffers differ from device to device. The checks run on the current
device, with the shapes of a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlx_stream.errors import one_line
from mlx_stream.generate.model import Model
from mlx_stream.selftest import kernels, streams
from mlx_stream.selftest.kernels import CheckOutcome


@dataclass(frozen=True)
class Check:
    """A check: its name, the function, and advice if it fails."""

    name: str
    check: Callable[[Model], CheckOutcome]
    advice: str


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a named check, with advice if it failed."""

    check: str
    holds: bool | None
    found: str
    advice: str


REPORT = "report it with the output of doctor; until it is fixed, do not trust generated text"
CHECKS = (
    Check("rotary positions are correct up to the clock's limit", kernels.rotation, REPORT),
    Check(
        "attention is correct: grouped heads, masks, one token and many", kernels.attention, REPORT
    ),
    Check(
        "attention is one fused kernel for these shapes",
        kernels.fused_attention,
        "the output is correct but slower to compute than it could be: "
        "update MLX (pip install -U mlx), or choose a "
        "model with a head size of 64 or 128",
    ),
    Check(
        "quantized matmuls equal those of the dequantized weights",
        kernels.quantized_product,
        "update MLX; until then load with --dequantize",
    ),
    Check(
        "sinks and ring are attended to at the right places, after a wrap and a lowered clock",
        streams.places,
        REPORT,
    ),
    Check(
        "chunks give the same results as single tokens",
        streams.chunks,
        REPORT + " (on an M5, set MLX_ENABLE_TF32=0 and try again)",
    ),
    Check(
        "a step of four streams equals four separate steps",
        streams.shared_step,
        REPORT + "; start engine sessions with shared=False",
    ),
    Check(
        "buffers are updated in place",
        streams.in_place,
        "memory and time per token are higher than necessary: update MLX, and report it",
    ),
    Check(
        "a decode step is traced once",
        streams.traced_once,
        "decoding gets slower with each trace: set MLX_STREAM_COMPILE=0, and report it",
    ),
    Check(
        "seeds determine the draws",
        streams.seeds,
        "--seed does not reproduce a text here: update MLX, and report it",
    ),
    Check(
        "a saved stream continues bit for bit",
        streams.snapshot_restores,
        "do not use --session until it is fixed, and report it",
    ),
)


def run(model: Model) -> Iterator[CheckResult]:
    """Run every check with a model's shapes; yield each result as soon as it is known."""
    for one in CHECKS:
        try:
            found = one.check(model)
        except (RuntimeError, ValueError) as error:  # raised by MLX, for example if a kernel failed
            found = CheckOutcome(False, f"MLX error: {one_line(error, 200)}")
        yield CheckResult(
            one.name, found.holds, found.what, one.advice if found.holds is False else ""
        )
