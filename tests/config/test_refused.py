"""An unsupported or malformed config.json is refused in one line."""

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_stream.config import ARCHITECTURES, READ, Quantization, read_config
from mlx_stream.errors import ConfigError
from tests.fakes.configs import read, refused
from tests.fakes.tiny import LLAMA3, LONGROPE, PHI3, SMOLLM3, YARN, tiny_config

LINEAR = {"rope_type": "linear", "factor": 2.0}
SUPPORTED = "default, linear, llama3, yarn"
REQUIRED = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")
REQUIRED += ("num_attention_heads", "vocab_size", "rms_norm_eps")
COUNTS = (*REQUIRED[1:6], "num_key_value_heads", "head_dim", "max_position_embeddings")
NO_NUMBERS = (True, 0, -1.0, "1", [1], math.nan, math.inf)

# --- changes to a config, and the error it raises ---

# Keys that change the computation, in each family.
KEYS_THAT_MATTER = {
    **{"partial_rotary_factor": 0.5, "attn_logit_softcapping": 50.0, "logits_scaling": 8.0},
    **{"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256, "logit_scale": 0.0625},
    **{"attention_multiplier": 0.5, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    **{"no_rope_layers": [1, 1, 0], "num_local_experts": 8, "num_experts": 16, "qk_norm": True},
    **{"use_qk_norm": True, "use_sliding_window": True, "attention_chunk_size": 8192},
    **{"alibi": True, "hidden_act": "gelu", "layer_types": "full_attention"},
}
COMPUTED: list[tuple[dict[str, Any], str]] = [
    *(({key: value}, key) for key, value in KEYS_THAT_MATTER.items()),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    *(({"quantization_config": value}, "quantization_config") for value in ({"bits": 4}, "awq")),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config.*bitsand"),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantized with gptq can be read only by .*: run mlx_stre",
    ),
]
# Rotary settings, in each spelling.
ROPES: list[tuple[Any, str]] = [
    ({"rope_type": "dynamic", "factor": 2.0}, f"'dynamic'.*{SUPPORTED}"),
    ({"type": "dynamic", "factor": 2.0}, "'dynamic'"),
    ({"rope_type": "longrope", "factor": 2.0}, f"'longrope'.*{SUPPORTED}"),
    ({"type": "su", "long_factor": [1.0]}, "'su'"),
    ({"rope_type": 3}, "rope_type"),
    ({"rope_type": None, "factor": 2.0}, "rope_type"),
    ({"factor": 2.0}, "rope_type"),
    ({"rope_type": "linear"}, "factor is missing"),
    ({"rope_type": "llama3"}, "factor is missing"),
    *(({"rope_type": "linear", "factor": value}, "factor") for value in NO_NUMBERS),
    *(({"rope_type": "default", "rope_theta": value}, "rope_theta") for value in NO_NUMBERS),
    ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor"),
    ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
    ({**YARN, "beta_fast": -3}, "beta_fast"),
    ({**YARN, "beta_slow": [1]}, "beta_slow"),
    ({**YARN, "truncate": 1}, "truncate"),
    ({**YARN, "attention_factor": 0}, "attention_factor"),
    ({**YARN, "mscale": "a", "mscale_all_dim": 1.0}, "mscale"),
    ({**LINEAR, "type": "yarn"}, "disagree"),
    ({**LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"full_attention": {"rope_type": "default"}}, "rope_type"),
    ("linear", "object"),
    ([LINEAR], "object"),
    # Without finite frequencies.
    ({**LLAMA3, "low_freq_factor": 4.0}, "rope"),
    ({**LLAMA3, "low_freq_factor": 5.0}, "rope"),
]
SHORT = LONGROPE["rope_scaling"]
PHI3S: list[tuple[dict[str, Any], str]] = [
    *(({"partial_rotary_factor": value}, "partial_rotary_factor") for value in (0, "1", 1.25, 0.7)),
    ({"partial_rotary_factor": 0.5}, "short_factor has 6 .* need 4"),
    ({"rope_scaling": {**SHORT, "partial_rotary_factor": 0.5}}, "disagree"),
    *(
        ({"rope_scaling": {**SHORT, "short_factor": value}}, "short_factor")
        for value in (None, 1.0, [], [1.0] * 5, [1.0] * 5 + ["1"], [1.0] * 5 + [0], [math.nan] * 6)
    ),
    ({"rope_scaling": {**SHORT, "attention_factor": 0}}, "attention_factor"),
    ({"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
]
UNROTATED = ([1, 0, 1], [1, 0, 1, 2], ["1"] * 4, [[1]] * 4, 4, "1010")
# Unsupported quantization.
QUANTIZATIONS: list[tuple[Any, str]] = [
    ({"group_size": 64}, "bits is missing"),
    ({"bits": 4}, "group_size is missing"),
    ({"group_size": 64, "bits": 7}, "7 bits"),
    ({"group_size": 64, "bits": 4.0}, "bits"),
    ({"group_size": 48, "bits": 4}, "groups of 48"),
    ({"group_size": 64, "bits": True}, "bits"),
    ({"group_size": 64, "bits": 4, "mode": "magic"}, "magic"),
    ({"group_size": 32, "bits": 8, "mode": "mxfp4"}, "mxfp4"),
    ({"group_size": 64, "bits": 4, "mode": 3}, "mode"),
    ({"group_size": 64, "bits": 4, "lm_head": {"bits": 4}}, "lm_head.*group_size"),
    ({"group_size": 64, "bits": 4, "a\nb": {"bits": 4}}, "group_size"),
    ({}, "missing"),
    (4, "object"),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        (change | {"model_type": kind}, why)
        for kind in ARCHITECTURES
        for change, why in COMPUTED
        if not change.keys() & set(READ.get(kind, ()))
    ),
    *(({**PHI3, **LONGROPE, **change}, why) for change, why in PHI3S),
    *(({**SMOLLM3, "no_rope_layers": value}, "no_rope_layers") for value in UNROTATED),
    ({**SMOLLM3, "no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    *(({"model_type": kind}, "supported: llama, mistral") for kind in ("gemma2", "Llama", "a\nb")),
    *(({"model_type": value}, "model_type must be text") for value in (3, ["llama"], True, {})),
    *(({key: None}, rf"\b{key} is missing") for key in REQUIRED),
    *(
        ({key: value}, rf"\b{key} must be a whole number")
        for key in COUNTS
        for value in (*NO_NUMBERS, 2.0, {}, 2**31, 10**40)
    ),
    *(
        ({"rms_norm_eps": value}, "rms_norm_eps must be a positive number")
        for value in (*NO_NUMBERS, 1e40, 10**400)
    ),
    *(
        ({key: value}, f"{key} must be true or false")
        for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")
        for value in (1, "true", [])
    ),
    ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6.*num_key_value_heads 4"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"head_dim": None, "hidden_size": 66}, "hidden_size 66.*num_attention_heads 4"),
    ({"head_dim": 15}, "head_dim 15"),
    ({"head_dim": None, "hidden_size": 4}, "head_dim 1 "),
    *(
        ({"model_type": "mistral", "sliding_window": value}, "sliding_window")
        for value in (0, -1, 2.5, "8", True)
    ),
    *(({"rope_theta": value}, "rope_theta") for value in NO_NUMBERS),
    *(({key: r}, why) for key in ("rope_scaling", "rope_parameters") for r, why in ROPES),
    *(
        (spellings, f"disagree.*{named}|{named}.*disagree")
        for spellings, named in (
            ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
            ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 3.0}}, "factor"),
            ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "rope_type"),
        )
    ),
    ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope"),
    ({"rope_scaling": {**LINEAR, "factor": 1e29}, "rope_theta": 1e29}, "rope"),
    *(({"quantization": entry}, why) for entry, why in QUANTIZATIONS),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=str)
