"""The text model inside a model that also reads images: its config, and its tensors' names.

Mistral3 (config.json)              Ministral3, as everything else here sees it
text_config.hidden_size             hidden_size
language_model.model.norm.weight    model.norm.weight      (or model.language_model.norm.weight)
vision_tower.*                      not read
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from mlx_stream.errors import ConfigError

T = TypeVar("T")
# Models that contain a supported text model, and its family if the config does not name it.
WRAPPERS = {"mistral3": "mistral", "ministral3": "ministral3"}
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model inside; a config that is not wrapped is returned as is.

    Raises:
        ConfigError: the wrapper is not supported.
    """
    inner, outer = raw.get("text_config"), raw.get("model_type")
    if not isinstance(inner, Mapping):
        return dict(raw)
    if outer not in WRAPPERS:
        what = f"model_type {str(outer)[:40]!r} with {str(inner.get('model_type'))[:40]!r} inside"
        raise ConfigError(f"config: {what} is not supported (supported: {', '.join(WRAPPERS)})")
    unwrapped = ("text_config", "vision_config", "architectures", "model_type")
    around = {key: value for key, value in raw.items() if key not in unwrapped}
    found = {**around, "model_type": WRAPPERS[outer], **inner}
    if isinstance(found.get("quantization"), Mapping):
        table = found["quantization"].items()
        found["quantization"] = {text_name(path) or path: entry for path, entry in table}
    return found


def text_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of the text model, by their names without the wrapper."""
    named = ((text_name(name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def text_name(name: str) -> str | None:
    """Return a tensor's or module's name without the wrapper; None if it is in another part."""
    if name.removeprefix("model.").startswith(OTHER_PARTS):
        return None
    if name.startswith("model.language_model."):
        return name.replace("language_model.", "", 1)
    return name.removeprefix("language_model.")
