"""config.json: what is accepted is complete and right; rotary settings are right or refused."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from mlx_stream.cache.positions import Rope, inverse_frequencies
from mlx_stream.config import ModelConfig, RopeConfig, read_config
from tests.fakes.configs import read, refused
from tests.fakes.tiny import LLAMA3, YARN, tiny_config
from tests.reference import rope_inv_freq

LINEAR = {"rope_type": "linear", "factor": 2.0}


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
