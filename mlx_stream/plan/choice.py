"""Which bits and which window fit a device, and how fast at most; knows no files and no network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mlx_stream.backend import CACHE_LIMIT
from mlx_stream.config import ModelConfig, Quantization
from mlx_stream.devices import Device
from mlx_stream.errors import ValueRefused
from mlx_stream.models.layers import Projection
from mlx_stream.plan.needs import (
    BITS,
    DEFAULT_GROUP_SIZE,
    NOT_QUANTIZED,
    Held,
    Shapes,
    is_fused,
    loading_bytes,
    ring_bytes,
    shapes_of,
    step_bytes,
    uniform,
    weights_bytes,
    workspace_bytes,
)

ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
DEFAULT_SINKS = 4
DEFAULT_WINDOW = 2_048
# Tried where no window is asked for, each with every recipe. Fewer bits cost more than a window
# does, but one below the default makes a conversation short: those come last.
WINDOWS = ((8_188, 4_092, DEFAULT_WINDOW), (1_020, 508, 252))

FITS, TIGHT, TOO_LARGE = "fits", "tight", "does not fit"


def ignore(notice: str) -> None:
    """Take a notice and drop it."""


def resolve_window(
    config: ModelConfig,
    sinks: int | None,
    window: int | None,
    notify: Callable[[str], None] = ignore,
) -> tuple[int, int]:
    """Return S and W as they will be: defaults filled in, limits held.

    Raises:
        ValueRefused: out of range, or together above the trained context.
    """
    trained = config.max_position_embeddings
    sinks = DEFAULT_SINKS if sinks is None else sinks
    if not 0 <= sinks < trained:
        raise ValueRefused(f"--sinks must be from 0 to {trained - 1}, not {sinks}")
    if window is None:
        window = min(DEFAULT_WINDOW, trained - sinks)
    if window < 1:
        raise ValueRefused(f"--window must be at least 1, not {window}")
    if sinks + window > trained:
        raise ValueRefused(
            f"sinks {sinks} + window {window} = {sinks + window} tokens exceed the model's "
            f"trained context of {trained}: use a window of at most {trained - sinks}"
        )
    bound = config.sliding_window
    if bound is not None and bound < window:
        notify(f"window reduced from {window} to {bound}: the model's sliding_window")
        window = bound
    return sinks, window


@dataclass(frozen=True)
class Outline:
    """A model as its config and its files' headers describe it.

    Attributes:
        dtype: of the floats in its files.
        quantized: paths of the modules whose weights are stored quantized, as the config says how.
        stored: bytes of its weights on disk; None if no file was there to ask.
    """

    name: str
    config: ModelConfig
    dtype: str
    quantized: frozenset[str] = frozenset()
    stored: int | None = None

    def held(self, part: Projection) -> Quantization | None:
        """Return how its files hold a matrix."""
        return self.config.quantized(part.path) if part.path in self.quantized else None


@dataclass(frozen=True)
class Asked:
    """What a plan is asked to keep to; None leaves the choice to it.

    `keep` is False where weights are dequantized when loaded, as on the CPU backend.
    """

    dtype: str
    keep: bool = True
    sinks: int | None = None
    window: int | None = None
    bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    kv_bits: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How all matrices are held; `bits` is None for as the files hold them."""

    name: str
    bits: int | None
    held: Held


@dataclass(frozen=True)
class Plan:
    """What one choice of recipe and window needs on a device.

    Attributes:
        weights, ring, workspace: bytes; together the peak of a running chat, once it is loaded.
        loading: the peak while loading.
        step: bytes that writing one token reads.
    """

    recipe: Recipe
    device: Device
    sinks: int
    window: int
    weights: int
    ring: int
    workspace: int
    loading: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.ring + self.workspace

    @property
    def peak(self) -> int:
        return max(self.total, self.loading)

    @property
    def verdict(self) -> str:
        return self.verdict_for(self.device.budget.amount)

    def verdict_for(self, budget: float) -> str:
        """Say whether it fits, and whether the allocator's cache of freed buffers does too."""
        if self.peak > budget:
            return TOO_LARGE
        return FITS if self.peak + CACHE_LIMIT <= budget else TIGHT

    @property
    def missing(self) -> int:
        """Bytes by which it exceeds the budget, or 0."""
        return max(0, int(self.peak - self.device.budget.amount))

    @property
    def tokens_per_second(self) -> float | None:
        """The speed that reading `step` bytes a token allows at most, if the bandwidth is known."""
        bandwidth = self.device.bandwidth
        return None if bandwidth is None else bandwidth.amount / self.step