def test_unsupported_configs_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    assert re.search(named, refused({**tiny_config(), **changes}))


def test_an_empty_config_lacks_its_first_key() -> None:
    assert "model_type is missing" in refused({})


def test_quantization_is_read_with_its_overrides():
    entry = {
        **{"group_size": 64, "bits": 4, "model.norm": False, "model.embed_tokens": True},
        "lm_head": {"group_size": 32, "bits": 8},
    }
    config = read(quantization=entry, quantization_config=entry)
    assert config.quantized("lm_head") == Quantization(32, 8)
    assert config.quantized("model.norm") is None
    assert config.quantized("model.embed_tokens") == Quantization(64, 4)
    assert config.quantized("anything") == Quantization(64, 4, "affine")
    assert read().quantized("lm_head") is None


# --- anything at all ---

KEYS = "rope_scaling rope_parameters layer_types sliding_window quantization quantization_config"
KEYS = (*KEYS.split(), "original_max_position_embeddings", "partial_rotary_factor", *tiny_config())
names = "rope_type type rope_theta factor mscale mscale_all_dim attention_factor beta_fast"
names += " original_max_position_embeddings beta_slow truncate low_freq_factor high_freq_factor"
INNER = st.sampled_from(f"{names} bits group_size mode quant_method partial_rotary_factor".split())
WORDS = "llama mistral yarn linear llama3 default silu affine mxfp4 full_attention dynamic"
NUMBERS = st.integers() | st.integers(1, 128) | st.floats() | st.floats(0.1, 64)
TEXTS = st.sampled_from([*WORDS.split(), "sliding_attention"]) | st.text(max_size=8)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(INNER | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=8,
)
ROTARY = st.sampled_from(["rope_scaling", "rope_parameters"])


@given(
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), JSON, max_size=4)
    | st.dictionaries(ROTARY, st.dictionaries(INNER, SCALARS), min_size=1, max_size=1)
)
@settings(max_examples=500)
def test_any_config_is_read_or_refused_in_one_line(changes):
    try:
        config = read_config({**tiny_config(), **changes})
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1, repr(str(error))
        return
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim % 2 == 0 and config.head_dim > 0
    assert 0 < config.rms_norm_eps < math.inf
    assert config.rope.rope_type in SUPPORTED
    assert 0 < config.rope.attention_factor < math.inf


def test_a_huge_value_does_not_make_a_long_line() -> None:
    for value in (list(range(10_000)), "x" * 100_000, {"a" * 5_000: None}):
        line = refused(tiny_config(hidden_size=value))
        assert len(line) < 160
        assert line.startswith("config: hidden_size must be a whole number from 1 to 2147483647")
