"""A model's configuration, checked and complete; knows config.json's words, no arrays.

Keys this package does not know are ignored, as everywhere, except those that would change the
computation: they are refused by name, because running without them gives wrong text in silence.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_stream.errors import ConfigError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# The trained context of a family whose config does not say it, as in transformers.
TRAINED = {"llama": 2_048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}

# Keys that change what is computed, with the values that leave it as it is. Read from the
# configurations of transformers' models that are derived from Llama.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "hidden_act": (None, "silu", "swish"),
    "attn_logit_softcapping": (None, 0, 0.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "no_rope_layers": (None, [], ()),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "use_sliding_window": (None, False),
    "attention_chunk_size": (None,),
    "hidden_activation": (None, "silu", "swish"),
    "mlp_hidden_act": (None, "silu", "swish"),
    "rope_traditional": (None, False),
    "rope_interleaved": (None, False),
    "rotary_pct": (None, 1, 1.0),
    "clip_qkv": (None,),
    "use_parallel_residual": (None, False),
    "is_causal": (None, True),
    "llama_4_scaling": (None,),
    "scale_emb": (None, 1, 1.0),
    "alibi": (None, False),
}


# The bits and group sizes that mx.quantize takes in each mode.
QUANTIZATION_MODES = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Quantization:
    """How one module's weight is quantized: as `mx.quantize` takes it."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions, complete: every default of transformers' `modeling_rope_utils` filled in.

    `rope_type` is default, linear, llama3 or yarn; fields a type does not use keep their defaults.
    `attention_factor` (yarn) multiplies queries and keys alike.
    """

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8_192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """What a model computes, in config.json's names.

    `sliding_window` bounds the window of a stream (Mistral only); `max_position_embeddings` is the
    trained context in tokens. `quantization` maps a module path to how it is quantized, or None;
    the empty path holds the default of paths not named.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    quantization: Mapping[str, Quantization | None] | None = None

    def quantized(self, path: str) -> Quantization | None:
        """Return how the module at `path` is quantized if its scales are there."""
        if self.quantization is None:
            return None
        return self.quantization.get(path, self.quantization[""])


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Check what config.json holds and return it complete.

    Raises:
        ConfigError: a key is missing, of the wrong type or out of range; the architecture or a
            feature is not supported (named).
    """
    keys = Keys(raw)
    model_type = keys.text("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"config: model_type {model_type!r} is not supported (supported: "
            f"{', '.join(ARCHITECTURES)})"
        )
    refuse_unsupported(raw)
    heads = keys.count("num_attention_heads")
    hidden = keys.count("hidden_size")
    kv_heads = keys.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if raw.get("head_dim") is None and model_type != "qwen3" and hidden % heads:
        raise ConfigError(
            f"config: hidden_size {hidden} is not a multiple of num_attention_heads {heads} "
            "and there is no head_dim"
        )
    head_dim = keys.count("head_dim", 128 if model_type == "qwen3" else hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config: head_dim {head_dim} must be even for rotary positions")
    trained = keys.count("max_position_embeddings", TRAINED[model_type])
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        num_hidden_layers=keys.count("num_hidden_layers", limit=10_000),
        intermediate_size=keys.count("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=keys.count("vocab_size"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        max_position_embeddings=trained,
        rope=read_rope(raw, trained),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        # In transformers, what the config of another family says of biases changes nothing.
        attention_bias=model_type in ("llama", "qwen3") and keys.flag("attention_bias"),
        mlp_bias=model_type == "llama" and keys.flag("mlp_bias"),
        sliding_window=read_sliding_window(raw) if model_type == "mistral" else None,
        quantization=read_quantization(raw),
    )


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for key, neutral in NEUTRAL.items():
        if raw.get(key) not in neutral:
            raise ConfigError(
                f"config: {key} = {raw[key]!r} changes the computation and is not supported"
            )
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or len({str(kind) for kind in kinds}) > 1:
        raise ConfigError(
            "config: layer_types that mix kinds of attention is not supported (all layers of a "
            "stream share one window)"
        )
    if kinds and kinds[0] not in ("full_attention", "sliding_attention"):
        raise ConfigError(f"config: layer_types {kinds[0]!r} is not supported")
    if raw.get("quantization_config") is not None and raw.get("quantization") is None:
        method = raw["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
        raise ConfigError(
            f"config: quantization_config of method {method!r} is not supported (use the "
            "unquantized checkpoint, or one in mlx-lm's layout)"
        )


def read_rope(raw: Mapping[str, Any], trained: int) -> RopeConfig:
    """Read either spelling of the rotary settings: two keys, or one `rope_parameters`.

    transformers 5 writes `rope_parameters` with `rope_theta` inside; older files have `rope_theta`
    and `rope_scaling`. A file with both must say the same in both.
    """
    older = {**(read_object(raw, "rope_scaling") or {})}
    newer = {**(read_object(raw, "rope_parameters") or {})}
    thetas = [older.pop("rope_theta", None), newer.pop("rope_theta", None), raw.get("rope_theta")]
    given = [theta for theta in thetas if theta is not None]
    for settings in (older, newer):
        spelling = settings.pop("type", None)
        if spelling is not None and settings.setdefault("rope_type", spelling) != spelling:
            raise ConfigError("config: rope_scaling has a type and a rope_type that disagree")
        if settings and settings.get("rope_type") is None:
            raise ConfigError("config: rope_scaling has no rope_type")
    disagree = [key for key in older.keys() & newer.keys() if older[key] != newer[key]]
    if newer and older and (disagree or older["rope_type"] != newer["rope_type"]):
        raise ConfigError(
            f"config: rope_scaling and rope_parameters disagree on {', '.join(sorted(disagree))}"
        )
    if any(theta != given[0] for theta in given[1:]):
        raise ConfigError(f"config: rope_theta is given as {given[0]!r} and {given[1]!r}: disagree")
    settings = {**older, **newer, "rope_theta": given[0] if given else None}
    if raw.get("original_max_position_embeddings") is not None:
        settings["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return build_rope(Keys(settings, "config: rope"), trained)


def build_rope(keys: "Keys", trained: int) -> RopeConfig:
    rope_type = keys.text("rope_type", "default")
    if keys.raw.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise ConfigError("config: partial_rotary_factor changes the computation, not supported")
    theta = keys.number("rope_theta", 10_000.0)
    # Beyond these a frequency is 0 or infinite in float32.
    if not 1 < theta <= 1e15 or not 1e-6 <= keys.number("factor", 1.0) <= 1e6:
        raise ConfigError("config: rope: rope_theta or factor is out of range")
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type == "linear":
        return RopeConfig(theta, "linear", keys.number("factor"))
    if rope_type == "llama3":
        if keys.number("high_freq_factor", 4.0) <= keys.number("low_freq_factor", 1.0):
            raise ConfigError("config: rope: high_freq_factor must exceed low_freq_factor")
        return RopeConfig(
            theta,
            "llama3",
            keys.number("factor"),
            low_freq_factor=keys.number("low_freq_factor", 1.0),
            high_freq_factor=keys.number("high_freq_factor", 4.0),
            original_max_position_embeddings=keys.count(
                "original_max_position_embeddings", trained
            ),
        )
    if rope_type == "yarn":
        return build_yarn(keys, theta, trained)
    if rope_type == "dynamic":
        raise ConfigError(
            "config: rope_type 'dynamic' changes its frequencies with the length of the text and "
            "cannot be used on a stream (supported: default, linear, llama3, yarn)"
        )
    raise ConfigError(
        f"config: rope_type {rope_type!r} is not supported (supported: default, linear, llama3, "
        "yarn)"
    )


def build_yarn(keys: "Keys", theta: float, trained: int) -> RopeConfig:
    original = keys.count("original_max_position_embeddings", trained)
    factor = keys.number("factor", trained / original)
    scales = [keys.raw.get("mscale"), keys.raw.get("mscale_all_dim")]
    if keys.raw.get("attention_factor") is not None:
        magnitude = keys.number("attention_factor")
    elif all(scales):
        magnitude = yarn_magnitude(factor, keys.number("mscale")) / yarn_magnitude(
            factor, keys.number("mscale_all_dim")
        )
    else:
        magnitude = yarn_magnitude(factor)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=keys.number("beta_fast", 32.0),
        beta_slow=keys.number("beta_slow", 1.0),
        truncate=keys.raw.get("truncate") is None or keys.flag("truncate"),
        attention_factor=magnitude,
    )


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"config: {key} must be an object, not {value!r}")
    return value


def read_sliding_window(raw: Mapping[str, Any]) -> int | None:
    kinds = raw.get("layer_types") or []
    if raw.get("sliding_window") is None or (kinds and kinds[0] == "full_attention"):
        return None
    return Keys(raw).count("sliding_window")


def read_quantization(raw: Mapping[str, Any]) -> dict[str, Quantization | None] | None:
    entry = read_object(raw, "quantization")
    if entry is None:
        return None
    table: dict[str, Quantization | None] = {"": read_one_quantization("quantization", entry)}
    for path, override in entry.items():
        if override is False:
            table[path] = None
        elif isinstance(override, Mapping):
            table[path] = read_one_quantization(f"quantization[{path!r}]", override)
    return table


def read_one_quantization(where: str, entry: Mapping[str, Any]) -> Quantization:
    keys = Keys(entry, f"config: {where}")
    mode = keys.text("mode", "affine")
    bits, group_size = keys.count("bits"), keys.count("group_size")
    all_bits, group_sizes = QUANTIZATION_MODES.get(mode, ((), ()))
    if bits not in all_bits or group_size not in group_sizes:
        raise ConfigError(
            f"config: {where}: {bits} bits in groups of {group_size} in mode {mode!r} is not "
            "supported"
        )
    return Quantization(group_size, bits, mode)


@dataclass(frozen=True)
class Keys:
    """Typed reading of an object of a JSON file, with errors that name the key."""

    raw: Mapping[str, Any]
    where: str = "config"

    def count(self, key: str, default: int | None = None, limit: int = 2**31 - 1) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ConfigError(
                f"{self.where}: {key} must be a whole number from 1 to {limit}, not {value!r}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        # JSON's NaN and Infinity reach us as floats; neither is in this range.
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise ConfigError(f"{self.where}: {key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} must be true or false, not {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: {key} must be text, not {value!r}")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        return default
