"""A stream's sinks and window: defaults, limits, and the chunk size for prompts; no caches."""

from mlx_stream.config import ModelConfig
from mlx_stream.errors import ValueRefused
from mlx_stream.program.notices import Notify, discard

DEFAULT_SINKS = 4
DEFAULT_WINDOW = 2_048
# A model that thinks gets the largest that fits; with 4 sinks added, each is a power of two.
THINKING_WINDOWS = (32_764, 16_380, 8_188, 4_092, DEFAULT_WINDOW)
# The maximum number of tokens in a step that reads a prompt.
PREFILL_CHUNK = 128
# The same for a step shared by several streams, while no reply is in progress.
SHARED_ROWS = 2 * PREFILL_CHUNK
MOST_STREAMS = 64  # the maximum run together, from a file of prompts or in a benchmark


def resolve_window(
    config: ModelConfig,
    sinks: int | None,
    window: int | None,
    notify: Notify = discard,
) -> tuple[int, int]:
    """Return S and W, with defaults filled in and limits applied.

    Raises:
        ValueRefused: a value is out of range, or together they exceed the trained context.
    """
    trained = config.max_position_embeddings
    sinks = DEFAULT_SINKS if sinks is None else sinks
    if not 0 <= sinks < trained:
        raise ValueRefused(f"`sinks` must be from 0 to {trained - 1:,}, not {sinks:,}")
    if window is None:
        window = min(DEFAULT_WINDOW, trained - sinks)
    if window < 1:
        raise ValueRefused(f"`window` must be at least 1, not {window:,}")
    if sinks + window > trained:
        raise ValueRefused(
            f"sinks {sinks:,} + window {window:,} = {sinks + window:,} tokens exceed the model's "
            f"trained context of {trained:,}: use a window of at most {trained - sinks:,}"
        )
    limit = config.position_limit or trained
    if sinks >= limit:
        raise ValueRefused(
            f"{sinks:,} sinks leave no room for a window: this model is limited to {limit:,} "
            "positions; use fewer sinks"
        )
    bounds = {"sliding_window": config.sliding_window or window, "position limit": limit - sinks}
    for name, bound in bounds.items():
        if bound < window:
            notify(f"window reduced from {window:,} to {bound:,}: the model's {name}")
            window = bound
    return sinks, window


def bounded_windows(config: ModelConfig, sinks: int, windows: tuple[int, ...]) -> tuple[int, ...]:
    """Return the distinct windows, each reduced to the largest that the model allows."""
    trained = config.max_position_embeddings
    places = min(trained, config.position_limit or trained) - sinks
    limit = min(places, config.sliding_window or places)
    return tuple(dict.fromkeys(min(window, limit) for window in windows))
