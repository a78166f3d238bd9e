"""Asks once, on a Mac, whether to use a larger model than the starter; fetches nothing."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_stream.cli.config_file import set_value, setting
from mlx_stream.hub.starter import STARTER
from mlx_stream.program.paths import data_folder, private

if TYPE_CHECKING:
    from mlx_stream.plan.devices import Device

QUESTION = "Use it from now on? y, n, or always (always use the starter): "


def choose_model(ask: Callable[[str], str], device: "Device | None" = None) -> str:
    """Return the model for a chat that names none: the configured, offered or starter model.

    The question is asked only once: `y` and `always` are saved in the config file, and after `n`
    the same model is not offered again. Models are offered only on a device with Metal.

    Args:
        device: the device to choose a model for; default: this machine.
    """
    if model := setting("model"):
        return model
    if device is None and sys.platform != "darwin":
        return STARTER
    from mlx_stream.plan import devices
    from mlx_stream.plan.offers import suggest_model

    place = device or devices.here()
    offer = suggest_model(place) if place.metal else None
    if offer is None or offer.model.name == declined_model():
        return STARTER
    model = offer.model
    answer = ask(
        f"mlx_stream: the starter is a small model; {model.name} ({offer.stored / 1e9:.1f} GB to "
        f"fetch, {model.license}) fits here with a window of {offer.plan.window:,}.\n{QUESTION}"
    ).lower()
    if answer in ("y", "yes"):
        set_value("model", model.name)
        return model.name
    if answer == "always":
        set_value("model", STARTER)
    elif answer in ("n", "no"):
        decline_model(model.name)
    return STARTER


# --- when the answer is no ---


def declined_file() -> Path:
    return data_folder().parent / "declined_model"


def declined_model() -> str | None:
    path = declined_file()
    return path.read_text("utf-8") if path.exists() else None


def decline_model(name: str) -> None:
    private(declined_file().parent)
    declined_file().write_text(name, "utf-8")
