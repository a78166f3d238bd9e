"""Finds the listed models that fit a device, and the largest window for each; works offline."""

from dataclasses import dataclass, replace

from mlx_stream.hub.catalog import ListedModel, listed_models
from mlx_stream.models.layout import weights_bytes
from mlx_stream.models.window import DEFAULT_SINKS, THINKING_WINDOWS, bounded_windows
from mlx_stream.plan.devices import Device
from mlx_stream.plan.inspect import of_config
from mlx_stream.plan.planner import FITS, ITEMSIZES, Plan, Planner, PlanRequest

# With a window of this size, a suggested model leaves a quarter of a program's memory free.
SUGGESTED_SHARE, SUGGESTED_WINDOW = 0.75, 8_188


@dataclass(frozen=True)
class Offer:
    """A listed model as it would be fetched, with the largest window that fits a device.

    Attributes:
        stored: the size in bytes of its weights on the Hub.
        plan: its plan with that window, or with the smallest window if none fits.
    """

    model: ListedModel
    stored: int
    plan: Plan

    @property
    def fits(self) -> bool:
        return self.plan.verdict == FITS


def make_offers(device: Device) -> list[Offer]:
    """Plan each listed model for a device, unconverted and with a window of at least 2,048."""
    return [make_offer(model, device, THINKING_WINDOWS) for model in listed_models()]


def suggest_model(device: Device) -> Offer | None:
    """Return the largest model to suggest for a device; None if none fits well."""
    share = replace(device.budget, amount=int(SUGGESTED_SHARE * device.budget.amount))
    smaller = replace(device, budget=share)
    models = [model for model in listed_models() if model.suggested]
    offers = [make_offer(model, smaller, (SUGGESTED_WINDOW,)) for model in models]
    found = [offer for offer in offers if offer.fits]
    return found[-1] if found else None


def make_offer(model: ListedModel, device: Device, windows: tuple[int, ...]) -> Offer:
    summary = of_config(model.name, model.config)
    planner = Planner(summary, device, PlanRequest())
    recipe = next(planner.recipes())
    stored = weights_bytes(planner.layout, recipe.on_disk, ITEMSIZES[summary.dtype])
    plans = [
        planner.plan(recipe, DEFAULT_SINKS, window)
        for window in bounded_windows(summary.config, DEFAULT_SINKS, windows)
    ]
    chosen = next((plan for plan in plans if plan.verdict == FITS), plans[-1])
    return Offer(model, model.bytes or stored, chosen)
