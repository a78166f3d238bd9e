"""Whether this device computes what a stream needs, as it needs it; prints nothing.

A test suite that passes on one backend says little of another: positions, masks, kernels and
buffers are each device's own. These checks run on the device at hand, on a model's own shapes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlx_stream.load import Model
from mlx_stream.selftest import kernels, streams
from mlx_stream.selftest.result import CheckOutcome, CheckResult


@dataclass(frozen=True)
class Check:
    """A check, what it sees to, and what to do where that does not hold."""

    name: str
    check: Callable[[Model], CheckOutcome]
    advice: str


REPORT = "report it with what doctor prints; until then do not trust what is written here"
CHECKS = (
    Check(
        "rotary positions are right up to the clock's limit",
        kernels.rotation,
        REPORT,
    ),
    Check(
        "attention is right: grouped heads, masks, one token and many",
        kernels.attention,
        REPORT,
    ),
    Check(
        "attention is one fused kernel for these shapes",
        kernels.fused_attention,
        "text is right but slower than it could be: update MLX (pip install -U mlx), or take a "
        "model whose heads have 64 or 128 numbers",
    ),
    Check(
        "quantized products are those of the dequantized weights",
        kernels.quantized_product,
        "update MLX; until then load with --dequantize",
    ),
    Check(
        "sinks and ring are attended at the right places, across the wrap and a lowered clock",
        streams.places,
        REPORT,
    ),
    Check(
        "chunks give what single tokens give",
        streams.chunks,
        REPORT + " (on an M5, set MLX_ENABLE_TF32=0 and try again)",
    ),
    Check(
        "buffers are updated in place",
        streams.in_place,
        "memory and time per token are more than they need to be: update MLX, and report it",
    ),
    Check(
        "a decode step is traced once",
        streams.traced_once,
        "decoding gets slower with each trace: set MLX_STREAM_COMPILE=0, and report it",
    ),
    Check(
        "seeds decide what is drawn",
        streams.seeds,
        "--seed does not give the same text again here: update MLX, and report it",
    ),
    Check(
        "a saved stream goes on to the bit",
        streams.snapshot_restores,
        "leave --session out until it is fixed, and report it",
    ),
)


def run(model: Model) -> Iterator[CheckResult]:
    """Run every check on a model's shapes; yields what each found, as it is found."""
    for named in CHECKS:
        try:
            found = named.check(model)
        except (RuntimeError, ValueError) as error:  # MLX's own: a kernel that failed, say
            found = CheckOutcome(False, f"MLX refused: {' '.join(str(error).split())[:200]}")
        advice = named.advice if found.holds is False else ""
        yield CheckResult(named.name, found.holds, found.what, advice)
