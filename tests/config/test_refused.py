"""config.json: what cannot be computed is refused in one line, and so is nonsense."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_stream.config import ARCHITECTURES, Quantization, read_config
from mlx_stream.errors import LONGEST_LINE, ConfigError
from tests.fakes.configs import REQUIRED, read, refused
from tests.fakes.tiny import tiny_config

# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "Llama", "", "llama\nand more"])
def test_other_architectures_are_refused_and_the_supported_listed(kind):
    message = refused({**tiny_config(), "model_type": kind})
    assert repr(kind) in message
    assert all(supported in message for supported in ARCHITECTURES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.5),
        ("hidden_act", "gelu"),
        ("hidden_act", ["silu"]),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 256),
        ("attention_multiplier", 0.5),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8.0),
        ("logit_scale", 0.0625),
        ("no_rope_layers", [1, 1, 0]),
        ("num_local_experts", 8),
        ("num_experts", 16),
        ("use_qk_norm", True),
        ("qk_norm", True),
        ("use_sliding_window", True),
        ("attention_chunk_size", 8192),
        ("alibi", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["chunked_attention"] * 2),
        ("layer_types", "full_attention"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"bits": 4}),
        ("quantization_config", "awq"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_would_change_the_computation_is_refused_by_name(key, value, kind):
    message = refused(tiny_config(model_type=kind) | {key: value})
    assert key in message
    if isinstance(value, dict) and "quant_method" in value:
        assert "gptq" in message


COUNTS = (*REQUIRED[1:6], "num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys_are_named(key):
    raw = tiny_config()
    del raw[key]
    assert re.search(rf"\b{key} is missing", refused(raw))
    assert key in refused({**raw, key: None})
    assert "model_type is missing" in refused({})


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize(
    "value", [True, 0, -2, 2.0, "2", [2], {}, math.nan, math.inf, 2**31, 10**40], ids=str
)
def test_counts_must_be_whole_and_positive(key, value):
    assert re.search(rf"\b{key} must be a whole number", refused({**tiny_config(), key: value}))


@pytest.mark.parametrize(
    "value", [True, 0, -1e-5, "1e-5", [1e-5], math.nan, math.inf, 1e40, 10**400], ids=repr
)
def test_the_epsilon_must_be_a_positive_number(value):
    assert "rms_norm_eps must be a positive number" in refused(tiny_config(rms_norm_eps=value))


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [1, 0, "true", [], 0.5], ids=repr)
def test_flags_must_be_true_or_false(key, value):
    assert f"{key} must be true or false" in refused(tiny_config(**{key: value}))


def test_heads_that_do_not_divide():
    message = refused(tiny_config(num_attention_heads=6, num_key_value_heads=4))
    assert "6" in message and "num_key_value_heads 4" in message
    assert "num_key_value_heads" in refused(tiny_config(num_key_value_heads=8))
    message = refused(tiny_config(head_dim=None, hidden_size=66))
    assert "hidden_size 66" in message and "num_attention_heads 4" in message
    assert "head_dim 15" in refused(tiny_config(head_dim=15))
    assert "head_dim 1 " in refused(tiny_config(head_dim=None, hidden_size=4))


def test_model_type_must_be_text():
    for value in (3, ["llama"], True, {}):
        assert "model_type must be text" in refused({**tiny_config(), "model_type": value})


# -- quantization ---------------------------------------------------------------------------------


def test_quantization_is_read_with_its_overrides():
    entry = {
        "group_size": 64,
        "bits": 4,
        "lm_head": {"group_size": 32, "bits": 8},
        "model.norm": False,
        "model.embed_tokens": True,
    }
    config = read(quantization=entry, quantization_config=entry)
    assert config.quantized("lm_head") == Quantization(32, 8)
    assert config.quantized("model.norm") is None
    assert config.quantized("model.embed_tokens") == Quantization(64, 4)
    assert config.quantized("anything") == Quantization(64, 4, "affine")
    assert read().quantized("lm_head") is None


@pytest.mark.parametrize(
    ("entry", "named"),
    [
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
    ],
    ids=str,
)
def test_quantization_that_cannot_be_run_is_refused(entry, named):
    assert re.search(named, refused(tiny_config(quantization=entry)))


# -- anything at all ------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        *tiny_config(),
        "rope_scaling",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "quantization",
        "quantization_config",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    ]
)
INNER = st.sampled_from(
    [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "low_freq_factor",
        "high_freq_factor",
        "bits",
        "group_size",
        "mode",
        "quant_method",
        "partial_rotary_factor",
    ]
)
WORDS = st.sampled_from(
    [
        "llama",
        "mistral",
        "yarn",
        "linear",
        "llama3",
        "default",
        "silu",
        "affine",
        "mxfp4",
        "full_attention",
        "sliding_attention",
        "dynamic",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1, 128)
    | st.floats()
    | st.floats(0.1, 64)
    | WORDS
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(INNER | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=8,
)


@given(st.dictionaries(KEYS | st.text(max_size=6), JSON, max_size=4))
@settings(max_examples=400)
def test_any_config_is_read_or_refused_in_one_line(changes):
    try:
        config = read_config({**tiny_config(), **changes})
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1, repr(str(error))
        return
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim % 2 == 0 and config.head_dim > 0
    assert 0 < config.rms_norm_eps < math.inf
    assert config.rope.rope_type in ("default", "linear", "llama3", "yarn")
    assert 0 < config.rope.attention_factor < math.inf


@given(st.sampled_from(["rope_scaling", "rope_parameters"]), st.dictionaries(INNER, SCALARS))
@settings(max_examples=200)
def test_any_rotary_settings_are_read_or_refused_in_one_line(spelling, rope):
    try:
        read_config(tiny_config(**{spelling: rope}))
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1, repr(str(error))


def test_a_strangers_value_does_not_make_the_line_longer_than_a_line() -> None:
    for value in (list(range(10_000)), "x" * 100_000, {"a" * 5_000: None}):
        with pytest.raises(ConfigError) as error:
            read_config(tiny_config(hidden_size=value))
        line = str(error.value)
        assert len(line) <= LONGEST_LINE and "..." in line
        assert line.startswith("config: hidden_size must be a whole number from 1 to 2147483647")
