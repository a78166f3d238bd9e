"""config.json: what is accepted is complete and right, what is not is refused in one line."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import rope_inv_freq
from tiny import tiny_config
from transformers import LlamaConfig, MistralConfig

from mlx_stream.config import (
    ARCHITECTURES,
    ModelConfig,
    Quantization,
    RopeConfig,
    read_config,
)
from mlx_stream.errors import ConfigError
from mlx_stream.rope import Rope, inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def refused(raw: dict) -> str:
    """Return the message a config is refused with: one line, of a length people read."""
    with pytest.raises(ConfigError) as error:
        read_config(raw)
    message = str(error.value)
    assert message.startswith("config")
    assert len(message.splitlines()) == 1
    return message


def read(**changes) -> ModelConfig:
    return read_config(tiny_config(**changes))


# -- what is accepted -----------------------------------------------------------------------------


def test_a_complete_config_is_read_as_it_is():
    assert read() == ModelConfig(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=300,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope=RopeConfig(),
    )
    biased = read(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert (biased.attention_bias, biased.mlp_bias, biased.tie_word_embeddings) == (True,) * 3


def test_configs_are_frozen():
    config = read()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]


BASE = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "rms_norm_eps")


@pytest.mark.parametrize(("kind", "peer"), [("llama", LlamaConfig), ("mistral", MistralConfig)])
@pytest.mark.parametrize("absent", ["missing", "null"])
@pytest.mark.parametrize("heads", [4, 8])
def test_defaults_are_those_of_transformers(kind, peer, absent, heads):
    raw: dict[str, Any] = {key: tiny_config()[key] for key in BASE}
    raw |= {"model_type": kind, "num_attention_heads": heads}
    # transformers gives a Mistral 8 key heads and a window of 4096 if its file is silent.
    raw |= {"num_key_value_heads": heads, "sliding_window": None} if kind == "mistral" else {}
    expected = peer(**raw)
    if absent == "null":
        optional = ("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters")
        optional += ("tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta")
        raw |= dict.fromkeys((*optional, "max_position_embeddings", "layer_types", "hidden_act"))
    config = read_config(raw)
    assert config.num_key_value_heads == expected.num_key_value_heads
    assert config.head_dim == expected.head_dim
    assert config.max_position_embeddings == expected.max_position_embeddings
    assert config.tie_word_embeddings == expected.tie_word_embeddings
    assert config.attention_bias == getattr(expected, "attention_bias", False)
    assert config.mlp_bias == getattr(expected, "mlp_bias", False)
    assert config.rope.rope_theta == expected.rope_parameters["rope_theta"]
    assert config.rope.rope_type == expected.rope_parameters["rope_type"]
    assert config.sliding_window is None


def test_a_head_dim_need_not_divide_the_hidden_size():
    assert read(head_dim=24, hidden_size=50).head_dim == 24
    assert read(head_dim=None, hidden_size=48).head_dim == 12


def test_unknown_keys_are_ignored():
    assert read(use_cache=True, torch_dtype="float16", surprise={"a": [1]}) == read()


def test_keys_that_would_change_the_computation_may_hold_their_neutral_value():
    neutral = {
        "partial_rotary_factor": 1.0,
        "hidden_act": "silu",
        "attn_logit_softcapping": None,
        "logit_scale": 1,
        "no_rope_layers": [],
        "num_local_experts": 1,
        "qk_norm": False,
        "layer_types": ["full_attention"] * 2,
    }
    assert read(**neutral) == read()


def test_sliding_windows_are_for_mistral():
    assert read(sliding_window=7).sliding_window is None
    assert read(model_type="mistral", sliding_window=7).sliding_window == 7
    assert read(model_type="mistral", sliding_window=None).sliding_window is None
    for kind, expected in (("full_attention", None), ("sliding_attention", 7)):
        changes = {"sliding_window": 7, "layer_types": [kind] * 2}
        assert read(model_type="mistral", **changes).sliding_window == expected
    for value in (0, -1, 2.5, "8", True):
        assert "sliding_window" in refused(tiny_config(model_type="mistral", sliding_window=value))


def test_a_mistral_s_biases_are_not_read():
    config = read(model_type="mistral", attention_bias=True, mlp_bias=True)
    assert not config.attention_bias and not config.mlp_bias


# -- rotary settings ------------------------------------------------------------------------------

ROPES = [
    {"rope_type": "default"},
    LINEAR,
    {"type": "linear", "factor": 2.5},
    {"type": "linear", "rope_type": "linear", "factor": 3},
    LLAMA3,
    LLAMA3 | {"low_freq_factor": 0.5, "high_freq_factor": 3.0},
    {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    YARN,
    {"type": "yarn", "factor": 4.0},
    YARN | {"factor": 1.0},
    YARN | {"factor": None},
    YARN | {"attention_factor": 0.8},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    YARN | {"mscale": 0.7},
    YARN | {"mscale": 0.7, "mscale_all_dim": 0},
    YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
    YARN | {"truncate": False},
    YARN | {"truncate": True},
    YARN | {"original_max_position_embeddings": 4, "beta_fast": 1.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters", "both"])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_frequencies_equal_the_reference_in_both_spellings(rope, spelling, head_dim):
    raw = tiny_config(rope_theta=50_000.0, head_dim=head_dim)
    if spelling != "rope_parameters":
        raw["rope_scaling"] = dict(rope)
    if spelling != "rope_scaling":
        raw["rope_parameters"] = {**rope, "rope_theta": 50_000.0}
    if spelling == "rope_parameters":
        del raw["rope_theta"]
    config = read_config(raw)
    expected, magnitude = rope_inv_freq(raw)
    got = inverse_frequencies(config.rope, head_dim)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    rotation = Rope(config.rope, head_dim)
    np.testing.assert_allclose(np.array(rotation.periods), 1 / expected, rtol=1e-6)
    assert rotation.magnitude == config.rope.attention_factor == pytest.approx(magnitude, rel=1e-12)


def test_the_trained_length_beside_the_rotary_settings_counts():
    for rope in (YARN, LLAMA3):
        raw = tiny_config(rope_scaling=rope, original_max_position_embeddings=32)
        expected, _ = rope_inv_freq(raw)
        got = inverse_frequencies(read_config(raw).rope, 16)
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        assert not np.allclose(got, inverse_frequencies(read(rope_scaling=rope).rope, 16))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta",
        ),
        ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 3.0}}, "factor"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "rope_type"),
        ({"rope_scaling": {**LINEAR, "type": "yarn"}}, "disagree"),
        ({"rope_parameters": {**LINEAR, "type": "yarn"}}, "disagree"),
    ],
    ids=str,
)
def test_spellings_that_disagree_are_refused(changes, named):
    raw = {**tiny_config(), **changes}
    message = refused(raw)
    assert "disagree" in message and named in message


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'.*default, linear, llama3, yarn"),
        ({"type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope'.*default, linear, llama3, yarn"),
        ({"type": "su", "long_factor": [1.0]}, "'su'"),
        ({"rope_type": "nonsense"}, "'nonsense'"),
        ({"rope_type": 3}, "rope_type"),
        ({"rope_type": None, "factor": 2.0}, "rope_type"),
        ({"factor": 2.0}, "rope_type"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "llama3"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": -1.0}, "factor"),
        ({"rope_type": "linear", "factor": math.nan}, "factor"),
        ({"rope_type": "linear", "factor": math.inf}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**YARN, "beta_fast": -3}, "beta_fast"),
        ({**YARN, "beta_slow": [1]}, "beta_slow"),
        ({**YARN, "truncate": 1}, "truncate"),
        ({**YARN, "attention_factor": 0}, "attention_factor"),
        ({**YARN, "mscale": "a", "mscale_all_dim": 1.0}, "mscale"),
        ({**LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "rope_type"),
        ("linear", "object"),
        ([LINEAR], "object"),
    ],
    ids=str,
)
def test_rotary_settings_that_cannot_be_run_are_refused(rope, named, spelling):
    assert re.search(named, refused(tiny_config(**{spelling: rope})))


@pytest.mark.parametrize("theta", [0, -1.0, math.nan, math.inf, "10000", True, [1e4]])
def test_a_theta_that_is_no_positive_number_is_refused(theta):
    assert "rope_theta" in refused({**tiny_config(), "rope_theta": theta})
    nested = {"rope_theta": theta, "rope_type": "default"}
    assert "rope_theta" in refused(tiny_config(rope_parameters=nested))


numbers = st.floats(1e-3, 1e6) | st.integers(1, 100_000)


@given(
    st.sampled_from([LINEAR, LLAMA3, YARN]),
    st.dictionaries(
        st.sampled_from(
            ["factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"]
        ),
        numbers,
    ),
    st.floats(1.5, 1e7),
    st.integers(1, 200_000),
    st.sampled_from([2, 16, 128]),
)
@settings(max_examples=150)
def test_accepted_settings_have_the_reference_s_frequencies(rope, changes, theta, original, size):
    rope = {**rope, **changes, "original_max_position_embeddings": original}
    # Others make no sense, and equal ones divide by zero: see the refusals below.
    assume(rope["rope_type"] != "llama3" or rope["low_freq_factor"] < rope["high_freq_factor"])
    raw = tiny_config(rope_theta=theta, rope_scaling=rope, head_dim=size)
    config = read_config(raw)
    got = inverse_frequencies(config.rope, size)
    assert np.isfinite(got).all() and (got > 0).all()
    np.testing.assert_allclose(got, rope_inv_freq(raw)[0], rtol=1e-9)
    assert Rope(config.rope, size).magnitude == pytest.approx(rope_inv_freq(raw)[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN, "rope_theta": 1.0},
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 5.0}},
        {"rope_scaling": {**LINEAR, "factor": 1e29}, "rope_theta": 1e29},
    ],
    ids=str,
)
def test_settings_without_finite_frequencies_are_refused(changes):
    assert "rope" in refused(tiny_config(**changes))


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


REQUIRED = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
)
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
