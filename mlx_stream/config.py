"""A model's configuration, checked and complete, in config.json's terms; holds no arrays.

Unknown keys are ignored, except those that would change the computation. Those are rejected by
name: ignoring them would silently produce wrong text.
"""

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

from mlx_stream.errors import ConfigError, MlxStreamError, one_line
from mlx_stream.rope import RopeConfig

ARCHITECTURES = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "smollm3")
SLIDING = ("mistral", "ministral3", "phi3")
# The trained context of families whose configs may omit it, as in transformers.
TRAINED = {
    "llama": 2_048,
    "mistral": 131_072,
    "ministral3": 262_144,
    "qwen2": 32_768,
    "qwen3": 32_768,
    "phi3": 4_096,
    "smollm3": 32_768,
}
ROPE_TYPES = "default, linear, llama3, yarn"

# Keys that change the computation, each with the values that leave it unchanged. From the
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
    "num_kv_shared_layers": (None, 0),
    "use_bidirectional_attention": (None, False),
    "attn_temperature_tuning": (None, False, 0),
    "num_key_value_heads_per_layer": (None,),
    "block_configs": (None,),
    "no_rope_layer_interval": (None, 0),
    "model_file": (None,),
}
# Keys of `NEUTRAL` that a family reads.
READ = {
    "phi3": ("partial_rotary_factor",),
    "smollm3": ("no_rope_layers", "no_rope_layer_interval"),
}


# The bits and group sizes that mx.quantize accepts in each mode.
QUANTIZATION_MODES = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
# Tools whose models `convert` can read, by their names in `quantization_config`.
OTHER_QUANTIZERS = ("awq", "gptq", "fp8")


