"""Describes a loaded model and its window in plain words for chat users."""

from typing import TYPE_CHECKING

from mlx_stream.models.layout import layout_of

if TYPE_CHECKING:
    from mlx_stream.generate.model import Model
    from mlx_stream.generate.stats import Stats

WORDS_PER_TOKEN = 0.75


def describe_model(model: "Model") -> str:
    """Return, for example, "starter: llama, 135M parameters, float32, 538.1 MB in memory"."""
    count = layout_of(model.config).parameters
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:,.0f}M"
    kept = (model.config.quantization or {}).get("") if model.quantized else None
    form = f"{kept.bits} bits" if kept else str(model.dtype).removeprefix("mlx.core.")
    family, weight = model.config.model_type, f"{model.weight_bytes / 1e6:,.1f} MB in memory"
    return f"{model.name}: {family}, {size} parameters, {form}, {weight}"


def describe_window(stats: "Stats") -> str:
    """Return how much a conversation remembers, measured in English words."""
    words = round(stats.window * WORDS_PER_TOKEN, -2 if stats.window > 400 else -1)
    begin = "the system prompt" if stats.pinned else f"the first {stats.sinks:,}"
    return (
        f"remembers about {words:,.0f} words: it attends to {begin} and the latest "
        f"{stats.window:,} tokens"
    )
