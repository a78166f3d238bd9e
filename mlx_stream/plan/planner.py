"""Chooses the bit width and the window that fit a device; independent of files and the network."""

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_stream.backend import CACHE_LIMIT
from mlx_stream.cache.steps.verify import spare_rows
from mlx_stream.config import ModelConfig, Quantization
from mlx_stream.errors import ValueRefused
from mlx_stream.models.layers import Projection
from mlx_stream.models.layout import QuantizationOf, layout_of, ring_bytes, weights_bytes
from mlx_stream.models.window import (
    DEFAULT_WINDOW,
    PREFILL_CHUNK,
    SHARED_ROWS,
    bounded_windows,
    resolve_window,
)
from mlx_stream.plan.devices import Device
from mlx_stream.plan.memory import (
    BITS,
    DEFAULT_GROUP_SIZE,
    NOT_QUANTIZED,
    is_fused,
    loading_bytes,
    step_bytes,
    uniform_quantization,
    workspace_bytes,
)
from mlx_stream.program.notices import Notify, discard

ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
# The windows to try with every recipe if none is requested. Fewer bits cost more quality than a
# shorter window, but windows below the default make conversations short, so they come last.
WINDOWS = ((8_188, 4_092, DEFAULT_WINDOW), (1_020, 508, 252))

FITS, TIGHT, TOO_LARGE = "fits", "tight", "does not fit"


@dataclass(frozen=True)
class ModelSummary:
    """A model as described by its config and the headers of its files.

    Attributes:
        dtype: the floating-point type in its files.
        quantized: paths of the modules whose weights are stored quantized, as the config specifies.
        stored: size of its weights on disk, in bytes; None if there is only a config.
    """

    name: str
    config: ModelConfig
    dtype: str
    quantized: frozenset[str] = frozenset()
    stored: int | None = None

    def quantization_of(self, part: Projection) -> Quantization | None:
        """Return how a matrix is quantized in its files; None for floats."""
        return self.config.quantized(part.path) if part.path in self.quantized else None


@dataclass(frozen=True)
class PlanRequest:
    """The values that a plan must use; the planner chooses those that are None.

    Attributes:
        dtype: the type of activations, keys and values; default: the one that `load` uses.
        keep: whether quantized weights stay quantized; default: only on Metal or if bits are given.
        bits: bits per converted weight; 16 keeps the weights as floats.
        kv_bits: bits per number in the ring; None keeps the ring in `dtype`.
        streams: how many conversations are open at the same time.
    """

    dtype: str | None = None
    keep: bool | None = None
    sinks: int | None = None
    window: int | None = None
    bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    kv_bits: int | None = None
    streams: int = 1


@dataclass(frozen=True)
class WeightFormat:
    """How all matrices are stored in memory and on disk; `bits` is None if files stay unchanged."""

    name: str
    bits: int | None
    in_memory: QuantizationOf
    on_disk: QuantizationOf


@dataclass(frozen=True)
class Plan:
    """The memory that one recipe and window need on a device.

    Attributes:
        weights, ring, workspace: sizes in bytes; their sum is the peak of a running chat after
            loading. The ring size covers all streams.
        loading: peak memory while loading, in bytes.
        step: bytes that are read to generate one token of each stream.
    """

    recipe: WeightFormat
    device: Device
    dtype: str
    sinks: int
    window: int
    weights: int
    ring: int
    workspace: int
    loading: int
    step: int
    streams: int = 1

    @property
    def total(self) -> int:
        return self.weights + self.ring + self.workspace

    @property
    def peak(self) -> int:
        return max(self.total, self.loading)

    @property
    def verdict(self) -> str:
        return self.verdict_for(self.device.budget.amount)

    def verdict_for(self, budget: int) -> str:
        """Return whether the plan fits, and whether it leaves room for the allocator's cache."""
        if self.peak > budget:
            return TOO_LARGE
        return FITS if self.peak + CACHE_LIMIT <= budget else TIGHT

    @property
    def missing(self) -> int:
        """The number of bytes by which the plan exceeds the budget, or 0."""
        return max(0, self.peak - self.device.budget.amount)

    @property
    def tokens_per_second(self) -> float | None:
        """The highest total speed of all streams that the bandwidth allows; None if unknown."""
        bandwidth = self.device.bandwidth
        return None if bandwidth is None else self.streams * bandwidth.amount / self.step