@dataclass(frozen=True)
class Quantization:
    """How one module's weight is quantized, as arguments to `mx.quantize`."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True)
class ModelConfig:
    """The settings of a model, named as in config.json.

    `sliding_window` limits the window of a stream (Mistral and Phi-3 only). `position_limit` limits
    its sinks and window together: beyond that many positions the model computes differently. The
    layers in `unrotated_layers` have no rotary positions.
    `max_position_embeddings` is the trained context in tokens. `quantization` maps a module path to
    how it is quantized, or None; the empty path holds the default for all other paths.
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
    position_limit: int | None = None
    unrotated_layers: tuple[int, ...] = ()
    quantization: Mapping[str, Quantization | None] | None = None

    def quantized(self, path: str) -> Quantization | None:
        """Return how the module at `path` is quantized if it has scales."""
        if self.quantization is None:
            return None
        return self.quantization.get(path, self.quantization[""])


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Check the content of a config.json and fill in its defaults.

    Raises:
        ConfigError: a key is missing, has the wrong type, is out of range or is not supported.
    """
    keys = Keys(raw)
    model_type = keys.text("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"config: model_type {model_type!r} is not supported (supported: "
            f"{', '.join(ARCHITECTURES)})"
        )
    refuse_unsupported(raw, READ.get(model_type, ()))
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
    layers = keys.count("num_hidden_layers", most=10_000)
    rope = read_rope(raw, trained, model_type)
    check_rotary_dim(rope, head_dim)
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=keys.count("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=keys.count("vocab_size"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        max_position_embeddings=trained,
        rope=rope,
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        attention_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
        sliding_window=read_sliding_window(raw) if model_type in SLIDING else None,
        position_limit=read_position_limit(raw, trained, rope),
        unrotated_layers=read_unrotated(keys, layers) if model_type == "smollm3" else (),
        quantization=read_quantization(raw),
    )


def refuse_unsupported(raw: Mapping[str, Any], read: tuple[str, ...]) -> None:
    for key, neutral in NEUTRAL.items():
        if key not in read and raw.get(key) not in neutral:
            raise ConfigError(
                f"config: {key} = {shorten(raw[key])} changes the computation and is not supported"
            )
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or len({str(kind) for kind in kinds}) > 1:
        raise ConfigError(
            "config: layer_types with several kinds of attention are not supported: all layers of "
            "a stream share one window"
        )
    if kinds and kinds[0] not in ("full_attention", "sliding_attention"):
        raise ConfigError(f"config: layer_types {kinds[0]!r} is not supported")
    if raw.get("quantization_config") is not None and raw.get("quantization") is None:
        entry = raw["quantization_config"]
        method = entry.get("quant_method", "unknown") if isinstance(entry, Mapping) else entry
        if isinstance(entry, Mapping) and method in OTHER_QUANTIZERS:
            raise ConfigError(
                f"config: models quantized with {method} can be read only by convert, and "
                "only without --device: run mlx_stream convert MODEL FOLDER, then use FOLDER"
            )
        raise ConfigError(
            f"config: quantization_config of method {method!r} is not supported: use the "
            "unquantized checkpoint, or one that mlx-lm quantized"
        )


def read_rope(raw: Mapping[str, Any], trained: int, model_type: str) -> RopeConfig:
    """Read the rotary settings in both spellings, which must not contradict each other.

    transformers 5 writes `rope_parameters` with `rope_theta` inside; older files have `rope_theta`
    and `rope_scaling`.
    """
    settings: dict[str, Any] = {}
    spellings = [read_object(raw, key) or {} for key in ("rope_scaling", "rope_parameters")]
    outside = {name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    for spelling in (*spellings, outside):
        rope_type = spelling.get("rope_type", spelling.get("type"))
        if spelling.keys() - outside and rope_type is None:
            raise ConfigError("config: the rotary settings have no rope_type")
        for key, value in spelling.items():
            name = "rope_type" if key == "type" else key
            if value is not None and settings.setdefault(name, value) not in (value,):
                raise ConfigError(
                    f"config: the rotary settings disagree on {name}: "
                    f"{shorten(settings[name])} and {shorten(value)}"
                )
    original = "original_max_position_embeddings"
    if raw.get(original) is not None:
        settings[original] = raw[original]
    keys = Keys(settings, "config: rope")
    if model_type != "phi3":
        if settings.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
            raise ConfigError("config: rope: partial_rotary_factor is not supported")
        return build_rope(keys, trained)
    # As in transformers, "su" and "yarn" are older names for longrope in Phi-3's files.
    if settings.get("rope_type") in ("longrope", "su", "yarn"):
        rope = build_longrope(keys, trained)
    else:
        rope = build_rope(keys, trained)
    return replace(rope, partial_rotary_factor=keys.number("partial_rotary_factor", 1.0))


def build_rope(keys: "Keys", trained: int) -> RopeConfig:
    rope_type = keys.text("rope_type", "default")
    theta = keys.number("rope_theta", 10_000.0)
    # Beyond these a frequency is 0 or infinite in float32.
    if not 1 < theta <= 1e15 or not 1e-6 <= keys.number("factor", 1.0) <= 1e6:
        raise ConfigError("config: rope: rope_theta or factor is out of range")
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type == "linear":
        return RopeConfig(theta, "linear", keys.number("factor"))
    if rope_type == "dynamic":
        raise ConfigError(
            "config: rope_type 'dynamic' changes its frequencies with the length of the text and "
            f"cannot be used on a stream (supported: {ROPE_TYPES})"
        )
    if rope_type not in ("llama3", "yarn"):
        raise ConfigError(
            f"config: rope_type {shorten(rope_type)} is not supported (supported: {ROPE_TYPES})"
        )
    original = keys.count("original_max_position_embeddings", trained)
    if rope_type == "yarn":
        return build_yarn(keys, theta, trained, original)
    low, high = keys.number("low_freq_factor", 1.0), keys.number("high_freq_factor", 4.0)
    if high <= low:
        raise ConfigError("config: rope: high_freq_factor must exceed low_freq_factor")
    return RopeConfig(theta, "llama3", keys.number("factor"), low, high, original)


def build_yarn(keys: "Keys", theta: float, trained: int, original: int) -> RopeConfig:
    factor = keys.number("factor", trained / original)
    magnitude = yarn_magnitude(factor)
    if keys.raw.get("attention_factor") is not None:
        magnitude = keys.number("attention_factor")
    elif keys.raw.get("mscale") and keys.raw.get("mscale_all_dim"):
        scales = (keys.number("mscale"), keys.number("mscale_all_dim"))
        over, under = (yarn_magnitude(factor, scale) for scale in scales)
        magnitude = over / under
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=keys.number("beta_fast", 32.0),
        beta_slow=keys.number("beta_slow", 1.0),
        truncate=keys.flag("truncate", True),
        attention_factor=magnitude,
    )


def build_longrope(keys: "Keys", trained: int) -> RopeConfig:
    """Read the frequencies for the original context; beyond it, a model uses different ones."""
    short = keys.value("short_factor")
    if not isinstance(short, list) or not all(
        isinstance(value, int | float) and 1e-6 <= value <= 1e6 for value in short
    ):
        raise keys.wrong("short_factor", "an array of positive numbers")
    original = keys.count("original_max_position_embeddings", trained, least=2)
    growth = trained / original
    magnitude = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(original))
    return RopeConfig(
        keys.number("rope_theta", 10_000.0),
        "longrope",
        original_max_position_embeddings=original,
        attention_factor=keys.number("attention_factor", magnitude),
        short_factor=tuple(short),
    )


def check_rotary_dim(rope: RopeConfig, head_dim: int) -> None:
    dim = rope.rotary_dim(head_dim)
    if not 2 <= dim <= head_dim or dim % 2:
        raise ConfigError(
            f"config: partial_rotary_factor {rope.partial_rotary_factor} x head_dim {head_dim} "
            "must be an even number"
        )
    if rope.rope_type == "longrope" and len(rope.short_factor) != dim // 2:
        raise ConfigError(
            f"config: rope: short_factor has {len(rope.short_factor)} numbers, but {dim} rotary "
            f"dimensions need {dim // 2}"
        )


def read_unrotated(keys: "Keys", layers: int) -> tuple[int, ...]:
    """Return the SmolLM3 layers without rotary positions: those with 0 in `no_rope_layers`."""
    rotated = keys.raw.get("no_rope_layers")
    if rotated is None:
        every = keys.count("no_rope_layer_interval", 4)
        return tuple(range(every - 1, layers, every))
    valid = isinstance(rotated, list) and all(flag in (0, 1) for flag in rotated)
    if not valid or len(rotated) != layers:
        raise keys.wrong("no_rope_layers", f"an array of {layers} zeros or ones")
    return tuple(layer for layer, flag in enumerate(rotated) if not flag)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise Keys(raw).wrong(key, "an object")
    return value


def read_sliding_window(raw: Mapping[str, Any]) -> int | None:
    kinds = raw.get("layer_types") or []
    if raw.get("sliding_window") is None or (kinds and kinds[0] == "full_attention"):
        return None
    return Keys(raw).count("sliding_window")


def read_position_limit(raw: Mapping[str, Any], trained: int, rope: RopeConfig) -> int | None:
    """Return the length beyond which a model computes positions differently, if any.

    With longrope, the frequencies change there. With `llama_4_scaling_beta`, a factor on queries is
    1 up to that length: 1 + beta log(1 + floor(position / original)), as in transformers'
    `modeling_ministral3`.
    """
    if rope.rope_type == "longrope":
        return rope.original_max_position_embeddings
    for key in ("rope_scaling", "rope_parameters"):
        keys = Keys(read_object(raw, key) or {}, f"config: {key}")
        if keys.raw.get("llama_4_scaling_beta") not in (None, 0):
            return keys.count("original_max_position_embeddings", trained)
    return None


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
    """Typed access to an untrusted object's keys, with errors that name the file and the key."""

    raw: Mapping[str, Any]
    where: str = "config"
    error: type[MlxStreamError] = ConfigError

    def count(
        self, key: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        value = self.value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        # JSON's NaN and Infinity reach us as floats; neither is in this range.
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def value(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{self.where}: {key} is missing")
        return value

    def wrong(self, key: str, expected: str) -> MlxStreamError:
        given = shorten(self.raw.get(key))
        return self.error(f"{self.where}: {key} must be {expected}, not {given}")


def shorten(value: object) -> str:
    """Show a value from an untrusted file on one short line."""
    if isinstance(value, Sized) and not isinstance(value, str):
        return f"{'an object' if isinstance(value, Mapping) else 'an array'} of {len(value)}"
    return one_line(repr(value), 60)