def make_plan(outline: Outline, device: Device, asked: Asked) -> Plan:
    """Return the plan that was asked for, or the best one that fits.

    The most bits come first, then the largest window; what does not leave room for the allocator's
    cache is taken if nothing else fits. If nothing does, it is the smallest one.

    Raises:
        ValueRefused: a value out of range, or one MLX or the model does not have.
    """
    shapes = shapes_of(outline.config)
    recipes = list(recipes_of(outline, shapes, asked))
    sinks, window = resolve_window(outline.config, asked.sinks, asked.window)
    fixed = asked.window is not None
    passes = ((window,),) if fixed else tuple(held_to(outline.config, sinks, w) for w in WINDOWS)
    tried: list[Plan] = []
    for windows in passes:
        for recipe in recipes:
            for window in windows:
                plan = plan_of(outline, shapes, device, asked, recipe, sinks, window)
                if plan.verdict == FITS:
                    return plan
                tried.append(plan)
    return next((plan for plan in tried if plan.verdict == TIGHT), min(tried, key=lambda p: p.peak))


def held_to(config: ModelConfig, sinks: int, windows: tuple[int, ...]) -> tuple[int, ...]:
    """Return the windows with those that the model does not have lowered to what it has."""
    limit = min(config.max_position_embeddings - sinks, config.sliding_window or 2**31)
    return tuple(dict.fromkeys(min(window, limit) for window in windows))


def recipes_of(outline: Outline, shapes: Shapes, asked: Asked) -> Iterator[Recipe]:
    """Yield the recipes to choose from, the one with most bits first."""
    if asked.bits is not None:
        yield converted(asked.bits, asked)
        return
    if not asked.keep:
        yield Recipe(f"{asked.dtype}, dequantized when loaded", NOT_QUANTIZED, lambda part: None)
    widest: float = NOT_QUANTIZED
    if outline.quantized:
        itemsize = ITEMSIZES[outline.dtype]
        widest = 8 * weights_bytes(shapes, outline.held, itemsize) / shapes.parameters
        yield Recipe(f"as it is, {widest:.1f} bits a weight", None, outline.held)
    elif asked.keep:
        yield converted(NOT_QUANTIZED, asked)
    yield from (converted(bits, asked) for bits in BITS if bits < int(widest))


def converted(bits: int, asked: Asked) -> Recipe:
    held = uniform(bits, asked.group_size)
    name = asked.dtype if bits == NOT_QUANTIZED else f"{bits} bits, groups of {asked.group_size}"
    return Recipe(name, bits, held)


def plan_of(
    outline: Outline,
    shapes: Shapes,
    device: Device,
    asked: Asked,
    recipe: Recipe,
    sinks: int,
    window: int,
) -> Plan:
    config, itemsize = outline.config, ITEMSIZES[asked.dtype]
    ring = ring_bytes(config, sinks, window, itemsize, asked.kv_bits)
    # What is converted is stored as it will be held; only what is dequantized is not.
    dequantized = recipe.bits == NOT_QUANTIZED and outline.quantized
    stored = outline.held if dequantized else recipe.held
    floats = ITEMSIZES[outline.dtype]
    return Plan(
        recipe=recipe,
        device=device,
        sinks=sinks,
        window=window,
        weights=weights_bytes(shapes, recipe.held, itemsize),
        ring=ring,
        workspace=workspace_bytes(config, sinks, window, itemsize, is_fused(config, device.metal)),
        loading=loading_bytes(shapes, stored, recipe.held, itemsize, floats),
        step=step_bytes(config, shapes, recipe.held, itemsize, ring),
    )


def without_entitlement(plan: Plan) -> Plan | None:
    """Return the same plan for an app without the increased-memory-limit entitlement, on iOS."""
    lower = plan.device.without_entitlement
    return None if lower is None else replace(plan, device=replace(plan.device, budget=lower))