def make_plan(
    summary: ModelSummary, device: Device, asked: PlanRequest, notify: Notify = discard
) -> Plan:
    """Return the requested plan, or the best one that fits.

    Plans with the most bits are preferred, then those with the largest window. Next come plans
    without room for the allocator's cache. If nothing fits, return the smallest plan.

    Raises:
        ValueRefused: a value is out of range, or not supported by MLX or the model.
    """
    planner = Planner(summary, device, asked)
    sinks, window = resolve_window(summary.config, asked.sinks, asked.window, notify)
    passes = WINDOWS if asked.window is None else ((window,),)
    tried: list[Plan] = []
    for windows in passes:
        for recipe in planner.recipes():
            for window in bounded_windows(summary.config, sinks, windows):
                tried.append(planner.plan(recipe, sinks, window))
                if tried[-1].verdict == FITS:
                    return tried[-1]
    return next((plan for plan in tried if plan.verdict == TIGHT), min(tried, key=lambda p: p.peak))


class Planner:
    """Makes plans for one model on one device, for each recipe and window."""

    def __init__(self, summary: ModelSummary, device: Device, asked: PlanRequest):
        self.summary, self.device, self.request = summary, device, asked
        self.layout = layout_of(summary.config)
        self.dtype = asked.dtype or (summary.dtype if device.metal else "float32")
        if self.dtype not in ITEMSIZES:
            raise ValueRefused(f"--dtype must be one of {', '.join(ITEMSIZES)}, not {self.dtype!r}")
        self.itemsize = ITEMSIZES[self.dtype]
        if asked.bits is not None and asked.keep is False:
            raise ValueRefused("--bits keeps weights quantized: leave out --dequantize")
        if asked.streams < 1:
            raise ValueRefused(f"--streams must be at least 1, not {asked.streams}")
        uniform_quantization(NOT_QUANTIZED if asked.bits is None else asked.bits, asked.group_size)

    def recipes(self) -> Iterator[WeightFormat]:
        """Yield the possible recipes, starting with the most bits."""
        summary, asked = self.summary, self.request
        if asked.bits is not None:
            yield self.at_bits(asked.bits)
            return
        kept = self.device.metal if asked.keep is None else asked.keep
        if not kept or not summary.quantized:
            name = self.dtype + (" dequantized when loaded" if summary.quantized else "")
            floats = uniform_quantization(NOT_QUANTIZED)
            yield WeightFormat(name, NOT_QUANTIZED, floats, summary.quantization_of)
        if asked.keep is False:
            return
        widest: float = NOT_QUANTIZED
        if summary.quantized:
            stored = weights_bytes(self.layout, summary.quantization_of, ITEMSIZES[summary.dtype])
            widest = 8 * stored / self.layout.parameters
            name, of = f"as it is, {widest:.1f} bits per weight", summary.quantization_of
            yield WeightFormat(name, None, of, of)
        yield from (self.at_bits(bits) for bits in BITS if bits < int(widest))

    def at_bits(self, bits: int) -> WeightFormat:
        group_size = self.request.group_size
        quantization_of = uniform_quantization(bits, group_size)
        name = self.dtype if bits == NOT_QUANTIZED else f"{bits} bits in groups of {group_size}"
        return WeightFormat(name, bits, quantization_of, quantization_of)

    def plan(self, recipe: WeightFormat, sinks: int, window: int) -> Plan:
        """Return the plan for a recipe and a window."""
        config, itemsize, kv_bits = self.summary.config, self.itemsize, self.request.kv_bits
        ring = ring_bytes(config, sinks, window, itemsize, kv_bits, spare_rows(kv_bits))
        streams = self.request.streams
        ring *= streams
        # A step shared by several streams can have the rows of up to this many chunks.
        chunks = SHARED_ROWS // PREFILL_CHUNK if streams > 1 else 1
        fused = is_fused(config, self.device.metal)
        on_disk = ITEMSIZES[self.summary.dtype]
        return Plan(
            recipe=recipe,
            device=self.device,
            dtype=self.dtype,
            sinks=sinks,
            window=window,
            weights=weights_bytes(self.layout, recipe.in_memory, itemsize),
            ring=ring,
            workspace=chunks * workspace_bytes(config, sinks, window, itemsize, fused, kv_bits),
            loading=loading_bytes(self.layout, recipe.on_disk, recipe.in_memory, itemsize, on_disk),
            step=step_bytes(config, self.layout, recipe.in_memory, itemsize, ring),
            streams=streams,
        )
